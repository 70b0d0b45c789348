"""The benchmark scripts run, at sizes that say nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("script", "row"),
    [
        ("bench_head", "ours, Triton"),
        ("bench_loss_variants", "dapo"),
        ("bench_memory", "256 tokens, recomputed, inputs in host memory"),
    ],
)
def test_small(script, row):
    pytest.importorskip("bitsandbytes" if script == "bench_memory" else "triton")
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), "--small"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = [line for line in done.stdout.splitlines() if line.startswith(f"{row}  ")]
    assert float(found.removeprefix(row).split()[0]) > 0
