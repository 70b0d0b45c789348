"""Rows from JSON Lines, JSON and CSV, read here so that an error names file and line."""

import csv
import json
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from grpo_lightning.errors import DataError

Row = dict[str, Any]


class FileRows(list[Row]):
    """Rows read from files; `places[i]` says where row i stands, for error messages."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def add(self, place: str, row: Row) -> None:
        self.append(row)
        self.places.append(place)


def place_of(rows: object, index: int, name: str = "dataset") -> str:
    """Returns `"train.jsonl:17"` for rows that were read here, else `"dataset, row 16"` (from 0)."""
    return rows.places[index] if isinstance(rows, FileRows) else f"{name}, row {index}"


def read_files(paths: list[str], **options: Any) -> FileRows:
    """Returns the rows of all `paths`, in order; `options` go to `csv.DictReader`, JSON takes none."""
    rows = FileRows()
    for place, row in _read(paths, options):
        rows.add(place, row)
    return rows


def stream_files(paths: list[str], **options: Any) -> Iterator[Row]:
    """Yields the rows that `read_files` returns, reading them one by one."""
    return (row for _, row in _read(paths, options))


def _read(paths: list[str], options: dict[str, Any]) -> Iterator[tuple[str, Row]]:
    for path in paths:
        read, allowed = FORMATS[Path(path).suffix.lower()]
        if unknown := sorted(set(options) - set(allowed)):
            raise DataError(
                f"data.dataset_kwargs has {', '.join(unknown)}, but {path} takes "
                f"{', '.join(allowed) or 'no options'}; leave it out"
            )
        for place, row in _readable(path, partial(read, path, **options)):
            if not isinstance(row, dict):
                raise DataError(
                    f"{place}: expected an object with named columns, got {type(row).__name__}; "
                    'write it as {"prompt": ...}'
                )
            yield place, row


def _readable(path: str, read: Callable[[], Iterator[tuple[str, Any]]]) -> Iterator[tuple[str, Any]]:
    """Yields the rows; says of a disk or a file that fails on the way which file it is."""
    try:
        yield from read()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error}; check the file, its rights and the disk"
        ) from error


def is_file(dataset: object) -> bool:
    """True for a path whose ending is a format that is read here."""
    return isinstance(dataset, (str, Path)) and Path(dataset).suffix.lower() in ENDINGS


def check_exists(path: str) -> None:
    """Raises DataError that names `path` and what stands beside it."""
    file = Path(path)
    if file.is_file():
        return
    folder = next(parent for parent in file.absolute().parents if parent.is_dir())
    names = sorted(child.name for child in folder.iterdir() if child.suffix.lower() in ENDINGS)
    near = get_close_matches(file.name, names, n=3, cutoff=0.5) or names[:5]
    beside = f"{folder} has {', '.join(near)}" if near else f"{folder} has no {', '.join(ENDINGS)} file"
    raise DataError(f"data.dataset: there is no file {path} ({beside}); correct the path")


def _read_jsonl(path: str) -> Iterator[tuple[str, Any]]:
    # Bytes, so that a line that is not UTF-8 is named like any other malformed line.
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{path}:{number}"
                yield place, _parse_json(line.rstrip(), place, "write one JSON object on each line")


def _read_json(path: str) -> Iterator[tuple[str, Any]]:
    content = _parse_json(Path(path).read_bytes(), path, "one object per line belongs into a .jsonl file")
    if isinstance(content, dict):
        lists = {name: value for name, value in content.items() if isinstance(value, list)}
        if len(lists) != 1:
            raise DataError(
                f"{path}: the object has {len(lists)} lists ({', '.join(lists) or 'none'}), not one, "
                "the rows; write the file as a list of objects"
            )
        (content,) = lists.values()
    if not isinstance(content, list):
        raise DataError(
            f"{path}: expected a list of objects, got {type(content).__name__}; write the rows as [...]"
        )
    return ((f"{path}, item {index}", row) for index, row in enumerate(content))


def _parse_json(text: bytes, place: str, remedy: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DataError(f"{place}: malformed JSON, {error.msg} at {where}; {remedy}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: {error.reason} at byte {error.start}; save the file as UTF-8") from error
    except (RecursionError, ValueError) as error:  # brackets without end, a number of thousands of digits
        raise DataError(f"{place}: {error}; write it with fewer brackets or digits") from error


def _read_csv(path: str, **options: Any) -> Iterator[tuple[str, Any]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            reader = csv.DictReader(file, **options)
        except (TypeError, csv.Error) as error:
            raise DataError(f"{path}: data.dataset_kwargs is {options}: {error}; correct it") from error
        try:
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    width, extra = len(reader.fieldnames or ()), len(row.get(None) or ())  # type: ignore[call-overload]
                    found = width + extra if extra else sum(value is not None for value in row.values())
                    raise DataError(
                        f"{place}: {found} fields where the header has {width}; "
                        "quote fields that hold a delimiter"
                    )
                yield place, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}:{reader.line_num + 1}: {error}; save the file as UTF-8 CSV") from error


FORMATS: dict[str, tuple[Callable[..., Iterator[tuple[str, Any]]], tuple[str, ...]]] = {
    ".jsonl": (_read_jsonl, ()),
    ".json": (_read_json, ()),
    ".csv": (_read_csv, ("delimiter", "quotechar", "escapechar", "dialect", "fieldnames")),
}
"""ending -> (reader of (place, row) pairs, options it takes)"""

ENDINGS = (*FORMATS, ".parquet")
"""endings of local files that data.dataset may name"""
