"""What the surrogates report about themselves; TRL's metric names."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from grpo_lightning.losses.completion_sums import Segments
from grpo_lightning.losses.config import LossConfig
from grpo_lightning.losses.surrogates.completions import vespo_phi
from grpo_lightning.losses.surrogates.divergence import DPPO_KEEP
from grpo_lightning.metrics.reduce import Stat, reduced


def clip_stats(ratio: Tensor, advantages: Tensor, segments: Segments, config: LossConfig) -> dict[str, Stat]:
    """How often the clip is active; minima and maxima run over the means of completions."""
    clip_low, clip_high = config.clip_range
    low = ((ratio < 1 - clip_low) & (advantages < 0)).to(ratio.dtype)
    high = ((ratio > 1 + clip_high) & (advantages > 0)).to(ratio.dtype)
    present = segments.lengths > 0
    shares = {"low": low, "high": high, "region": low + high}
    stats = {f"clip_ratio/{name}_mean": _share(x, segments, config) for name, x in shares.items()}
    if ratio.numel():
        stats["clip_ratio/low_min"] = reduced("min", segments.mean(low)[present].min())
        stats["clip_ratio/high_max"] = reduced("max", segments.mean(high)[present].max())
    return stats


def _share(x: Tensor, segments: Segments, config: LossConfig) -> Stat:
    """Returns the mean of x [N] over what has a ratio of its own: tokens, or completions."""
    if config.ratio_level == "token":
        return segments.token_mean(x)
    return segments.completion_mean(segments.mean(x), segments.lengths > 0)


def _cispo(i: Mapping[str, Any], s: Segments, c: LossConfig) -> dict[str, Stat]:
    hit = (i["ratio"].detach() > c.cispo_weight_max) & (i["advantages"] > 0)
    return {"cispo_clip_ratio": _share(hit.to(i["ratio"].dtype), s, c)}


def _vespo(i: Mapping[str, Any], s: Segments, c: LossConfig) -> dict[str, Stat]:
    phi = vespo_phi(i["log_ratio"], i["advantages"], i["correction"], s, c)
    return {"vespo/phi_seq_mean": s.completion_mean(phi, s.lengths > 0)}


def _dppo(i: Mapping[str, Any], s: Segments, c: LossConfig) -> dict[str, Stat]:
    keep = DPPO_KEEP[str(c.surrogate)](i["advantages"], i["logprobs"], i["old_logprobs"], c)
    return {"dppo/dropped_token_frac": s.token_mean((~keep).to(i["ratio"].dtype))}


def _cov(i: Mapping[str, Any], s: Segments, c: LossConfig) -> dict[str, Stat]:
    return {"cov/selected_frac": s.token_mean(i["selected"].to(i["ratio"].dtype))}


_OF_SURROGATE = {
    "cispo": _cispo,
    "vespo": _vespo,
    "dppo_tv": _dppo,
    "dppo_kl": _dppo,
    "clip_cov": _cov,
    "kl_cov": _cov,
}


def surrogate_stats(inputs: Mapping[str, Any], segments: Segments, config: LossConfig) -> dict[str, Stat]:
    """Returns what only this surrogate has to report."""
    report = _OF_SURROGATE.get(str(config.surrogate))
    return {} if report is None else report(inputs, segments, config)
