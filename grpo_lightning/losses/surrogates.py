"""The rows of `SURROGATES`. A: advantages, rho: ratio, d: log-ratio, l: log-probability, sg: no gradient."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_lightning.losses.completion_sums import Segments
from grpo_lightning.losses.surrogate_table import register_surrogate

if TYPE_CHECKING:
    from grpo_lightning.losses.config import LossConfig

TOKEN = ("token",)
TOKEN_OR_SEQUENCE_TOKEN = ("token", "sequence_token")


def _either(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """Returns one of two numbers in the type of `like`; `torch.where` of two numbers would be fp32."""
    return torch.where(condition, like.new_tensor(yes), like.new_tensor(no))


@register_surrogate(
    "ppo_clip",
    formula="-min(min(rho, dual_clip) A, clip(rho, 1 - clip_low, 1 + clip_high) A)",
    paper="2402.03300",
    still_at_zero=True,
)
def ppo_clip(ratio: Tensor, advantages: Tensor, config: "LossConfig") -> Tensor:
    """Returns PPO's clipped objective; `dual_clip` bounds what a negative advantage can cost (1912.09729)."""
    low, high = config.clip_range
    free = ratio if config.dual_clip is None else ratio.clamp(max=config.dual_clip)
    return -torch.minimum(free * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


@register_surrogate("reinforce", formula="-A l", paper="2504.02546", still_at_zero=True)
def reinforce(advantages: Tensor, logprobs: Tensor) -> Tensor:
    """Returns the plain policy gradient; no ratio, no clip."""
    return -advantages * logprobs


@register_surrogate(
    "cispo",
    levels=TOKEN_OR_SEQUENCE_TOKEN,
    formula="-sg(clip(rho, cispo_weight_min, cispo_weight_max)) A l",
    paper="2506.13585",
    still_at_zero=True,
    meant_per_token=True,
)
def cispo(ratio: Tensor, advantages: Tensor, logprobs: Tensor, config: "LossConfig") -> Tensor:
    """Returns REINFORCE with a capped importance weight: every token keeps a gradient."""
    weight = ratio.detach().clamp(config.cispo_weight_min, config.cispo_weight_max)
    return -weight * advantages * logprobs


@register_surrogate(
    "sapo",
    levels=TOKEN_OR_SEQUENCE_TOKEN,
    formula="-A (4 / tau) sigmoid(tau (rho - 1)), tau = sapo_tau_pos if A > 0 else sapo_tau_neg",
    paper="2511.20347",
    still_at_zero=True,
    meant_per_token=True,
)
def sapo(ratio: Tensor, advantages: Tensor, config: "LossConfig") -> Tensor:
    """Returns a gate that closes smoothly on both sides instead of a clip."""
    tau = _either(advantages > 0, config.sapo_tau_pos, config.sapo_tau_neg, ratio)
    return -advantages * (4 / tau) * torch.sigmoid(tau * (ratio - 1))


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
    config: "LossConfig",
) -> Tensor:
    """Returns REINFORCE with a gamma-shaped weight of the whole completion's ratio."""
    return (
        -segments.spread(vespo_phi(log_ratio, advantages, correction, segments, config))
        * advantages
        * logprobs
    )


def vespo_phi(
    log_ratio: Tensor, advantages: Tensor, correction: Tensor, segments: Segments, config: "LossConfig"
) -> Tensor:
    """Returns phi [S], without gradient; non-finite values become 0."""
    floor = -18.420680743952367  # ln 1e-8
    u = segments.sum(log_ratio.detach() + correction.log().clamp(floor, 20.0)).clamp(floor, 20.0)
    up = segments.mean(advantages) >= 0
    k = _either(up, config.vespo_k_pos, config.vespo_k_neg, u)
    rate = _either(up, config.vespo_lambda_pos, config.vespo_lambda_neg, u).clamp(min=1e-4)
    return torch.exp(rate + k * u - rate * u.exp()).nan_to_num(0.0, posinf=0.0)


@register_surrogate(
    "gmpo",
    levels=TOKEN,
    formula="-A exp(mean over the completion of e), e = d, clipped in log space where that is pessimistic",
    paper="2507.20673",
    still_at_zero=True,
    completion_advantages=True,
)
def gmpo(log_ratio: Tensor, advantages: Tensor, segments: Segments, config: "LossConfig") -> Tensor:
    """Returns the geometric mean of token ratios, each clipped in log space."""
    clipped = log_ratio.clamp(-config.log_clip_low, config.log_clip_high)
    e = torch.where(advantages > 0, torch.minimum(log_ratio, clipped), torch.maximum(log_ratio, clipped))
    return -advantages * segments.spread(segments.mean(e).exp())


Keep = Callable[[Tensor, Tensor, Tensor, "LossConfig"], Tensor]
"""advantages, log-probabilities now and then, config -> which tokens [N] stay"""


def dppo_tv_keep(advantages: Tensor, logprobs: Tensor, old_logprobs: Tensor, config: "LossConfig") -> Tensor:
    """Returns which tokens [N] stay: their probability has moved little, in total variation."""
    low, high = config.dppo_range
    moved = logprobs.detach().exp() - old_logprobs.exp()
    return torch.where(advantages > 0, moved <= high, moved >= -low)


def dppo_kl_keep(advantages: Tensor, logprobs: Tensor, old_logprobs: Tensor, config: "LossConfig") -> Tensor:
    """Returns which tokens [N] stay: their probability has moved little, in binary KL divergence."""
    low, high = config.dppo_range
    new = logprobs.detach()
    p, p_old = new.exp(), old_logprobs.exp()
    rest = (1 - p_old) * torch.log((1 - p_old + 1e-8) / (1 - p + 1e-8))
    divergence = p_old * (old_logprobs - new) + rest
    up = (divergence <= high) | (p <= p_old)
    return torch.where(advantages > 0, up, (divergence <= low) | (p >= p_old))


