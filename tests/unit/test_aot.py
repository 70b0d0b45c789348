"""Kernels compile to machine code for the GPU they are for, on a machine that has none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")


def output_of(script, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).parents[1] / script)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_kernel_compiles(tmp_path):
    assert "compiled 155 variants" in output_of("aot.py", tmp_path)


def test_lengths_make_no_variant(tmp_path):
    """Keys of Triton's own cache over 30 batches; the rotary kernel has one variant per direction."""
    lines = output_of("variants.py", tmp_path).splitlines()
    found = dict(line.split(": ") for line in lines)
    assert found.pop("_turn") == "2 then 2"
    assert len(found) == 9
    assert set(found.values()) == {"1 then 1"}
