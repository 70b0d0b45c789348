"""Two CPU ranks over gloo against one: the same gradient, the same metrics, and a resume."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import save_tiny

SCRIPT = Path(__file__).with_name("ddp_run.py")


def run(folder, out, ranks, k, name, steps=1, *rest):
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(SCRIPT), folder, str(out), str(ranks), str(k), name, str(steps), *rest]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return torch.load(out / "result.pt", weights_only=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


SELECTING = 'clip_cov:{"cov_frac": 0.2, "cov_low": -0.5, "cov_high": 5.0}'


@pytest.mark.parametrize("name", ["grpo", "dapo", "real", SELECTING])
def test_two_ranks_give_the_gradient_of_one(folder, tmp_path, name):
    one = run(folder, tmp_path / "one", 1, 1, name)
    two = run(folder, tmp_path / "two", 2, 2, name)
    assert any(g.abs().max() > 1e-4 for g in one["gradient"].values())
    scale = max(1.0, max(g.abs().max().item() for g in one["gradient"].values()))
    worst = max((two["gradient"][n] - g).abs().max().item() for n, g in one["gradient"].items())
    assert worst <= 1e-6 * scale
    timings = {"step_time", "tokens_per_second"}
    for key, value in one["metrics"].items():
        if key not in timings and not key.startswith("time/"):
            assert two["metrics"][key] == pytest.approx(value, abs=1e-4), key


def test_two_ranks_resume_bitwise(folder, tmp_path):
    whole = run(folder, tmp_path / "whole", 2, 1, "dapo", 3)
    resumed = run(folder, tmp_path / "rest", 2, 1, "dapo", 3, str(tmp_path / "whole" / "step=1.ckpt"))
    assert all(torch.equal(whole["weights"][n], w) for n, w in resumed["weights"].items())