DPPO_KEEP: dict[str, Keep] = {"dppo_tv": dppo_tv_keep, "dppo_kl": dppo_kl_keep}


def dppo(rule: Keep) -> Callable[..., Tensor]:
    """Returns the surrogate that is REINFORCE, with a capped weight, on the tokens that `rule` keeps."""

    def objective(
        ratio: Tensor, advantages: Tensor, logprobs: Tensor, old_logprobs: Tensor, config: "LossConfig"
    ) -> Tensor:
        keep = rule(advantages, logprobs, old_logprobs, config).to(ratio.dtype)
        weight = ratio.detach().clamp(max=config.dppo_weight_max) * keep
        return -weight * advantages * logprobs

    return objective


DPPO: dict[str, Any] = {
    "levels": TOKEN,
    "paper": "2602.04879",
    "required": ("dppo_low", "dppo_high"),
    "still_at_zero": True,
}
register_surrogate(
    "dppo_tv",
    formula="-sg(min(rho, dppo_weight_max) keep) A l, keep: p moved by at most dppo_low / dppo_high",
    defaults={"dppo_low": 0.15, "dppo_high": 0.15},
    **DPPO,
)(dppo(dppo_tv_keep))
register_surrogate(
    "dppo_kl",
    formula="as dppo_tv with the binary KL divergence in place of the total variation",
    defaults={"dppo_low": 0.05, "dppo_high": 0.05},
    **DPPO,
)(dppo(dppo_kl_keep))


@register_surrogate(
    "clip_cov",
    levels=TOKEN,
    formula="ppo_clip, without gradient on randomly selected tokens of high covariance",
    paper="2505.22617",
    needs_old=True,
    picks_at_random=True,
    still_at_zero=True,
)
def clip_cov(ratio: Tensor, advantages: Tensor, selected: Tensor, config: "LossConfig") -> Tensor:
    """Returns PPO's objective, 0 on the selected tokens."""
    return ppo_clip(ratio, advantages, config).masked_fill(selected, 0.0)


@register_surrogate(
    "kl_cov",
    levels=TOKEN,
    formula="-A rho, plus kl_cov_coef |d| on the tokens of highest covariance",
    paper="2505.22617",
    needs_old=True,
)
def kl_cov(
    ratio: Tensor, advantages: Tensor, log_ratio: Tensor, selected: Tensor, config: "LossConfig"
) -> Tensor:
    """Returns the unclipped objective with a penalty on the selected tokens."""
    return -advantages * ratio + config.kl_cov_coef * log_ratio.abs() * selected.to(ratio.dtype)


@register_surrogate(
    "dro", levels=TOKEN, formula="-(A l - dro_coef d^2 / 2)", paper="", required=("dro_coef",)
)
def dro(log_ratio: Tensor, advantages: Tensor, logprobs: Tensor, config: "LossConfig") -> Tensor:
    """Returns direct reward optimisation: REINFORCE with a quadratic pull to the old policy (as in verl)."""
    assert config.dro_coef is not None
    return -(advantages * logprobs - 0.5 * config.dro_coef * log_ratio**2)


@register_surrogate(
    "fipo",
    levels=TOKEN,
    formula="f ppo_clip, f = clip(exp F, 1, 1 + fipo_range), F = discounted sum of the d from here on, "
    "of tokens that the dual clip leaves; f = 0 in completions where it acts on several tokens",
    paper="2603.19835",
    still_at_zero=True,
)
def fipo(
    ratio: Tensor, log_ratio: Tensor, advantages: Tensor, segments: Segments, config: "LossConfig"
) -> Tensor:
    """Returns PPO's objective, weighted up where the rest of the completion has become more likely."""
    down, fixed = advantages < 0, ratio.detach()
    cut = fixed > (config.dual_clip or config.fipo_rho_max)  # where the dual clip leaves no gradient
    future = segments.discounted_rest(log_ratio.detach().masked_fill(cut, 0.0), config.fipo_gamma)
    factor = future.exp().clamp(1.0, 1.0 + config.fipo_range)
    factor = torch.where(down & (fixed > config.fipo_rho_max), factor.clamp(0.8, 1.0), factor)
    dropped = segments.spread(segments.sum((down & cut).to(ratio.dtype)) > 1)
    return factor.masked_fill(dropped, 0.0) * ppo_clip(ratio, advantages, config)


@register_surrogate(
    "real",
    levels=TOKEN,
    formula="per group: log(1 + sum_{A>0} e^(-s/tau)) + log(1 + sum_{A<=0} e^(s/tau)), s = mean d",
    paper="2602.05630",
    whole_groups=True,
    completion_advantages=True,
)
def real(log_ratio: Tensor, advantages: Tensor, segments: Segments, config: "LossConfig") -> Tensor:
    """Returns the sum over two-class groups of a classification loss on sequence scores, a scalar."""
    present = segments.lengths > 0
    score = segments.mean(log_ratio) / config.real_tau
    good = (segments.mean(advantages) > 0) & present
    bad = ~good & present
    zero = score * 0
    ups = segments.group_sum(torch.where(good, (-score).exp(), zero))
    downs = segments.group_sum(torch.where(bad, score.exp(), zero))
    both = (segments.group_sum(good.to(score.dtype)) > 0) & (segments.group_sum(bad.to(score.dtype)) > 0)
    return torch.where(both, torch.log1p(ups) + torch.log1p(downs), ups * 0).sum()
