"""Callbacks that ruin a run, each in its own way; a class path names them in a config."""

import math

import torch
from lightning.pytorch.callbacks import Callback


class BadGradient(Callback):
    """Puts `value` into one gradient at the optimizer steps `steps`, on the rank `rank` (None: on all)."""

    def __init__(self, steps: list[int], value: float = math.nan, rank: int | None = None):
        self.steps, self.value, self.rank = steps, value, rank

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step in self.steps and self.rank in (None, trainer.global_rank):
            next(iter(pl_module.policy.trainable().values())).grad.view(-1)[0] = self.value


class BadWeight(Callback):
    """Ruins a weight while the optimizer steps, behind every check of the gradient."""

    def __init__(self, step: int, rank: int | None = None):
        self.step, self.rank = step, rank

    def on_fit_start(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers

        def ruin(*_):
            if trainer.global_step == self.step and self.rank in (None, trainer.global_rank):
                with torch.no_grad():
                    next(iter(pl_module.policy.trainable().values())).view(-1)[0] = math.nan

        optimizer.register_step_post_hook(ruin)


class BadLogits(Callback):
    """The training forward's log-probabilities are nan at the optimizer steps `steps`."""

    def __init__(self, steps: list[int], rank: int | None = None):
        self.steps, self.rank = steps, rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in self.steps and self.rank in (None, trainer.global_rank):
            stock = pl_module.policy.logprobs

            def logprobs(*args, **kwargs):
                scores = stock(*args, **kwargs)
                return scores._replace(logprobs=scores.logprobs * math.nan)

            pl_module.policy.logprobs = logprobs

    def on_train_batch_end(self, trainer, pl_module, *_):
        pl_module.policy.__dict__.pop("logprobs", None)
