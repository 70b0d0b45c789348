"""Surrogates with a trust region on the probability itself, not on the ratio."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from grpo_lightning.losses.surrogate_table import register_surrogate
from grpo_lightning.losses.surrogates.clipped import TOKEN
from grpo_lightning.losses.surrogates.options import SurrogateOptions
from grpo_lightning.utils.ranges import Bound, not_negative, positive


@dataclass(frozen=True, kw_only=True)
class DppoOptions(SurrogateOptions):
    """Options of dppo_tv and dppo_kl.

    Args:
        dppo_low: how far dppo lets a probability (or its divergence) fall where A <= 0.
        dppo_high: how far it may rise where A > 0.
        dppo_weight_max: cap on dppo's importance weight.
    """

    dppo_low: float | None = None
    dppo_high: float | None = None
    dppo_weight_max: float = 20.0
    may_be_infinite: ClassVar[tuple[str, ...]] = ("dppo_low", "dppo_high", "dppo_weight_max")

    @property
    def dppo_range(self) -> tuple[float, float]:
        """`dppo_low` and `dppo_high` of a resolved config that has them."""
        assert self.dppo_low is not None
        assert self.dppo_high is not None
        return self.dppo_low, self.dppo_high

    def bounds(self) -> list[Bound]:
        """Returns what each option has to be."""
        return [*positive(self, "dppo_weight_max"), *not_negative(self, "dppo_low", "dppo_high")]


Keep = Callable[[Tensor, Tensor, Tensor, DppoOptions], Tensor]
"""advantages, log-probabilities now and then, options -> which tokens [N] stay"""


def dppo_tv_keep(advantages: Tensor, logprobs: Tensor, old_logprobs: Tensor, options: DppoOptions) -> Tensor:
    """Returns which tokens [N] stay: their probability has moved little, in total variation."""
    low, high = options.dppo_range
    moved = logprobs.detach().exp() - old_logprobs.exp()
    return torch.where(advantages > 0, moved <= high, moved >= -low)


def dppo_kl_keep(advantages: Tensor, logprobs: Tensor, old_logprobs: Tensor, options: DppoOptions) -> Tensor:
    """Returns which tokens [N] stay: their probability has moved little, in binary KL divergence."""
    low, high = options.dppo_range
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
        ratio: Tensor, advantages: Tensor, logprobs: Tensor, old_logprobs: Tensor, options: DppoOptions
    ) -> Tensor:
        keep = rule(advantages, logprobs, old_logprobs, options).to(ratio.dtype)
        weight = ratio.detach().clamp(max=options.dppo_weight_max) * keep
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
