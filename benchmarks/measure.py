"""Times and memory of contenders in one process, one after the other in rotating order."""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "liger-kernel", "lightning")
_FLUSH: list[torch.Tensor] = []


def flush(device: torch.device) -> None:
    """Fills the L2 cache with something else."""
    if device.type == "cuda":
        if not _FLUSH:
            _FLUSH.append(torch.empty(256 << 20, dtype=torch.uint8, device=device))
        _FLUSH[0].zero_()


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """Returns the time of one call."""
    flush(device)
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - started)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def peak_mib(run: Callable[[], Any], device: torch.device) -> float:
    """Returns the most memory a call holds above what was held before it; 0 without CUDA."""
    if device.type != "cuda":
        run()
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def used_gib() -> float:
    """Returns the GPU memory in use, by whomever, but for what torch could give back; 0 without CUDA."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def race(
    contenders: dict[str, Callable[[], Any]], device: torch.device, repeats: int, warm_up: int = 2
) -> dict[str, dict[str, Any]]:
    """Returns for each contender the median, all times in ms, its peak in MiB, and the first call's ms.

    A contender that runs out of memory, or cannot run, is a row that says so.
    """
    rows: dict[str, dict[str, Any]] = {}
    alive: dict[str, Callable[[], Any]] = {}
    for name, run in contenders.items():
        try:
            first = milliseconds(run, device)
            for _ in range(warm_up - 1):
                run()
            rows[name] = {"first_ms": first, "peak_mib": peak_mib(run, device), "ms": []}
            alive[name] = run
        except Exception as error:  # a peer that fails is a result, not the end
            rows[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
        if device.type == "cuda":
            torch.cuda.empty_cache()
    names = list(alive)
    for i in range(repeats if names else 0):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            rows[name]["ms"].append(milliseconds(alive[name], device))
    for name in names:
        rows[name]["median_ms"] = statistics.median(rows[name]["ms"])
    for name, row in rows.items():
        print(f"  {name}: {row.get('failed') or format(row['median_ms'], '.1f') + ' ms'}", file=sys.stderr)
    return rows


def setting(device: torch.device) -> dict[str, Any]:
    """Returns date, machine and versions."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    return {
        "date": date.today().isoformat(),
        "device": machine,
        "python": platform.python_version(),
        **packages,
    }


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Returns rows aligned in columns."""
    cells = [[str(x) for x in row] for row in [list(header), *map(list, rows)]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *rest in cells:
        numbers = [c.rjust(w) for c, w in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *numbers]))
    return "\n".join(lines)


def parser(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """Returns the options that every script has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--repeats", type=int, default=repeats)
    made.add_argument("--small", action="store_true", help="tiny sizes on the CPU")
    made.add_argument("--out", type=Path, default=None, help="folder of the result")
    return made


def portable(value: Any) -> Any:
    """Returns `value` with paths of this repository relative to it, and of other paths the last part."""
    if isinstance(value, dict):
        return {key: portable(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [portable(v) for v in value]
    if isinstance(value, str | Path) and Path(value).is_absolute():
        path = Path(value)
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    return value


def save(name: str, result: dict[str, Any], folder: Path | None = None) -> Path:
    """Writes `result` as results/name-date.json."""
    path = (folder or RESULTS) / f"{name}-{date.today().isoformat()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(portable(result), indent=1) + "\n")
    return path
