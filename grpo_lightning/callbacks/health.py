"""`Health`: says in one line when a run is about to learn nothing, or to unlearn."""

from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from grpo_lightning.callbacks.alarms import ALARMS, Curve, History, repetition
from grpo_lightning.errors import ConfigError, GRPOError, choices
from grpo_lightning.metrics.logging import gather
from grpo_lightning.types import PromptBatch

LEVELS = ("warn", "stop", "off")
CLEARED = 0.2
"""share of its limit by which a statistic has to fall below it, before its alarm may speak again"""


class Health(Callback):
    """Watches what is logged, and speaks once when an alarm of the table in docs/health.md is reached.

    It speaks again once the alarm has cleared. Numbers are over all ranks, so that all stop together.

    Args:
        levels: of alarms by name: warn (the default), stop, which ends the run with an error, or off.
        limits: of alarms by name, other than those in the table.
    """

    def __init__(
        self,
        levels: dict[str, Literal["warn", "stop", "off"]] | None = None,
        limits: dict[str, float] | None = None,
    ) -> None:
        self.levels, self.limits = dict(levels or {}), dict(limits or {})
        for key, given in (("levels", self.levels), ("limits", self.limits)):
            for name in given:
                if name not in ALARMS:
                    raise ConfigError(f"health.{key}: {choices(name, ALARMS)}")
        for name, level in self.levels.items():
            if level not in LEVELS:
                raise ConfigError(f"health.levels.{name} is {choices(level, LEVELS)}")
        for name, limit in self.limits.items():
            if isinstance(limit, bool) or not isinstance(limit, int | float) or limit != limit:
                raise ConfigError(f"health.limits.{name} is {limit!r}; it must be a number")
        self.history = History()
        self.on: set[str] = set()
        """alarms that have spoken and not cleared"""
        self._step = -1

    def state_dict(self) -> dict[str, Any]:
        """Returns the curves and which alarms have spoken; plain types only."""
        curves = {k: [c.first, c.latest, c.count] for k, c in self.history.curves.items()}
        return {"curves": curves, "on": sorted(self.on)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self.history.curves = {k: Curve(*c) for k, c in state_dict["curves"].items()}
        self.on = set(state_dict["on"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reads how many prompts were left out."""
        self._step = trainer.global_step
        prompts = getattr(trainer.train_dataloader, "prompts", ())
        if dropped := getattr(prompts, "num_dropped", 0):
            self.history.add({"health/dropped_prompts": dropped / (dropped + len(prompts))})

    def note(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of a rollout, as soon as it is made."""
        self.history.add(metrics)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at a whole optimizer step. Numbers are on the host, but the norm, whose step has ended."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        metrics: Mapping[str, Any] = getattr(pl_module, "step_metrics", {})
        norm = {k: v for k, v in trainer.callback_metrics.items() if k == "grad_norm"}
        self.history.add(metrics)
        self.history.add(norm)
        if (
            isinstance(batch, PromptBatch)
            and batch.micro_batch + 1 == batch.micro_batches
            and batch.samples is not None
        ):
            self.history.add(_of_samples(batch.samples, trains=metrics.get("rollout/loss_tokens") != 0))
        self._speak(trainer.global_step)

    def _speak(self, step: int) -> None:
        for name, alarm in ALARMS.items():
            level, limit = self.levels.get(name, "warn"), self.limits.get(name, alarm.limit)
            value = None if level == "off" else alarm.statistic(self.history)
            if value is None or value < limit - CLEARED * abs(limit):
                self.on.discard(name)
            elif value >= limit and name not in self.on:
                self.on.add(name)
                seen = alarm.says(self.history, value)
                line = f"health: {name} at step {step}: {seen}. Usually {alarm.means}: {alarm.remedy}"
                if level == "stop":
                    raise GRPOError(f"{line}. The run ends here because health.levels.{name} is stop")
                rank_zero_warn(line)


def _of_samples(samples: Mapping[str, Any], *, trains: bool) -> dict[str, float]:
    """Returns what a rollout's samples say, over all ranks."""
    live = trains and any(x and x == x for x in samples["advantage"])
    ranks = gather((live, *repetition(samples["completion"])))
    total, count = sum(r[1] for r in ranks), sum(r[2] for r in ranks)
    found = {"health/signal": float(any(r[0] for r in ranks))}
    return found | ({"health/repetition": total / count} if count else {})
