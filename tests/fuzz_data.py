"""Data sets that nobody meant: malformed, mixed, endless, binary, not there. `fuzz.py data` runs them."""

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

GOOD = [{"prompt": f"say {i}", "answer": str(i)} for i in range(8)]
CHAT = [{"prompt": [{"role": "user", "content": f"say {i}"}], "answer": str(i)} for i in range(8)]
VALUES: tuple[Any, ...] = (
    None,
    "",
    "   ",
    0,
    -1.5,
    float("nan"),
    float("inf"),
    True,
    [],
    {},
    [[]],
    [None],
    ["text"],
    [{}],
    [{"role": "user"}],
    [{"role": None, "content": "x"}],
    [{"role": "wizard", "content": "x"}],
    [{"role": "user", "content": ["x"]}],
    [{"role": "assistant", "content": "x"}],
    {"role": "user", "content": "x"},
    "x" * 100_000,
    "\ud800",
    "\0",
    "\ufeffx",
    "‮ünï🦆" * 50,
    "{{ 7 * 7 }}{% raw %}",
    "<eos><pad>",
    {"a": {"b": {"c": [1, {"d": None}]}}},
    10**400,
)
LINES = (
    b'{"prompt": ',
    b"[1, 2]",
    b'"text"',
    b"null",
    b"NaN",
    b"\x00\x00\x00",
    b"\xff\xfe\x00x",
    b"\xef\xbb\xbf" + b'{"prompt": "x"}',
    b'{"prompt": "x"}\r',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "x", "prompt": "y"}',
    b'{"prompt": "x"} {"prompt": "y"}',
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"9" * 10_000,
    b"{}",
    b"",
    b"prompt,answer",
)
CELLS = ("", '"', '"open', "a,b,c", "\0", "x" * 200_000, "\ufeff", "'", "\r", "\n\n", "\ud800", "=1+1", "\\")


