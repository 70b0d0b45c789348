"""Which rows are for training, validation and test."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from grpo_lightning.data.files import check_exists, is_file
from grpo_lightning.data.sources import Source, has_splits, load_rows
from grpo_lightning.errors import ConfigError, DataError

Size: TypeAlias = int | float | str | None


class Splits:
    """The rows of each split of a source; loads what `select` asks for, and the training rows once.

    Args:
        source: where the training rows are.
        sizes: of `validation` and `test`: a number of rows or a fraction to hold out of the training rows,
            the name of another split, a file, or None.
    """

    def __init__(self, source: Source, sizes: Mapping[str, Size]) -> None:
        self.source, self.sizes = source, sizes
        self._rows: Any = None

    def __contains__(self, split: str) -> bool:
        return split == "train" or self.sizes.get(split) is not None

    def check(self) -> None:
        """Raises ConfigError or DataError for what cannot work whatever the data are."""
        for split, size in self.sizes.items():
            if is_file(size):
                check_exists(str(size))
            if (isinstance(size, float) and not 0 < size < 1) or (isinstance(size, int) and size < 1):
                raise ConfigError(
                    f"data.{split}_split is {size}; give a number of rows, a fraction between 0 and 1, "
                    "a split or a file"
                )
            if self.source.streaming and isinstance(size, (int, float)):
                raise ConfigError(
                    f"data.{split}_split is {size}, but nothing can be held out of a stream; "
                    "name a split or a file"
                )
            if isinstance(size, str) and not is_file(size) and not has_splits(self.source.dataset):
                raise ConfigError(
                    f"data.{split}_split is {size!r}, which is no file, and data.dataset has no further "
                    "splits; "
                    "give a file, a number of rows or a fraction"
                )

    def select(self, split: str) -> tuple[Any, Sequence[int], str]:
        """Returns rows, the indices of those that belong to `split`, and the name of the rows."""
        size = self.sizes.get(split)
        if isinstance(size, str):
            rows, name = self._load_named(size)
            return rows, range(len(rows)), name
        if self._rows is None:
            self._rows = self.source.load()
        return self._rows, hold_out(len(self._rows), self.sizes)[split], self.source.name

    def _load_named(self, name: str) -> tuple[Any, str]:
        """Returns the rows of a file, or of another split of the dataset."""
        source = self.source
        if is_file(name):
            return load_rows(
                name, dataset_kwargs=source.dataset_kwargs if is_file(source.dataset) else None
            ), name
        rows = load_rows(
            source.dataset, subset=source.subset, split=name, dataset_kwargs=source.dataset_kwargs
        )
        return rows, f"{source.name} ({name})"


def hold_out(n: int, sizes: Mapping[str, Size]) -> dict[str, Sequence[int]]:
    """Returns the indices of `train` and of each split whose size is a number of rows or a fraction of `n`.

    They are the ends of one fixed shuffle, so that they are disjoint and the same in every run.
    """
    counts = {
        name: max(1, round(n * size)) if isinstance(size, float) else size
        for name, size in sizes.items()
        if isinstance(size, (int, float))
    }
    if not counts:
        return {"train": range(n)}
    if sum(counts.values()) >= n:
        asked = " and ".join(f"data.{name}_split={sizes[name]}" for name in counts)
        raise DataError(f"{asked} would leave nothing of {n} rows to train on; hold out fewer")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    out: dict[str, Sequence[int]] = {}
    for name, count in counts.items():
        out[name] = sorted(order[-count:])
        order = order[:-count]
    return out | {"train": sorted(order)}
