"""What is logged of a rollout: ours, over all ranks, and what reward functions gave to `log_metric`."""

from collections.abc import Collection, Mapping
from typing import Any

import lightning.pytorch as pl

from grpo_lightning.callbacks.evaluation import note
from grpo_lightning.callbacks.step_timing import Clock
from grpo_lightning.errors import ConfigError
from grpo_lightning.metrics.logging import log_numbers, over_ranks
from grpo_lightning.metrics.reduce import mean_of, reduced
from grpo_lightning.rewards.suite import Scores
from grpo_lightning.rollout.collector import Rollout

PROGRESS = {"reward", "completions/mean_length"}
"""metrics that the progress bar shows"""
_OF_LOGGERS = {"step", "epoch"}
"""what Lightning's loggers take for the axis"""


class RolloutMetrics:
    """Logs rollouts; keeps the tokens of the run and what reward functions have logged last.

    Args:
        clock: learns how long the phases of a rollout took.
        reserved: names that are logged later on.
    """

    def __init__(self, clock: Clock, reserved: Collection[str]) -> None:
        self.num_tokens = 0.0
        self._clock, self._reserved = clock, reserved
        self._of_rewards: dict[str, float] = {}

    def log(
        self, trainer: pl.Trainer, module: Any, rollout: Rollout, dropped: int, seconds: Mapping[str, float]
    ) -> None:
        """Logs a rollout at the optimizer step that it is made for.

        Args:
            trainer: whose callbacks that keep curves are told, too.
            module: logs.
            rollout: of this rank.
            dropped: groups that were taken out of it.
            seconds: of the phases that the rollout itself does not know.

        Raises:
            ConfigError: a reward function logs under a name that something else is logged under.
        """
        own = {f"time/{name}": mean_of([s]) for name, s in seconds.items()}
        own["rollout/dropped_groups"] = reduced("sum", float(dropped))
        metrics = over_ranks(rollout.stats | own)
        self._clock.add_rollout(metrics, metrics["num_tokens"])
        self.num_tokens += metrics["num_tokens"]
        metrics["num_tokens"] = self.num_tokens
        self._check(rollout.scores, {*metrics, *self._reserved, *_OF_LOGGERS}, trainer.callback_metrics)
        theirs = over_ranks({name: mean_of([x]) for name, x in rollout.scores.metrics.items()})
        self._of_rewards |= theirs
        log_numbers(module, metrics | theirs, shown=PROGRESS)
        note(trainer, trainer.global_step + 1, metrics)

    def _check(self, scores: Scores, ours: Collection[str], latest: Mapping[str, Any]) -> None:
        """Raises if a name is ours, or has a value that no reward function gave it."""
        for name in scores.metrics:
            if name in ours or (name in latest and float(latest[name]) != self._of_rewards.get(name)):
                owner = scores.logged_by[name]
                raise ConfigError(
                    f"reward function {owner!r} calls log_metric({name!r}, ...), but {name!r} is the name of "
                    f"another metric of this run; take another one, e.g. {f'{owner}/{name}'!r}"
                )