def data_cases(seed: int, count: int, folder: Path) -> list[Any]:
    """Writes `count` data sets into `folder`; returns a case for each."""
    from fuzz import Case

    pick = random.Random(seed)
    folder.mkdir(exist_ok=True)
    makers: list[Callable[..., Any]] = [_values, _lines, _csv, _parquet, _bytes, _files, _options]
    cases = []
    for number in range(count):
        make = makers[number % len(makers)]
        name, changes = make(pick, folder / f"d{number}", number // len(makers))
        changes = {"data.validation_split": None, **changes}
        cases.append(Case(f"{number} {make.__name__[1:]}: {name}"[:150], changes))
    return cases


def _write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def _jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _values(pick: random.Random, path: Path, turn: int) -> tuple[str, dict[str, Any]]:
    """One row, or all, hold a value that is no prompt or no answer."""
    rows = [dict(row) for row in pick.choice([GOOD, CHAT])]
    value, column = VALUES[turn % len(VALUES)], pick.choice(["prompt", "prompt", "answer"])
    for row in rows if pick.random() < 0.3 else [pick.choice(rows)]:
        row[column] = value
    if pick.random() < 0.5:
        return f"{column}={value!r:.60}", {"data.dataset": rows} if _yaml(value) else _as_file(path, rows)
    return f"{column}={value!r:.60}", _as_file(path, rows)


def _yaml(value: Any) -> bool:
    return "\ud800" not in str(value) and "\0" not in str(value)


def _as_file(path: Path, rows: list[Any]) -> dict[str, Any]:
    return {"data.dataset": _write(path.with_suffix(".jsonl"), _jsonl(rows))}


def _lines(pick: random.Random, path: Path, turn: int) -> tuple[str, dict[str, Any]]:
    """One line of a JSON Lines file is none."""
    lines = _jsonl(GOOD).splitlines()
    line = LINES[turn % len(LINES)]
    lines.insert(pick.choice([0, 3, len(lines)]), line)
    ending = pick.choice([".jsonl", ".jsonl", ".json", ".csv"])
    content = pick.choice([b"\n", b"\n", b"\r\n", b"\r"]).join(lines)
    return f"{ending} {line!r:.60}", {"data.dataset": _write(path.with_suffix(ending), content)}


def _csv(pick: random.Random, path: Path, turn: int) -> tuple[str, dict[str, Any]]:
    """Cells, quotes and headers that do not fit."""
    header = pick.choice(["prompt,answer", "prompt", "prompt,prompt", "", "question,answer", "prompt;answer"])
    cell = CELLS[turn % len(CELLS)]
    text = "\n".join([header, "say 1,1", f"{cell},2", "say 3,3", *["x,1"] * 5])
    changes: dict[str, Any] = {
        "data.dataset": _write(path.with_suffix(".csv"), text.encode("utf-8", "surrogatepass"))
    }
    if pick.random() < 0.2:
        changes["data.dataset_kwargs"] = pick.choice(
            [
                {"delimiter": ""},
                {"quotechar": 3},
                {"dialect": "none"},
                {"fieldnames": "ab"},
                {"encoding": "x"},
            ]
        )
    return f"{header} {cell!r:.40}", changes


def _parquet(pick: random.Random, path: Path, turn: int) -> tuple[str, dict[str, Any]]:
    """Columns of odd types, and files that are cut, flipped or none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [
        {"prompt": [1, 2, 3]},
        {"prompt": ["a", None, "b"]},
        {"prompt": [b"a", b"\xff"]},
        {"prompt": [["a"], []]},
        {"prompt": [{"role": "user", "content": "x"}] * 3},
        {"prompt": [[{"role": "user", "content": "x"}]] * 3, "answer": [None] * 3},
        {"question": ["a"] * 3},
        {"prompt": pa.array([], pa.string())},
        {"prompt": ["a"] * 3, "answer": [float("nan")] * 3},
        {},
    ][turn % 10]
    file = path.with_suffix(".parquet")
    pq.write_table(pa.table(columns), file)
    content = file.read_bytes()
    harm = pick.choice(["whole", "whole", "cut", "flipped", "text"])
    if harm == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif harm == "flipped":
        at = len(content) // 3
        file.write_bytes(content[:at] + bytes(b ^ 0xFF for b in content[at : at + 40]) + content[at + 40 :])
    elif harm == "text":
        file.write_bytes(_jsonl(GOOD))
    return f"{harm} {columns!r:.60}", {"data.dataset": str(file)}


def _bytes(pick: random.Random, path: Path, turn: int) -> tuple[str, dict[str, Any]]:
    """Contents that are no text, by an ending that says they are."""
    contents = {
        "random": pick.randbytes(5000),
        "gzip": gzip.compress(_jsonl(GOOD)),
        "gzip bomb": gzip.compress(b"0" * 10**8),
        "utf-16": "\n".join(map(json.dumps, GOOD)).encode("utf-16"),
        "latin-1": '{"prompt": "é"}\n'.encode("latin-1") * 8,
        "bom": b"\xef\xbb\xbf" + _jsonl(GOOD),
        "empty": b"",
        "newlines": b"\n" * 1000,
        "zeros": b"\0" * 100_000,
        "one line": b'{"prompt": "' + b"x" * 10**7 + b'"}',
        "carriage returns": _jsonl(GOOD).replace(b"\n", b"\r"),
        "array": json.dumps(GOOD).encode(),
        "object": json.dumps({"a": GOOD, "b": GOOD}).encode(),
        "elf": Path("/bin/true").read_bytes()[:20_000],
    }
    name = list(contents)[turn % len(contents)]
    ending = pick.choice([".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".txt", ""])
    return f"{name} as {ending or 'no ending'}", {
        "data.dataset": _write(Path(f"{path}{ending}"), contents[name])
    }


def _files(pick: random.Random, path: Path, turn: int) -> tuple[str, dict[str, Any]]:
    """What is no plain file that can be read."""
    file = path.with_suffix(pick.choice([".jsonl", ".csv", ".parquet", ".json"]))
    kind = (
        "folder",
        "loop",
        "dangling",
        "fifo",
        "unreadable",
        "null",
        "zero",
        "list",
        "mixed",
        "home",
        "glob",
    )[turn % 11]
    if kind == "folder":
        file.mkdir()
    elif kind == "loop":
        os.symlink(file, file)
    elif kind == "dangling":
        os.symlink(path / "nowhere", file)
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "unreadable":
        os.symlink("/proc/self/mem", file)
    elif kind in ("null", "zero"):
        os.symlink(f"/dev/{kind}", file)
    elif kind == "list":
        return kind, {"data.dataset": [str(file), _write(path.with_suffix(".csv"), b"prompt\nx\n")]}
    elif kind == "mixed":
        one = _write(path.with_suffix(".jsonl"), _jsonl(GOOD))
        return kind, {"data.dataset": [one, one, 3]}
    given = {"home": "~nobody/x.jsonl", "glob": f"{path.parent}/*.jsonl"}.get(kind, str(file))
    return f"{kind} {file.suffix}", {"data.dataset": given}


def _options(pick: random.Random, path: Path, turn: int) -> tuple[str, dict[str, Any]]:
    """Good rows with options that do not fit them."""
    changes = (
        {"data.prompt_column": "nothing"},
        {"data.prompt_template": "{prompt.__class__.__mro__}"},
        {"data.prompt_template": "{answer}" * 5000},
        {"data.columns": {"answer": "prompt"}},
        {"data.system_prompt": ""},
        {"data.conversational": True, "data.max_prompt_tokens": 1, "data.overlong": "drop"},
        {"data.max_prompt_tokens": 1, "data.overlong": "left-truncate"},
        {"data.streaming": True, "data.streaming_length": 4},
        {"data.streaming": True, "data.streaming_length": 10**6, "data.streaming_buffer": 1},
        {"data.prompts_per_rollout": 9},
        {"data.validation_split": 0.999},
        {"data.validation_split": "/nowhere.jsonl"},
        {"data.test_split": "test"},
        {"data.split": "train[:0]"},
        {"data.subset": "main"},
        {"data.chat_template_kwargs": {"add_generation_prompt": False}},
    )[turn % 16]
    return str(changes)[:100], {**_as_file(path, GOOD), **changes}
