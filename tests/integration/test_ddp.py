"""Two CPU ranks over gloo against one: the same gradients, the same metrics, and a resume."""

import json
from pathlib import Path

import pytest
import torch
from commands import run_ranks

from grpo_lightning.losses import AGGREGATIONS, RECIPES

SCRIPT = Path(__file__).with_name("ddp_run.py")
CHANGES = {
    "dro": {"dro_coef": 0.1},
    "clip_cov": {"cov_frac": 0.2, "cov_low": -0.5},
    "kl_cov": {"cov_frac": 0.2},
}
LOSSES = [
    {"name": name, **CHANGES.get(name, {})}
    for name, recipe in RECIPES.items()
    if AGGREGATIONS[recipe.aggregation].split_invariant
] + [{"name": "dapo", "top_entropy_quantile": 0.3}]  # the first tokens of a group are equal up to rounding


def run(folder, out, ranks, k, losses, steps=2, *rest):
    return run_ranks(SCRIPT, out, folder, out, ranks, k, json.dumps(losses), steps, *rest)


@pytest.fixture(scope="module")
def results(model_folder, tmp_path_factory):
    """One process group for all recipes, since starting one takes seconds."""
    root = tmp_path_factory.mktemp("ddp")
    return run(model_folder, root / "one", 1, 1, LOSSES), run(model_folder, root / "two", 2, 2, LOSSES)


@pytest.mark.parametrize("loss", [json.dumps(loss) for loss in LOSSES])
def test_two_ranks_give_the_gradient_of_one(results, loss):
    """On the first pass, and on the second, where ratios are not 1."""
    one, two = (r[loss] for r in results)
    for ours, theirs in zip(one["gradients"], two["gradients"], strict=True):
        largest = max(g.abs().max().item() for g in ours.values())
        assert largest > 1e-4
        worst = max((theirs[n] - g).abs().max().item() for n, g in ours.items())
        assert worst <= 1e-6 * max(1.0, largest)
    timings = {"step_time", "tokens_per_second"}
    for key, value in one["metrics"].items():
        if key not in timings and not key.startswith("time/"):
            assert two["metrics"][key] == pytest.approx(value, abs=1e-4), key


def test_ranks_that_cut_differently_or_have_nothing(model_folder, tmp_path, monkeypatch):
    """One prompt per rank, some of them dead; each rank has its own number of filled micro-batches."""
    monkeypatch.setenv("UNEVEN", "1")
    losses = [{"name": "dapo"}, {"name": "dapo", "top_entropy_quantile": 0.3}]
    one = run(model_folder, tmp_path / "one", 1, 3, losses, 6)
    two = run(model_folder, tmp_path / "two", 2, 3, losses, 6)
    for loss in map(json.dumps, losses):
        largest = [max(g.abs().max().item() for g in step.values()) for step in one[loss]["gradients"]]
        assert max(largest) > 1e-4
        for ours, theirs in zip(one[loss]["gradients"], two[loss]["gradients"], strict=True):
            assert max((theirs[n] - g).abs().max().item() for n, g in ours.items()) <= 1e-6


def test_two_ranks_resume_bitwise(model_folder, tmp_path):
    loss = {"name": "dapo"}
    whole = run(model_folder, tmp_path / "whole", 2, 1, [loss], 3)[json.dumps(loss)]
    checkpoint = str(tmp_path / "whole" / "0" / "step=1.ckpt")
    resumed = run(model_folder, tmp_path / "rest", 2, 1, [loss], 3, checkpoint)[json.dumps(loss)]
    assert all(torch.equal(whole["weights"][n], w) for n, w in resumed["weights"].items())
