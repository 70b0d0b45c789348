"""The loss of one micro-batch: surrogate x ratio level x aggregation, plus KL and entropy."""

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_lightning.batch import RolloutBatch
from grpo_lightning.losses.aggregations import AGGREGATIONS
from grpo_lightning.losses.config import LossConfig
from grpo_lightning.losses.kl import KL_ESTIMATORS
from grpo_lightning.losses.ratios import MAX_LOG_RATIO, RATIO_LEVELS
from grpo_lightning.losses.segments import Segments
from grpo_lightning.losses.surrogates import SURROGATES
from grpo_lightning.stats import Stat, extreme, mean


@dataclass(frozen=True, slots=True)
class LossOutput:
    """`loss`: this micro-batch's share of the window's loss, with gradient; `stats`: what is logged."""

    loss: Tensor
    stats: dict[str, Stat]


def policy_loss(
    logprobs: Tensor, batch: RolloutBatch, config: LossConfig, entropy: Tensor | None = None
) -> LossOutput:
    """Returns sum_n w_n (l_n + kl_coef KL_n) - entropy_coef mean_window(H), and its statistics.

    The shares of all micro-batches of a window, on all ranks, add up to its loss. Lightning
    divides by accumulated batches and DDP averages over ranks, so return `batch.totals.micro_batches * loss`.

    Args:
        logprobs: [N] of the policy being trained, with gradient, in nats.
        batch: one micro-batch. Where `old_logprobs` is None the ratio is 1 with the gradient of `logprobs`.
        config: the recipe.
        entropy: [N] in nats, of the same forward; needed if `entropy_coef` is not 0.

    Raises:
        ValueError: `kl_coef` is not 0 and the batch has no `ref_logprobs`, or the entropy is missing.
    """
    config = config.resolve()
    segments = Segments.of(batch)
    advantages = segments.spread(batch.advantages.to(logprobs.dtype))
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    log_ratio = (logprobs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = RATIO_LEVELS[str(config.ratio_level)](log_ratio, segments)
    per_token = SURROGATES[str(config.surrogate)](
        ratio=ratio,
        advantages=advantages,
        logprobs=logprobs,
        log_ratio=log_ratio,
        segments=segments,
        config=config,
    )
    stats = _clip_stats(ratio.detach(), advantages, segments, config) | _sampler_stats(old, batch)
    if config.kl_coef:
        kl = _kl(logprobs, batch, config, ratio)
        per_token = per_token + config.kl_coef * kl
        stats["kl"] = mean(kl.sum(), kl.numel())
    weights = AGGREGATIONS[str(config.aggregation)].weights(segments, batch.totals)
    loss = (weights.to(per_token.dtype) * per_token).sum()
    if entropy is not None:
        stats["entropy"] = mean(entropy.sum(), entropy.numel())
    if config.entropy_coef:
        if entropy is None:
            raise ValueError("entropy_coef is set but no entropy was given")
        loss = loss - config.entropy_coef * entropy.sum() / max(batch.totals.tokens, 1)
    stats["loss"] = extreme("sum", loss)
    return LossOutput(loss, stats)


def _kl(logprobs: Tensor, batch: RolloutBatch, config: LossConfig, ratio: Tensor) -> Tensor:
    if batch.ref_logprobs is None:
        raise ValueError(f"kl_coef is {config.kl_coef} but the batch carries no ref_logprobs")
    x = (batch.ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    kl = KL_ESTIMATORS[config.kl_estimator](x)
    return ratio * kl if config.kl_bias_correction else kl


def _clip_stats(ratio: Tensor, advantages: Tensor, segments: Segments, config: LossConfig) -> dict[str, Stat]:
    """How often the clip is active: TRL's names; minima and maxima run over the means of completions."""
    assert config.clip_low is not None
    assert config.clip_high is not None
    low = ((ratio < 1 - config.clip_low) & (advantages < 0)).to(ratio.dtype)
    high = ((ratio > 1 + config.clip_high) & (advantages > 0)).to(ratio.dtype)
    present = segments.lengths > 0
    if config.ratio_level == "token":
        shares = [(x.sum(), x.numel()) for x in (low, high, low + high)]
    else:
        shares = [(segments.mean(x)[present].sum(), present.sum()) for x in (low, high, low + high)]
    stats = {
        f"clip_ratio/{name}_mean": mean(total, count)
        for name, (total, count) in zip(("low", "high", "region"), shares, strict=True)
    }
    if ratio.numel():
        stats["clip_ratio/low_min"] = extreme("min", segments.mean(low)[present].min())
        stats["clip_ratio/high_max"] = extreme("max", segments.mean(high)[present].max())
    return stats


def _sampler_stats(old: Tensor, batch: RolloutBatch) -> dict[str, Stat]:
    """How far the engine's policy is from the trainer's on the sampled tokens, in nats."""
    if batch.sampler_logprobs is None or not old.numel():
        return {}
    gap = (old.detach() - batch.sampler_logprobs).abs()
    known = gap[torch.isfinite(gap)]
    name = "sampling/sampling_logp_difference"
    stats = {f"{name}/mean": mean(known.sum(), known.numel())}
    return stats | ({f"{name}/max": extreme("max", known.max())} if known.numel() else {})
