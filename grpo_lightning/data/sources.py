"""Where prompts come from: `load_rows` turns whatever `data.dataset` names into rows, dicts by column."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from grpo_lightning.data.files import ENDINGS, Row, check_exists, is_file, read_files, stream_files
from grpo_lightning.errors import ConfigError, DataError, choices
from grpo_lightning.utils.imports import import_object
from grpo_lightning.utils.signals import exits_named

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    Rows: TypeAlias = Sequence[Row] | Dataset

GYM = "reasoning_gym:"
PYTHON = "python:"


@dataclass(frozen=True, kw_only=True)
class Source:
    """What to load; its fields are options of `PromptDataModule`."""

    dataset: Any
    subset: str | None = None
    split: str = "train"
    dataset_kwargs: Mapping[str, Any] = field(default_factory=dict)
    streaming: bool = False

    @property
    def name(self) -> str:
        """The dataset in a few words, for messages."""
        given = paths_of(self.dataset) or [self.dataset if isinstance(self.dataset, str) else "dataset"]
        return f"{given[0]} and {len(given) - 1} more" if len(given) > 1 else given[0]

    def check(self) -> None:
        """Raises what can be known without loading: a missing file, remote code, an unfit option."""
        for path in paths_of(self.dataset):
            check_exists(path)
        if isinstance(self.dataset, str) and self.dataset.startswith(("/", "./", "../", "~")):
            _check_path(self.dataset)
        if "trust_remote_code" in self.dataset_kwargs:
            raise ConfigError(
                "data.dataset_kwargs.trust_remote_code is not allowed: datasets never run code here; "
                "convert the dataset to parquet or jsonl"
            )
        _check_options(self, _kind(self.dataset))

    def load(self) -> "Rows | IterableDataset":
        """Returns the rows; see `load_rows`."""
        self.check()
        rows = _kind(self.dataset).load(self)
        if self.streaming:
            return _as_stream(rows)
        if not hasattr(rows, "__len__"):
            raise ConfigError(
                f"data.dataset is a stream ({type(rows).__name__}); "
                "set data.streaming: true and data.streaming_length"
            )
        return rows


def load_rows(
    dataset: Any,
    *,
    subset: str | None = None,
    split: str = "train",
    dataset_kwargs: Mapping[str, Any] | None = None,
    streaming: bool = False,
) -> "Rows | IterableDataset":
    """Returns the rows of `dataset`: a sequence of dicts, or a `datasets.IterableDataset` when `streaming`.

    Args:
        dataset: a local .jsonl, .json, .csv or .parquet file or a list of them; a Hugging Face hub id;
            `reasoning_gym:<task>`; `python:<function that returns rows>`; a list of dicts; a `datasets`
            object; any object with `__len__` and `__getitem__` that gives dicts.
        subset: name of the configuration of a hub dataset.
        split: which split of a hub dataset or `DatasetDict`; the other kinds have only `train`.
        dataset_kwargs: goes to `datasets.load_dataset`, the reasoning-gym task, the python function or the
            CSV reader.
        streaming: read while training instead of before it.

    Raises:
        DataError: nothing can be loaded, or a file is malformed (names file and line).
        ConfigError: an option does not fit this kind of dataset.
    """
    return Source(
        dataset=dataset, subset=subset, split=split, dataset_kwargs=dataset_kwargs or {}, streaming=streaming
    ).load()


def has_splits(dataset: Any) -> bool:
    """True if `dataset` is of a kind that has splits beside the one to train on."""
    return "split" in _kind(dataset).options


def paths_of(dataset: Any) -> list[str]:
    """Returns the local files that `dataset` names; none when it is something else."""
    given = list(dataset) if isinstance(dataset, (list, tuple)) else [dataset]
    files = [str(path) for path in given if is_file(path)]
    if files and len(files) < len(given):
        other = next(path for path in given if not is_file(path))
        raise DataError(
            f"data.dataset: {other!r} is not a file of the kinds {', '.join(ENDINGS)}; "
            "a list holds such files only"
        )
    return files


def _check_path(path: str) -> None:
    # What is clearly a path is never looked for on the hub, where a failure takes half a minute offline.
    if not Path(path).exists():
        raise DataError(f"data.dataset: there is no {path}; give a file that ends with {', '.join(ENDINGS)}")


def _load_files(source: Source) -> "Rows | IterableDataset":
    paths = paths_of(source.dataset)
    endings = {Path(path).suffix.lower() for path in paths}
    if ".parquet" in endings:
        if len(endings) > 1:
            raise DataError(
                f"data.dataset mixes {', '.join(sorted(endings))} files; convert them to one format"
            )
        return _load_parquet(source, paths)
    if not source.streaming:
        return read_files(paths, **source.dataset_kwargs)
    return _as_stream(partial(stream_files, paths, **source.dataset_kwargs))


# Files go around `datasets.load_dataset`, which sends a request to the hub for local ones too.
def _load_parquet(source: Source, paths: list[str]) -> "Rows | IterableDataset":
    from datasets import Dataset, IterableDataset

    kind = IterableDataset if source.streaming else Dataset
    with _explained(source, "check the files and data.dataset_kwargs"):
        return kind.from_parquet(paths, **source.dataset_kwargs)  # type: ignore[arg-type]  # paths are strings


def _load_hub(source: Source) -> "Rows | IterableDataset":
    import datasets

    options = {"name": source.subset, "split": source.split, "streaming": source.streaming}
    remedy = f"check the names and the network, or give a local file ({', '.join(ENDINGS)})"
    with _explained(source, remedy):
        return datasets.load_dataset(source.dataset, **{**options, **source.dataset_kwargs})  # type: ignore[return-value]


@contextmanager
def _explained(source: Source, remedy: str) -> Iterator[None]:
    """Turns what `datasets` raises into one line that names the dataset."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        options = f"subset {source.subset}, split {source.split}"
        raise DataError(
            f"data.dataset={source.name} ({options}) cannot be loaded: {reason}; {remedy}"
        ) from error


