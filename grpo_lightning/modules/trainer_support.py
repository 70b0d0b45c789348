"""What a Trainer may do with the module besides training it: each works, or is refused at once."""

from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks as theirs
from lightning.pytorch.utilities.compile import to_uncompiled
from torch import Tensor

from grpo_lightning.errors import ConfigError
from grpo_lightning.modules.strategies import check_strategy
from grpo_lightning.utils.out_of_memory import explained, explains
from grpo_lightning.utils.telemetry import guard_loggers

FOREIGN = "pytorch_lightning"
REFUSED: dict[type[theirs.Callback], str] = {
    theirs.LearningRateFinder: "a few steps do not say which rate is good for a run, and it is an "
    "argument of model.optimizer; compare runs with other model.optimizer.init_args.lr",
    theirs.BatchSizeFinder: "the prompts of a rollout are part of the algorithm; set "
    "data.prompts_per_rollout, and leave rollout.micro_batches at auto, which fills a GPU's memory",
    theirs.StochasticWeightAveraging: "it copies the module before its weights are loaded, and averages "
    "nothing; average the adapters of several checkpoints after the run",
    theirs.WeightAveraging: "it exchanges the weights for validation, of which an engine with a copy knows "
    "nothing; average the adapters of several checkpoints after the run",
    theirs.ModelPruning: "it looks for weights before they are loaded; prune the model before the run",
    theirs.BackboneFinetuning: "there is no `backbone`; model.lora.target_modules says what trains",
}
"""Callbacks of Lightning that cannot do their work here, and what to do instead."""


def check_roots(things: Iterable[object]) -> None:
    """Raises ConfigError for an object of `pytorch_lightning`, whose classes `lightning` does not know.

    It would run in part: a foreign ModelCheckpoint, for one, comes beside the Trainer's own.
    """
    for thing in things:
        if any(kind.__module__.partition(".")[0] == FOREIGN for kind in type(thing).__mro__):
            raise ConfigError(
                f"{type(thing).__name__} is of {FOREIGN}, another copy of Lightning with its own classes: "
                "import it, or what it is made from, from lightning.pytorch"
            )


class TrainerSupport(pl.LightningModule):
    """Checks the Trainer before anything is loaded, and takes weights over from other processes."""

    policy: Any
    half_updated = False
    """an optimizer step failed when some of the weights had changed"""

    def configure_callbacks(self) -> list[theirs.Callback]:
        """Adds none; it is the first hook of a run, before loggers connect and weights are loaded.

        Raises:
            ConfigError: the module is compiled, a class comes from another Lightning, or a callback or the
                strategy cannot do its work.
        """
        trainer: Any = self.trainer
        check_strategy(trainer)
        data = getattr(trainer, "datamodule", None)
        check_roots([self, data, trainer.strategy, *trainer.callbacks, *trainer.loggers])
        if self._compiler_ctx is not None:
            to_uncompiled(self)
            raise ConfigError(
                "the Trainer got torch.compile(module), whose steps take minutes to compile and fail at the "
                "hooks inside; give it the module itself: model.kernels holds what makes it fast"
            )
        for callback in trainer.callbacks:
            for kind, reason in REFUSED.items():
                if isinstance(callback, kind):
                    raise ConfigError(f"trainer.callbacks has {type(callback).__name__}: {reason}")
        guard_loggers(trainer)
        return []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Does nothing: the rollout callback samples, scores and logs."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Does nothing: the rollout callback samples, scores and logs."""

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads weights; first the model, where it was trained in another process and is not here.

        `ddp_notebook` and `ddp_spawn` train in children and hand the weights back this way.
        """
        if self.policy is None:
            self.configure_model()
        return super().load_state_dict(state_dict, *args, **kwargs)

    @explains("train")
    def backward(self, *args: Any, **kwargs: Any) -> None:
        """Computes gradients."""
        super().backward(*args, **kwargs)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Steps; notes if this fails when some of what it changes has changed and the rest has not."""
        before: list[int] = []

        def run() -> Any:
            loss = optimizer_closure()
            before[:] = self._versions()
            return loss

        with explained(self.trainer, "train"):
            try:
                super().optimizer_step(epoch, batch_idx, optimizer, run)
            except BaseException:
                self.half_updated = bool(before) and before != self._versions()
                raise

    def _versions(self) -> list[int]:
        """Returns how often each weight and each moment has been written to: torch counts on the host."""
        moments = [x for o in self.trainer.optimizers for state in o.state.values() for x in state.values()]
        return [x._version for x in (*self.policy.trainable().values(), *moments) if isinstance(x, Tensor)]
