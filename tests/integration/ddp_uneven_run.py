"""Run by test_ddp_uneven.py on `ranks` CPU ranks: evaluation where a rank has no rows, and plain batches."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from fits import ROWS, module, rollout, sgd, trainer
from lightning.pytorch.callbacks import Callback
from models import random_rollout
from torch.utils.data import DataLoader

from grpo_lightning import PromptDataModule
from grpo_lightning.callbacks.evaluation import ValidationConfig
from grpo_lightning.losses import LossConfig
from grpo_lightning.types import SamplingParams

RANK = int(os.environ.get("LOCAL_RANK", "0"))


def graded(completions, answer, **_):
    """Needs a column, and completions to divide by."""
    share = 1 / len(completions) * len(completions)
    return [share * len(text) / 8 + int(a) for text, a in zip(completions, answer, strict=True)]


def sometimes(completions, answer, **_):
    """Applies to half of the prompts."""
    return [len(text) / 8 if int(a) % 2 else None for text, a in zip(completions, answer, strict=True)]


class First:
    """A user's own loader: rank r yields r batches less than there are."""

    def __init__(self, loader):
        self.batches = list(loader)[: len(loader) - RANK]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class Fewer(PromptDataModule):
    def val_dataloader(self):
        return First(super().val_dataloader())


def evaluated(folder, root, ranks):
    """Returns what validate, test and predict found: 3 prompts, 2 per batch over all ranks."""
    out = {}
    validation = ValidationConfig(num_generations=2, sampling=SamplingParams(max_tokens=8))
    for kind in (PromptDataModule, Fewer):
        held_out = {"validation_split": 3, "test_split": 3, "validation_batch_size": 2}
        prompts = kind(ROWS, prompts_per_rollout=4, seed=5, **held_out)
        r = rollout(reward_funcs=[graded, sometimes], advantage="batch_norm", validation=validation)
        t = trainer(root, r, devices=ranks, strategy="ddp" if ranks > 1 else "auto")
        m = module(folder)
        out[kind.__name__] = t.validate(m, prompts)[0]
        if kind is PromptDataModule:
            out["test"] = t.test(m, prompts)[0]
            columns = t.predict(m, prompts)
            texts = [text for samples in columns for text in samples["completion"]]
            out["predict"] = sorted(everywhere(texts))
    return out


def everywhere(items):
    if not torch.distributed.is_initialized():
        return items
    found = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, items)
    return [x for own in found for x in own]


class Gradients(Callback):
    """Keeps the gradient of every optimizer step."""

    def __init__(self):
        self.found = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.found.append({n: p.grad.clone() for n, p in pl_module.policy.trainable().items()})


def trained(folder, root, ranks, k, name, whole):
    """Returns the gradients of two steps; Lightning's own sampler would shuffle the parts of a step."""
    seen = Gradients()
    t = trainer(
        root,
        seen,
        max_steps=2,
        accumulate_grad_batches=k,
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        use_distributed_sampler=False,
    )
    parts = [p for batch in whole for p in batch.split(k * ranks, whole_groups=name == "real")]
    t.fit(
        module(folder, loss=LossConfig(name), optimizer=sgd), DataLoader(parts[RANK::ranks], batch_size=None)
    )
    return seen.found


def rollouts():
    for seed in range(2):
        batch = random_rollout(prompts=4, seed=seed)
        old = -5 + torch.randn(len(batch.target_ids), generator=torch.Generator().manual_seed(seed))
        yield replace(batch, old_logprobs=old).all_reduce_normalizers(lambda x: x, micro_batches=1)


if __name__ == "__main__":
    folder, out, ranks, k = sys.argv[1:]
    root, n = Path(out), int(ranks)
    result = {"evaluated": evaluated(folder, root, n)}
    for name in ("dapo", "grpo", "real"):
        result[name] = trained(folder, root / name, n, int(k), name, list(rollouts()))
    if RANK == 0:
        torch.save(result, root / "result.pt")
