"""The loss of one micro-batch: surrogate x ratio level x aggregation, corrections, KL and entropy."""

from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from grpo_lightning.errors import ConfigError
from grpo_lightning.losses.aggregations import AGGREGATIONS
from grpo_lightning.losses.completion_sums import Segments
from grpo_lightning.losses.config import LossConfig
from grpo_lightning.losses.corrections import correction_weights, off_policy_keep
from grpo_lightning.losses.kl import KL_ESTIMATORS
from grpo_lightning.losses.ratios import MAX_LOG_RATIO, RATIO_LEVELS
from grpo_lightning.losses.surrogate_metrics import clip_stats, surrogate_stats
from grpo_lightning.metrics.reduce import Stat, reduced
from grpo_lightning.packing.batch import RolloutBatch


class Weights(TypedDict, total=False):
    """The arguments of `policy_loss` that follow what they control."""

    kl_coef: float
    entropy_coef: float


@dataclass(frozen=True, slots=True)
class LossOutput:
    """`loss`: this micro-batch's share of the step's loss, with gradient; `stats`: what is logged."""

    loss: Tensor
    stats: dict[str, Stat]


class LossGrad(NamedTuple):
    """A micro-batch's share of the step's loss with its derivatives, none of them attached to a graph."""

    loss: Tensor  # scalar
    dlogprobs: Tensor  # [N] d loss / d logprobs, in 1 / nats
    dentropy: Tensor | None  # [N] d loss / d entropy; None: the loss does not depend on it
    stats: dict[str, Stat]