def _load_gym(source: Source) -> "Rows":
    try:
        import reasoning_gym  # type: ignore[import-not-found]
    except ImportError as error:
        raise DataError(
            f'data.dataset={source.dataset!r} needs reasoning-gym; pip install "grpo-lightning[gym]"'
        ) from error
    task = source.dataset.removeprefix(GYM)
    try:
        entries = reasoning_gym.create_dataset(task, **source.dataset_kwargs)
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(
            f"data.dataset={source.dataset!r} with options {dict(source.dataset_kwargs)}: {error}; "
            "see reasoning-gym's list of tasks and their options"
        ) from error
    return [{"prompt": entry["question"], **entry} for entry in entries]


def _load_python(source: Source) -> "Rows | IterableDataset":
    function = import_object(source.dataset.removeprefix(PYTHON), "data.dataset")
    if source.streaming:
        return _as_stream(partial(function, **source.dataset_kwargs))
    try:
        with exits_named(f"data.dataset={source.dataset!r}", DataError):
            return list(function(**source.dataset_kwargs))
    except TypeError as error:
        raise ConfigError(
            f"data.dataset={source.dataset!r} with data.dataset_kwargs={dict(source.dataset_kwargs)}: {error}"
        ) from error


def _load_object(source: Source) -> "Rows | IterableDataset":
    dataset = source.dataset
    if not isinstance(dataset, Mapping):
        return dataset
    if source.split not in dataset:
        raise DataError(f"data.split is {choices(source.split, map(str, dataset))}")
    return dataset[source.split]


def _load_nothing(source: Source) -> "Rows":
    raise DataError(
        f"data.dataset is {source.dataset!r}; give a file ({', '.join(ENDINGS)}), a hub id, a list of dicts, "
        f"a datasets.Dataset, {GYM}<task> or {PYTHON}<function>"
    )


def _as_stream(rows: Any) -> "IterableDataset":
    """Returns rows, or a function that returns them anew each time, as a stream."""
    from datasets import Dataset, IterableDataset

    if isinstance(rows, IterableDataset):
        return rows
    if isinstance(rows, Dataset):
        return rows.to_iterable_dataset()
    if isinstance(rows, partial):
        return IterableDataset.from_generator(rows)
    if not hasattr(rows, "__len__"):
        raise ConfigError(
            f"data.dataset is a {type(rows).__name__}; with data.streaming: true "
            f"give a datasets.IterableDataset or {PYTHON}<generator function>"
        )
    return IterableDataset.from_generator(partial(iter, rows))


@dataclass(frozen=True)
class _Kind:
    """One kind of dataset: how it is recognised and loaded, and which options beside `dataset` it takes."""

    says: str
    matches: Callable[[Any], bool]
    load: "Callable[[Source], Rows | IterableDataset]"
    options: tuple[str, ...] = ()


def _begins(prefix: str) -> Callable[[Any], bool]:
    return lambda dataset: isinstance(dataset, str) and dataset.startswith(prefix)


KINDS: tuple[_Kind, ...] = (
    _Kind("a reasoning-gym task", _begins(GYM), _load_gym, ("dataset_kwargs",)),
    _Kind("a python function", _begins(PYTHON), _load_python, ("dataset_kwargs",)),
    _Kind("a local file", lambda dataset: bool(paths_of(dataset)), _load_files, ("dataset_kwargs",)),
    _Kind("a hub dataset", _begins(""), _load_hub, ("subset", "split", "dataset_kwargs")),
    _Kind("a dictionary of splits", lambda dataset: isinstance(dataset, Mapping), _load_object, ("split",)),
    _Kind("an object", lambda d: hasattr(d, "__getitem__") or hasattr(d, "__iter__"), _load_object),
    _Kind("nothing that can be loaded", lambda dataset: True, _load_nothing),
)
"""The first kind that matches loads the dataset."""


def _kind(dataset: Any) -> _Kind:
    return next(kind for kind in KINDS if kind.matches(dataset))


def _check_options(source: Source, kind: _Kind) -> None:
    given = {
        "subset": source.subset is not None,
        "split": source.split != "train",
        "dataset_kwargs": bool(source.dataset_kwargs),
    }
    for option, is_given in given.items():
        if is_given and option not in kind.options:
            value = getattr(source, option)
            takes = " and ".join(f"data.{name}" for name in kind.options) or "no further options"
            raise ConfigError(
                f"data.{option} is {value!r}, but data.dataset is {kind.says}, which takes {takes}; "
                "leave it out"
            )
