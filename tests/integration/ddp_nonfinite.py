"""Run by test_nonfinite_ranks.py on two CPU ranks of which only the second has a number that is not finite.

Arguments: model folder, where to write. Each rank writes how each sickness ended, and its weights.
"""

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from fits import data, module, rollout, trainer, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from nonfinite import BadGradient, BadLogits, BadWeight

from grpo_lightning.engines import HFEngine
from grpo_lightning.errors import GRPOError


class BadEngine(HFEngine):
    """Reports nan for one token, on the second rank."""

    def generate(self, requests, sampling):
        groups = super().generate(requests, sampling)
        if os.environ.get("LOCAL_RANK") == "1" and self.policy_version == 2:
            first = groups[0][0]
            groups[0][0] = replace(first, logprobs=[math.nan, *first.logprobs[1:]])
        return groups


SICK = {
    "gradient": ([BadGradient([1], rank=1)], None, {}),
    "gradients": ([BadGradient([1, 2, 3], rank=1)], None, {}),
    "logits": ([BadLogits([1], rank=1)], None, {}),
    "scores": ([BadLogits([2], rank=1)], None, {"num_iterations": 2}),
    "weight": ([BadWeight(2, rank=1)], None, {}),
    "engine": ([], BadEngine(), {}),
}


def run(folder, root, name):
    """Returns how a run ended: steps taken, steps skipped, what was said."""
    callbacks, engine, changes = SICK[name]
    saver = ModelCheckpoint(root / "ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    m = module(folder)
    r = rollout(engine=engine, **changes)
    settings = {"max_steps": 5, "devices": 2, "strategy": "ddp", "logger": False}
    t = trainer(root, *callbacks, r, saver, **settings)
    try:
        t.fit(m, data())
        end = "went on"
    except GRPOError as error:
        end = str(error)
    torch.save(weights(m), root / f"{t.global_rank}.pt")
    return t.global_step, float(t.callback_metrics.get("train/skipped_steps", -1)), end


if __name__ == "__main__":
    folder, root = sys.argv[1:]
    ends = {name: run(folder, Path(root, name), name) for name in SICK}
    Path(root, f"{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(ends))