def policy_loss(
    logprobs: Tensor,
    batch: RolloutBatch,
    config: LossConfig,
    entropy: Tensor | None = None,
    *,
    kl_coef: float | None = None,
    entropy_coef: float | None = None,
) -> LossOutput:
    """Returns sum_n w_n (c_n l_n + kl_coef KL_n) - entropy_coef mean_step(H), and its statistics.

    The shares of all micro-batches of an optimizer step, on all ranks, add up to its loss. Lightning divides
    by accumulated batches and DDP averages over ranks: return `batch.normalizers.micro_batches * loss`.

    Args:
        logprobs: [N] of the policy being trained, with gradient, in nats.
        batch: one micro-batch. Where `old_logprobs` is None the ratio is 1 with the gradient of `logprobs`.
        config: the recipe.
        entropy: [N] in nats, of the same forward; needed for an entropy bonus.
        kl_coef: in place of the config's, where it is adapted from step to step.
        entropy_coef: the same for the entropy bonus.

    Raises:
        ValueError: the batch lacks what the config needs: `ref_logprobs`, an entropy, a selection.
        ConfigError: advantages differ within completions, and the loss needs one for each.
    """
    config = config.resolve()
    _check(batch, config)
    segments = Segments.of(batch)
    kl_coef = config.kl_coef if kl_coef is None else kl_coef
    entropy_coef = config.entropy_coef if entropy_coef is None else entropy_coef
    old, bypass = _old(logprobs, batch, config)
    log_ratio = (logprobs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = RATIO_LEVELS[str(config.ratio_level)](log_ratio, segments)
    weights = AGGREGATIONS[str(config.aggregation)].weights(segments, batch.normalizers).to(logprobs.dtype)
    sampled_by = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    correction, stats = correction_weights(sampled_by, batch, segments, config.correction)
    advantages = batch.advantages.to(logprobs.dtype)
    inputs: dict[str, Any] = {
        "ratio": ratio,
        "advantages": advantages,
        "logprobs": logprobs,
        "log_ratio": log_ratio,
        "old_logprobs": old,
        "correction": correction,
        "selected": batch.selected,
        "segments": segments,
        "config": config,
    }
    objective = config.surrogate_row(**inputs)
    if config.surrogate_row.whole_groups:
        loss = objective / max(batch.normalizers.groups, 1)
    else:
        keep, kept = _keep(logprobs, old, batch, segments, config)
        stats |= kept
        factor = keep if config.surrogate_row.folds_correction or bypass else keep * correction
        loss = (weights * factor * objective).sum()
    stats |= clip_stats(ratio.detach(), advantages, segments, config)
    stats |= surrogate_stats(inputs, segments, config)
    if config.kl_coef and (kl := _kl(logprobs, batch, config, ratio)) is not None:
        stats["kl"] = segments.token_mean(kl)
        if config.kl_in == "loss":
            loss = loss + kl_coef * (weights * kl).sum()
    loss, more = _with_entropy(loss, entropy, entropy_coef, batch, segments)
    return LossOutput(loss, stats | more | {"loss": reduced("sum", loss)})


def _check(batch: RolloutBatch, config: LossConfig) -> None:
    if batch.token_advantages and (reason := config.needs_completion_advantages):
        raise ConfigError(
            f"model.loss: {reason} needs one advantage for each completion, and this batch has one for each "
            "token; take model.loss.name: dapo or another loss of tokens"
        )
    if config.surrogate_row.needs_old and batch.selected is None:
        raise ValueError(
            f"{config.surrogate} needs the optimizer step's selection, made from old log-probabilities"
        )


def _old(logprobs: Tensor, batch: RolloutBatch, config: LossConfig) -> tuple[Tensor, bool]:
    """Returns the log-probabilities that the ratio is taken against, and whether they are the engine's."""
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    if config.correction.bypass and batch.sampler_logprobs is not None:
        return torch.where(torch.isfinite(batch.sampler_logprobs), batch.sampler_logprobs, old), True
    return old, False


def _keep(
    logprobs: Tensor, old: Tensor, batch: RolloutBatch, segments: Segments, config: LossConfig
) -> tuple[Tensor, dict[str, Stat]]:
    """Returns which tokens [N] train: off-policy completions and low-entropy tokens may not."""
    keep, stats = torch.ones_like(old), {}
    if config.off_policy_threshold is not None:
        keep, stats = off_policy_keep(logprobs.detach(), old, batch, segments, config.off_policy_threshold)
    if config.top_entropy_quantile < 1:
        if batch.entropy_keep is None:
            raise ValueError(
                "top_entropy_quantile needs the optimizer step's selection, made from old entropies"
            )
        keep = keep * batch.entropy_keep.to(keep.dtype)
    return keep, stats


def _kl(logprobs: Tensor, batch: RolloutBatch, config: LossConfig, ratio: Tensor) -> Tensor | None:
    """Returns the estimate [N] of the divergence; None if it is neither in the loss nor known."""
    if batch.ref_logprobs is None:
        if config.kl_in == "reward":
            return None
        raise ValueError(f"kl_coef is {config.kl_coef} but the batch carries no ref_logprobs")
    x = (batch.ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    estimator = KL_ESTIMATORS[str(config.kl_estimator)]
    kl = estimator.value(x)
    return ratio * kl if config.kl_bias_correction and estimator.correctable else kl


def _with_entropy(
    loss: Tensor, entropy: Tensor | None, coefficient: float, batch: RolloutBatch, segments: Segments
) -> tuple[Tensor, dict[str, Stat]]:
    """Returns the loss less the entropy bonus, a mean over the optimizer step's tokens for every recipe."""
    if entropy is None:
        if coefficient:
            raise ValueError("entropy_coef is set but no entropy was given")
        return loss, {}
    stats = {"entropy": segments.token_mean(entropy)}
    if not coefficient:
        return loss, stats
    kept = entropy if batch.entropy_keep is None else entropy * batch.entropy_keep.to(entropy.dtype)
    count = batch.normalizers.tokens if batch.entropy_keep is None else batch.normalizers.entropy_tokens
    stats["policy_loss"] = reduced("sum", loss)
    return loss - coefficient * kept.sum() / max(count, 1), stats
