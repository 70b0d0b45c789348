"""Run by test_ddp.py on `ranks` CPU ranks; rank 0 saves what each loss left."""

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from fits import data, long, module, rollout, sgd, trainer, vowels, weights
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from grpo_lightning.losses import LossConfig
from grpo_lightning.rollout.micro_batch_sizing import MicroBatchSizer


class Gradients(Callback):
    """Keeps the gradient of every optimizer step."""

    def __init__(self):
        self.found = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.found.append({n: p.grad.clone() for n, p in pl_module.policy.trainable().items()})


def uneven(prompts, completions, **_):
    """Half of the prompts, and of the ranks, have nothing to learn from."""
    alive = [int("".join(filter(str.isdigit, str(p))) or 0) % 2 for p in prompts]
    return [on * x for on, x in zip(alive, long(completions), strict=True)]


UNEVEN = "UNEVEN" in os.environ
"""rank r cuts into r + 1 micro-batches, whatever the others do, and some ranks have no tokens at all"""
if UNEVEN:
    MicroBatchSizer.count = lambda self, shape, whole_groups: 1 + int(os.environ.get("LOCAL_RANK", "0"))


def run(folder, root, ranks, k, loss, steps, ckpt_path=None):
    """Returns gradients, metrics and weights after `steps` passes over rollouts used twice."""
    seen = Gradients()
    m = module(folder, loss=LossConfig(**loss), optimizer=sgd)
    saver = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    t = trainer(
        root,
        rollout(num_generations=8, num_iterations=2, reward_funcs=[uneven] if UNEVEN else [vowels, long]),
        seen,
        saver,
        max_steps=steps,
        accumulate_grad_batches=k,
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
    )
    changes = {"prompts_per_rollout": 2} if UNEVEN else {}
    t.fit(m, data(validation_split=3, **changes), ckpt_path=ckpt_path)
    metrics = {key: float(v) for key, v in t.callback_metrics.items()}
    return {"gradients": seen.found, "metrics": metrics, "weights": weights(m), "is_zero": t.is_global_zero}


if __name__ == "__main__":
    folder, out, ranks, k, losses, steps, *rest = sys.argv[1:]
    found = {
        json.dumps(loss): run(folder, Path(out) / str(i), int(ranks), int(k), loss, int(steps), *rest)
        for i, loss in enumerate(json.loads(losses))
    }
    if all(r.pop("is_zero") for r in found.values()):
        torch.save(found, Path(out) / "result.pt")
