"""A `GRPOModule` that is fed `RolloutBatch` objects, without a callback: its gradient does not depend on how
the batch of an optimizer step is cut."""

from dataclasses import replace

import pytest
import torch
from fits import data, module, rows_of, sgd, trainer
from lightning.pytorch.callbacks import Callback
from models import random_rollout
from torch.utils.data import DataLoader

from grpo_lightning.errors import ConfigError
from grpo_lightning.losses import LossConfig

SPLIT_INVARIANT = ["dapo", "grpo", "dr_grpo", "gspo", "real", "cispo"]


class Gradients(Callback):
    """Keeps the gradient of every optimizer step."""

    def __init__(self):
        self.found = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.found.append({n: p.grad.clone() for n, p in pl_module.policy.trainable().items()})


def loader(parts):
    return DataLoader(parts, batch_size=None)


def gradients(folder, root, parts, loss="dapo", **changes):
    """Returns the gradient of each optimizer step, K of `parts` accumulated."""
    seen = Gradients()
    settings = {"max_steps": -1, "max_epochs": 1, **changes}
    trainer(root, seen, **settings).fit(module(folder, loss=LossConfig(loss), optimizer=sgd), loader(parts))
    return seen.found


def step(seed=0):
    """The rollout of one optimizer step; its policy has moved since it was sampled."""
    whole = random_rollout(prompts=4, seed=seed)
    known = -5 + torch.randn(len(whole.target_ids), generator=torch.Generator().manual_seed(seed))
    whole = replace(whole, old_logprobs=known)
    return whole.all_reduce_normalizers(lambda x: x, micro_batches=1)


def furthest(a, b):
    return max((a[n] - g).abs().max().item() for n, g in b.items())


def test_every_plain_batch_is_a_step(model_folder, tmp_path):
    trainer(tmp_path).fit(module(model_folder), loader([random_rollout(seed=i) for i in range(3)]))
    assert len([r for r in rows_of(tmp_path) if r["loss"]]) == 3


def test_prompts_without_a_callback_are_refused(model_folder, tmp_path):
    with pytest.raises(ConfigError, match="add RolloutCallback"):
        trainer(tmp_path).fit(module(model_folder), data())


@pytest.mark.parametrize("name", SPLIT_INVARIANT)
def test_accumulated_parts_give_the_gradient_of_the_whole(model_folder, tmp_path, name):
    """Two optimizer steps as 1 x 1, 1 x 2 and 1 x 4 micro-batches."""
    rollouts = [step(0), step(1)]
    found = {}
    for k in (1, 2, 4):
        parts = [p for r in rollouts for p in r.split(k, whole_groups=name == "real")]
        found[k] = gradients(model_folder, tmp_path / str(k), parts, name, accumulate_grad_batches=k)
        assert len(found[k]) == 2
    for i, whole in enumerate(found[1]):
        scale = max(1.0, *(g.abs().max().item() for g in whole.values()))
        assert any(g.abs().max() > 1e-4 for g in whole.values())
        assert furthest(found[2][i], whole) <= 1e-6 * scale
        assert furthest(found[4][i], whole) <= 1e-6 * scale


def test_a_short_last_step_is_exact_too(model_folder, tmp_path):
    """Lightning divides by K even where an epoch ends before K micro-batches."""
    whole = step()
    (one,) = gradients(model_folder, tmp_path / "one", [whole])
    (short,) = gradients(model_folder, tmp_path / "two", whole.split(2), accumulate_grad_batches=3)
    assert furthest(short, one) <= 1e-6 * max(1.0, *(g.abs().max().item() for g in one.values()))


@pytest.mark.filterwarnings("ignore:model.loss")
def test_bnpo_is_the_mean_of_its_micro_batches(model_folder, tmp_path):
    parts = step().split(4)
    (together,) = gradients(model_folder, tmp_path / "all", parts, "bnpo", accumulate_grad_batches=4)
    alone = [gradients(model_folder, tmp_path / str(i), [p], "bnpo")[0] for i, p in enumerate(parts)]
    mean = {n: torch.stack([g[n] for g in alone]).mean(0) for n in together}
    assert any(g.abs().max() > 1e-4 for g in together.values())
    assert furthest(together, mean) <= 1e-6


def test_batches_that_count_only_themselves_are_refused(model_folder, tmp_path):
    """Each packed by itself: accumulated, the sum of their means would be twice the gradient."""
    parts = [random_rollout(seed=i) for i in range(2)]
    held = sum(p.normalizers.tokens for p in parts)
    most = max(p.normalizers.tokens for p in parts)
    with pytest.raises(ConfigError, match=rf"hold {held} tokens, .*tokens is {most}; .*split"):
        gradients(model_folder, tmp_path, parts, accumulate_grad_batches=2)
