"""Corrections for what the sampler was not: importance weights, and completions or tokens that are left out.

All of it is without gradient, and none of it changes the weights of an aggregation: what is dropped keeps its
place in the denominator.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_lightning.errors import ConfigError, choices, hinted
from grpo_lightning.losses.completion_sums import Segments
from grpo_lightning.losses.ratios import MAX_LOG_RATIO
from grpo_lightning.metrics.reduce import Stat, effective_share, reduced
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.utils.ranges import check_numbers


@dataclass(frozen=True, slots=True)
class Level:
    """A row of `LEVELS`."""

    log_statistic: Callable[[Tensor, Segments], Tensor]
    """[N] -> [N] nats: the logarithm of what is bounded"""
    per_token: bool = False


LEVELS: dict[str, Level] = {
    "token": Level(lambda m, s: m, per_token=True),
    "sequence": Level(lambda m, s: s.spread(s.sum(m).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))),
    "geometric": Level(lambda m, s: s.spread(s.mean(m))),
}
"""`sequence` is the product over a completion, `geometric` its mean"""

Bounds = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Mode:
    """A row of `MODES`."""

    weights: Callable[[Tensor, Tensor, Bounds], Tensor]
    """from the statistic, the token's own weight and the bounds, each [N]"""
    per_token: bool = False
    """whether the weight is the token's own, whatever the level"""


MODES: dict[str, Mode] = {
    "truncate": Mode(lambda q, token, b: q.clamp(*b)),
    "mask": Mode(lambda q, token, b: torch.where((q >= b[0]) & (q <= b[1]), q, 0.0)),
    "gate": Mode(lambda q, token, b: torch.where((q >= b[0]) & (q <= b[1]), token, 0.0), per_token=True),
    "off": Mode(lambda q, token, b: torch.ones_like(q)),
}


@hinted
@dataclass(frozen=True)
class CorrectionConfig:
    """Importance weights between the engine's policy and the trainer's.

    Args:
        level: what is bounded: token, sequence (product over the completion) or geometric (its mean).
        mode: truncate, mask (0 outside the bounds), gate (the level decides, the token weight is used), off.
        low: lowest weight; null is no bound.
        high: highest weight; null is no bound.
        bypass: take the engine's log-probabilities as old ones; the clip then bounds the mismatch too.
    """

    level: str = "token"
    mode: str | bool = "truncate"
    low: float | None = None
    high: float | None = 2.0
    bypass: bool = False

    def __post_init__(self) -> None:
        if self.mode is False:  # what YAML makes of an unquoted off
            object.__setattr__(self, "mode", "off")
        for key, table in (("level", LEVELS), ("mode", MODES)):
            if (value := getattr(self, key)) not in table:
                raise ConfigError(f"model.loss.correction.{key} is {choices(value, table)}")
        check_numbers("model.loss.correction", self, may_be_infinite=("high",))
        low, high = self.bounds
        if low < 0:
            raise ConfigError(f"model.loss.correction.low is {self.low}; it must be null or >= 0")
        if self.mode != "off" and ((self.low is None and self.high is None) or not low < high):
            raise ConfigError(
                f"model.loss.correction has low {self.low} and high {self.high}; give one of them, low < high"
            )

    @property
    def active(self) -> bool:
        """Whether tokens are weighed."""
        return self.mode != "off" and not self.bypass

    @property
    def bounds(self) -> Bounds:
        """The bounds, open where none is given."""
        return (0.0 if self.low is None else self.low, torch.inf if self.high is None else self.high)


PRESETS: dict[str, tuple[CorrectionConfig, str]] = {
    "tis": (CorrectionConfig(), "the default: no token counts more than twice"),
    "trl": (CorrectionConfig(level="sequence", mode="mask", high=3.0), "what TRL 1.16 does"),
    "icepop": (
        CorrectionConfig(mode="mask", low=0.5, high=5.0),
        "drops tokens that are far off (2510.18855)",
    ),
    "geometric": (
        CorrectionConfig(level="geometric", mode="gate", low=0.999, high=1.001),
        "drops completions that are off on average, whatever their length",
    ),
    "off": (CorrectionConfig(mode="off"), "trusts the engine"),
}
"""corrections with a name and when to use them; `configs/correction/` has an overlay for each"""


def correction_weights(
    old: Tensor, batch: RolloutBatch, segments: Segments, config: CorrectionConfig
) -> tuple[Tensor, dict[str, Stat]]:
    """Returns c [N] and its statistics; 1 where the engine reported nothing.

    Args:
        old: [N] log-probabilities of the trainer's policy that sampled, without gradient.
        batch: carries `sampler_logprobs`.
        segments: of the batch.
        config: level, mode and bounds.
    """
    sampler = batch.sampler_logprobs
    if sampler is None or not old.numel():
        return torch.ones_like(old), {}
    gap = old - sampler
    known = torch.isfinite(gap)
    m = torch.where(known, gap, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    level, mode = LEVELS[config.level], MODES[str(config.mode) if config.active else "off"]
    c = mode.weights(level.log_statistic(m, segments).exp(), m.exp(), config.bounds)
    present, weights = segments.lengths > 0, segments.weights
    dropped = (c == 0).to(c.dtype)
    whole = (segments.mean(dropped) == 1).to(c.dtype)
    stats = {
        "sampling/missing_logprob_frac": segments.token_mean((~known).to(c.dtype)),
        "sampling/sampling_logp_difference/mean": segments.token_mean(gap.abs(), known),
        "sampling/prob_error": segments.token_mean(m.abs().exp()),
        "sampling/ess": effective_share(c, None if weights is None else segments.spread(weights)),
        "sampling/dropped_token_frac": segments.token_mean(dropped),
        "sampling/dropped_sequence_frac": segments.completion_mean(whole, present),
    }
    if config.active:
        by_token = level.per_token or mode.per_token
        each = c if by_token else segments.mean(c)[present]
        name = "sampling/importance_sampling_ratio"
        stats[f"{name}/mean"] = (
            segments.token_mean(c) if by_token else segments.completion_mean(segments.mean(c), present)
        )
        stats[f"{name}/min"] = reduced("min", each.min())
        stats[f"{name}/max"] = reduced("max", each.max())
    if known.any():
        stats["sampling/sampling_logp_difference/max"] = reduced("max", gap[known].abs().max())
    return c, stats


def off_policy_keep(
    logprobs: Tensor, old: Tensor, batch: RolloutBatch, segments: Segments, threshold: float
) -> tuple[Tensor, dict[str, Stat]]:
    """Returns which tokens [N] stay: with A >= 0, or of completions whose policy moved little (2512.02556).

    Args:
        logprobs: [N] of the policy now, without gradient.
        old: [N], in place of log-probabilities that the engine did not report.
        batch: carries `sampler_logprobs` and advantages.
        segments: of the batch.
        threshold: highest mean of sampler minus policy over a completion, in nats per token.
    """
    sampler = old if batch.sampler_logprobs is None else batch.sampler_logprobs
    sampler = torch.where(torch.isfinite(sampler), sampler, old)
    near = segments.spread(segments.mean(sampler - logprobs) <= threshold)
    keep = ((batch.advantages >= 0) | near).to(logprobs.dtype)
    stats = {"off_policy/dropped_sequence_frac": segments.completion_mean(segments.mean(1 - keep))}
    return keep, stats
