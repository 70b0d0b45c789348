"""The number of ranks may change where a rollout ends, and nowhere else."""

import json
from pathlib import Path

import pytest
import torch
from commands import run_ranks

SCRIPT = Path(__file__).with_name("ddp_run.py")
LOSS = {"name": "dapo"}


def run(folder, out, ranks, steps, *rest):
    return run_ranks(SCRIPT, out, folder, out, ranks, 1, json.dumps([LOSS]), steps, *rest)[json.dumps(LOSS)]


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory):
    """Four optimizer steps, two per rollout, on one rank and on two."""
    root = tmp_path_factory.mktemp("world")
    return {n: (run(model_folder, root / str(n), n, 4), root / str(n) / "0") for n in (1, 2)}


@pytest.mark.parametrize(("then", "now"), [(2, 1), (1, 2)])
def test_another_world_size_goes_on_with_the_same_prompts(runs, model_folder, tmp_path, then, now):
    """The third and fourth step have the gradients of the run that was never stopped."""
    resumed = run(model_folder, tmp_path, now, 4, str(runs[then][1] / "step=2.ckpt"))
    assert len(resumed["gradients"]) == 2
    for ours, theirs in zip(resumed["gradients"], runs[then][0]["gradients"][2:], strict=True):
        largest = max(g.abs().max().item() for g in theirs.values())
        assert largest > 1e-4
        assert max((ours[n] - g).abs().max().item() for n, g in theirs.items()) <= 1e-6 * max(1.0, largest)
    for n, w in runs[then][0]["weights"].items():
        torch.testing.assert_close(resumed["weights"][n], w, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("then", "now"), [(2, 1), (1, 2)])
def test_amid_a_rollout_it_is_refused_by_name(runs, model_folder, tmp_path, then, now):
    with pytest.raises(
        AssertionError, match=f"in the middle of a rollout by {then} ranks, now there are {now}"
    ):
        run(model_folder, tmp_path, now, 4, str(runs[then][1] / "step=1.ckpt"))
