"""Surrogates of whole completions, or of the rest of one."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grpo_lightning.losses.completion_sums import Segments
from grpo_lightning.losses.surrogate_table import register_surrogate
from grpo_lightning.losses.surrogates.clipped import TOKEN, either, ppo_clip
from grpo_lightning.losses.surrogates.options import ClipOptions, SurrogateOptions
from grpo_lightning.utils.ranges import Bound, not_negative, positive


@dataclass(frozen=True, kw_only=True)
class VespoOptions(SurrogateOptions):
    """Options of vespo.

    Args:
        vespo_k_pos: shape of vespo's weight where A >= 0.
        vespo_lambda_pos: rate of vespo's weight where A >= 0.
        vespo_k_neg: shape where A < 0.
        vespo_lambda_neg: rate where A < 0.
    """

    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    def bounds(self) -> list[Bound]:
        """Returns what each option has to be."""
        return not_negative(self, "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")


@register_surrogate(
    "vespo",
    levels=TOKEN,
    formula="-sg(phi) A l, phi = exp(lambda + k u - lambda e^u), u = sum over the completion of d + log c",
    paper="2602.10693",
    folds_correction=True,
    still_at_zero=True,
    completion_advantages=True,
)
def vespo(
    log_ratio: Tensor,
    advantages: Tensor,
    logprobs: Tensor,
    correction: Tensor,
    segments: Segments,
    options: VespoOptions,
) -> Tensor:
    """Returns REINFORCE with a gamma-shaped weight of the whole completion's ratio."""
    return (
        -segments.spread(vespo_phi(log_ratio, advantages, correction, segments, options))
        * advantages
        * logprobs
    )


def vespo_phi(
    log_ratio: Tensor, advantages: Tensor, correction: Tensor, segments: Segments, options: VespoOptions
) -> Tensor:
    """Returns phi [S], without gradient; non-finite values become 0."""
    floor = -18.420680743952367  # ln 1e-8
    u = segments.sum(log_ratio.detach() + correction.log().clamp(floor, 20.0)).clamp(floor, 20.0)
    up = segments.mean(advantages) >= 0
    k = either(up, options.vespo_k_pos, options.vespo_k_neg, u)
    rate = either(up, options.vespo_lambda_pos, options.vespo_lambda_neg, u).clamp(min=1e-4)
    return torch.exp(rate + k * u - rate * u.exp()).nan_to_num(0.0, posinf=0.0)


@dataclass(frozen=True, kw_only=True)
class GmpoOptions(SurrogateOptions):
    """Options of gmpo.

    Args:
        log_clip_low: gmpo's clip of the log-ratio below.
        log_clip_high: gmpo's clip of the log-ratio above.
    """

    log_clip_low: float = 0.4
    log_clip_high: float = 0.4
    may_be_infinite: ClassVar[tuple[str, ...]] = ("log_clip_low", "log_clip_high")

    def bounds(self) -> list[Bound]:
        """Returns what each option has to be."""
        return not_negative(self, "log_clip_low", "log_clip_high")


@register_surrogate(
    "gmpo",
    levels=TOKEN,
    formula="-A exp(mean over the completion of e), e = d, clipped in log space where that is pessimistic",
    paper="2507.20673",
    still_at_zero=True,
    completion_advantages=True,
)
def gmpo(log_ratio: Tensor, advantages: Tensor, segments: Segments, options: GmpoOptions) -> Tensor:
    """Returns the geometric mean of token ratios, each clipped in log space."""
    clipped = log_ratio.clamp(-options.log_clip_low, options.log_clip_high)
    e = torch.where(advantages > 0, torch.minimum(log_ratio, clipped), torch.maximum(log_ratio, clipped))
    return -advantages * segments.spread(segments.mean(e).exp())


@dataclass(frozen=True, kw_only=True)
class FipoOptions(ClipOptions):
    """Options of fipo, beside those of the clip.

    Args:
        fipo_gamma: discount of fipo's look ahead, per token.
        fipo_range: fipo weighs up to 1 + this.
        fipo_rho_max: where A < 0, fipo does not weigh up tokens whose ratio is above it.
    """

    fipo_gamma: float = 2 ** (-1 / 32)
    fipo_range: float = 0.2
    fipo_rho_max: float = 10.0
    may_be_infinite: ClassVar[tuple[str, ...]] = ("fipo_rho_max",)

    def bounds(self) -> list[Bound]:
        """Returns what each option has to be."""
        return [
            ("fipo_gamma", 0 < self.fipo_gamma <= 1, "in (0, 1]"),
            *not_negative(self, "fipo_range"),
            *positive(self, "fipo_rho_max"),
        ]


@register_surrogate(
    "fipo",
    levels=TOKEN,
    formula="f ppo_clip, f = clip(exp F, 1, 1 + fipo_range), F = discounted sum of the d from here on, "
    "of tokens that the dual clip leaves; f = 0 in completions where it acts on several tokens",
    paper="2603.19835",
    still_at_zero=True,
)
def fipo(
    ratio: Tensor, log_ratio: Tensor, advantages: Tensor, segments: Segments, options: FipoOptions
) -> Tensor:
    """Returns PPO's objective, weighted up where the rest of the completion has become more likely."""
    down, fixed = advantages < 0, ratio.detach()
    cut = fixed > (options.dual_clip or options.fipo_rho_max)  # where the dual clip leaves no gradient
    future = segments.discounted_rest(log_ratio.detach().masked_fill(cut, 0.0), options.fipo_gamma)
    factor = future.exp().clamp(1.0, 1.0 + options.fipo_range)
    factor = torch.where(down & (fixed > options.fipo_rho_max), factor.clamp(0.8, 1.0), factor)
    dropped = segments.spread(segments.sum((down & cut).to(ratio.dtype)) > 1)
    return factor.masked_fill(dropped, 0.0) * ppo_clip(ratio, advantages, options)


@dataclass(frozen=True, kw_only=True)
class RealOptions(SurrogateOptions):
    """Options of real.

    Args:
        real_tau: temperature of real's scores.
    """

    real_tau: float = 0.5

    def bounds(self) -> list[Bound]:
        """Returns what each option has to be."""
        return positive(self, "real_tau")


@register_surrogate(
    "real",
    levels=TOKEN,
    formula="per group: log(1 + sum_{A>0} e^(-s/tau)) + log(1 + sum_{A<=0} e^(s/tau)), s = mean d",
    paper="2602.05630",
    whole_groups=True,
    completion_advantages=True,
)
def real(log_ratio: Tensor, advantages: Tensor, segments: Segments, options: RealOptions) -> Tensor:
    """Returns the sum over two-class groups of a classification loss on sequence scores, a scalar."""
    present = segments.lengths > 0
    score = segments.mean(log_ratio) / options.real_tau
    good = (segments.mean(advantages) > 0) & present
    bad = ~good & present
    zero = score * 0
    ups = segments.group_sum(torch.where(good, (-score).exp(), zero))
    downs = segments.group_sum(torch.where(bad, score.exp(), zero))
    both = (segments.group_sum(good.to(score.dtype)) > 0) & (segments.group_sum(bad.to(score.dtype)) > 0)
    return torch.where(both, torch.log1p(ups) + torch.log1p(downs), ups * 0).sum()
