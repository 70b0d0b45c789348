"""Validation: rollouts of held-out prompts with their own sampling, as means over all ranks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from torchmetrics import Metric, MetricCollection

from grpo_lightning.callbacks.validation_metrics import ColumnMean, check_metric, inputs
from grpo_lightning.errors import ConfigError, choices, hinted
from grpo_lightning.rollout.collector import Rollout
from grpo_lightning.types import SamplingParams
from grpo_lightning.utils.ranges import check_numbers


@hinted
@dataclass(frozen=True)
class ValidationConfig:
    """How held-out prompts are sampled and when a completion passes.

    Args:
        num_generations: completions per prompt; more than one needs a temperature above 0.
        sampling: null is greedy, otherwise as in training.
        pass_reward: name of the reward that decides whether a completion passes; null is the first.
        pass_threshold: a completion passes if that reward is at least this.
        before_training: run the Trainer's validation before the first step too, within its limits.
        metrics: your own torchmetrics by name, logged as val/NAME, e.g. {pass@4: {class_path:
            grpo_lightning.callbacks.PassAtK, init_args: {k: 4}}}; see `callbacks/validation_metrics.py`.
    """

    num_generations: int = 1
    sampling: SamplingParams | None = None
    pass_reward: str | None = None
    pass_threshold: float = 1.0
    before_training: bool = False
    metrics: dict[str, Metric] | None = None

    def __post_init__(self) -> None:
        check_numbers("rollout.validation", self)
        greedy = self.sampling is None or self.sampling.temperature == 0
        if self.num_generations < 1 or (greedy and self.num_generations > 1):
            raise ConfigError(
                f"rollout.validation.num_generations is {self.num_generations}; it must be 1 for greedy "
                f"sampling, "
                "or set rollout.validation.sampling.temperature above 0"
            )


@runtime_checkable
class Notes(Protocol):
    """A callback that keeps curves; `callback_metrics` would not say at which step a value is of."""

    def note(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of one step."""
        ...


def note(trainer: pl.Trainer, step: int, metrics: Mapping[str, Any]) -> None:
    """Gives callbacks that keep curves what has just been measured of a step."""
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(callback, Notes):
            callback.note(step, metrics)


class Evaluation:
    """Running means of one pass over held-out prompts."""

    def __init__(self, config: ValidationConfig, names: list[str]) -> None:
        self.config = config
        if config.pass_reward is not None and config.pass_reward not in names:
            raise ConfigError(f"rollout.validation.pass_reward is {choices(config.pass_reward, names)}")
        self.judge = names.index(config.pass_reward) if config.pass_reward else 0
        own = {
            "reward": ColumnMean("reward"),
            "pass@1": ColumnMean("passed"),
            "completions/mean_length": ColumnMean("lengths"),
            **{f"rewards/{name}/mean": ColumnMean("rewards", k) for k, name in enumerate(names)},
        }
        if taken := own.keys() & (config.metrics or {}).keys():
            raise ConfigError(
                f"rollout.validation.metrics has {min(taken)!r}, a name of ours; take another, e.g. "
                f"{f'my/{min(taken)}'!r}"
            )
        for name, metric in (config.metrics or {}).items():
            check_metric(f"rollout.validation.metrics.{name}", metric, config.num_generations)
        every: dict[str, Any] = own | (config.metrics or {})
        self.keys = list(every)
        # By number: the name of a reward function may have a dot, the name of a module none.
        self.metrics = MetricCollection({str(i): every[k] for i, k in enumerate(every)}, compute_groups=False)
        self.logged = {f"{stage}/{key}" for stage in ("val", "test") for key in every}

    def update(self, rollout: Rollout) -> None:
        """Adds a batch."""
        lengths = [len(c.token_ids) for group in rollout.completions for c in group]
        if not lengths:
            return
        sizes = [len(group) for group in rollout.completions]
        columns = inputs(rollout.scores, lengths, sizes, self.judge, self.config.pass_threshold)
        device = self.metrics["0"].device
        self.metrics.update(**{name: column.to(device) for name, column in columns.items()})

    def compute(self, prefix: str, device: torch.device) -> dict[str, float]:
        """Returns the means over all ranks and starts anew."""
        found = self.metrics.to(device).compute()
        self.metrics.reset()
        out: dict[str, float] = {}
        for i, key in enumerate(self.keys):
            value = torch.as_tensor(found.get(str(i), torch.zeros(0)))
            if value.numel() != 1:
                kind = type(self.metrics[str(i)]).__name__
                raise ConfigError(
                    f"rollout.validation.metrics {key!r} ({kind}) does not compute one number; "
                    "take one metric for each number"
                )
            out[f"{prefix}/{key}"] = float(value)
        return {key: value for key, value in out.items() if value == value}

    def log(self, trainer: pl.Trainer, module: Any, prefix: str) -> None:
        """Logs the means, where ModelCheckpoint and EarlyStopping find them."""
        metrics = self.compute(prefix, module.device)
        module.log_dict(metrics, batch_size=1)
        if not trainer.sanity_checking:
            note(trainer, trainer.global_step, metrics)


def validate_before_training(trainer: pl.Trainer) -> None:
    """Runs the validation loop of the fit, with all limits, callbacks and loggers it has later on; prints.

    Raises:
        ConfigError: there is no validation data; `trainer.limit_val_batches: 0` switches validation off.
    """
    if trainer.limit_val_batches == 0:
        return
    loop = trainer.fit_loop.epoch_loop.val_loop
    if trainer.enable_validation:
        trainer.validating = True
        loop.run()
        trainer.training = True
    if loop.skip:
        raise ConfigError(
            "rollout.validation.before_training is set, but there is no validation data: set "
            "data.validation_split"
        )
    if trainer.is_global_zero:
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        print("before training: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()), flush=True)
