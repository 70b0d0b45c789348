"""Two ranks, a number that is not finite on one of them: both skip, or both stop, and none waits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fits import same_bits

SCRIPT = Path(__file__).with_name("ddp_nonfinite.py")


@pytest.fixture(scope="module")
def ended(model_folder, tmp_path_factory):
    """Returns a folder, and for each rank how each sickness ended; one process group for all."""
    root = tmp_path_factory.mktemp("ranks")
    given = [sys.executable, str(SCRIPT), model_folder, str(root)]
    done = subprocess.run(given, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return root, [json.loads((root / f"{r}.json").read_text()) for r in (0, 1)]


@pytest.mark.parametrize("sick", ["gradient", "logits"])
def test_all_ranks_skip_a_step(ended, sick):
    root, ends = ended
    assert [e[sick] for e in ends] == [[5, 1.0, "went on"]] * 2
    weights = [torch.load(root / sick / f"{r}.pt", weights_only=True) for r in (0, 1)]
    assert same_bits(*weights)
    assert all(w.isfinite().all() for w in weights[0].values())
    kept = {
        p.stem: torch.load(p, weights_only=True)["state_dict"] for p in (root / sick / "ckpt").glob("*.ckpt")
    }
    assert same_bits(kept["step=1"], kept["step=2"])
    assert not same_bits(kept["step=2"], kept["step=3"])


@pytest.mark.parametrize(
    ("sick", "steps", "says"),
    [
        ("gradients", 3, "3 optimizer steps in a row were skipped, the last is step 3; not finite: gradient"),
        ("weight", 2, "is not finite after optimizer step 2"),
        ("scores", 2, "log-probabilities of the policy, taken of a rollout before it trains"),
        ("engine", 2, "BadEngine reports nan as the log-probability of token 0 of completion 0"),
    ],
)
def test_all_ranks_stop_together(ended, sick, steps, says):
    root, ends = ended
    assert [e[sick][0] for e in ends] == [steps, steps]
    assert all(says in e[sick][2] for e in ends), ends
    for path in (root / sick / "ckpt").glob("*.ckpt"):
        assert all(w.isfinite().all() for w in torch.load(path, weights_only=True)["state_dict"].values())
