"""Surrogates of a token's own ratio: clipped, capped, gated, or pulled back."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grpo_lightning.losses.surrogate_table import register_surrogate
from grpo_lightning.losses.surrogates.options import ClipOptions, SurrogateOptions
from grpo_lightning.utils.ranges import Bound, not_negative, positive

TOKEN = ("token",)
TOKEN_OR_SEQUENCE_TOKEN = ("token", "sequence_token")


def either(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """Returns one of two numbers in the type of `like`; `torch.where` of two numbers would be fp32."""
    return torch.where(condition, like.new_tensor(yes), like.new_tensor(no))


@register_surrogate(
    "ppo_clip",
    formula="-min(min(rho, dual_clip) A, clip(rho, 1 - clip_low, 1 + clip_high) A)",
    paper="2402.03300",
    still_at_zero=True,
)
def ppo_clip(ratio: Tensor, advantages: Tensor, options: ClipOptions) -> Tensor:
    """Returns PPO's clipped objective; `dual_clip` bounds what a negative advantage can cost (1912.09729)."""
    low, high = options.clip_range
    free = ratio if options.dual_clip is None else ratio.clamp(max=options.dual_clip)
    return -torch.minimum(free * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


@register_surrogate("reinforce", formula="-A l", paper="2504.02546", still_at_zero=True)
def reinforce(advantages: Tensor, logprobs: Tensor) -> Tensor:
    """Returns the plain policy gradient; no ratio, no clip."""
    return -advantages * logprobs


@dataclass(frozen=True, kw_only=True)
class CispoOptions(SurrogateOptions):
    """Options of cispo.

    Args:
        cispo_weight_min: lowest importance weight of cispo, absolute.
        cispo_weight_max: highest importance weight of cispo, absolute; at least 1.
    """

    cispo_weight_min: float = 0.0
    cispo_weight_max: float = 5.0
    may_be_infinite: ClassVar[tuple[str, ...]] = ("cispo_weight_max",)

    def bounds(self) -> list[Bound]:
        """Returns what each option has to be."""
        low, high = self.cispo_weight_min, self.cispo_weight_max
        return [
            ("cispo_weight_max", high >= 1, ">= 1: it is absolute, not 1 + epsilon"),
            ("cispo_weight_min", 0 <= low <= high, "in [0, cispo_weight_max]"),
        ]


@register_surrogate(
    "cispo",
    levels=TOKEN_OR_SEQUENCE_TOKEN,
    formula="-sg(clip(rho, cispo_weight_min, cispo_weight_max)) A l",
    paper="2506.13585",
    still_at_zero=True,
    meant_per_token=True,
)
def cispo(ratio: Tensor, advantages: Tensor, logprobs: Tensor, options: CispoOptions) -> Tensor:
    """Returns REINFORCE with a capped importance weight: every token keeps a gradient."""
    weight = ratio.detach().clamp(options.cispo_weight_min, options.cispo_weight_max)
    return -weight * advantages * logprobs


@dataclass(frozen=True, kw_only=True)
class SapoOptions(SurrogateOptions):
    """Options of sapo.

    Args:
        sapo_tau_pos: sharpness of sapo's gate where A > 0.
        sapo_tau_neg: the same where A <= 0.
    """

    sapo_tau_pos: float = 1.0
    sapo_tau_neg: float = 1.05

    def bounds(self) -> list[Bound]:
        """Returns what each option has to be."""
        return positive(self, "sapo_tau_pos", "sapo_tau_neg")


@register_surrogate(
    "sapo",
    levels=TOKEN_OR_SEQUENCE_TOKEN,
    formula="-A (4 / tau) sigmoid(tau (rho - 1)), tau = sapo_tau_pos if A > 0 else sapo_tau_neg",
    paper="2511.20347",
    still_at_zero=True,
    meant_per_token=True,
)
def sapo(ratio: Tensor, advantages: Tensor, options: SapoOptions) -> Tensor:
    """Returns a gate that closes smoothly on both sides instead of a clip."""
    tau = either(advantages > 0, options.sapo_tau_pos, options.sapo_tau_neg, ratio)
    return -advantages * (4 / tau) * torch.sigmoid(tau * (ratio - 1))


@dataclass(frozen=True, kw_only=True)
class DroOptions(SurrogateOptions):
    """Options of dro.

    Args:
        dro_coef: weight of dro's quadratic pull.
    """

    dro_coef: float | None = None

    def bounds(self) -> list[Bound]:
        """Returns what each option has to be."""
        return not_negative(self, "dro_coef")


@register_surrogate(
    "dro", levels=TOKEN, formula="-(A l - dro_coef d^2 / 2)", paper="", required=("dro_coef",)
)
def dro(log_ratio: Tensor, advantages: Tensor, logprobs: Tensor, options: DroOptions) -> Tensor:
    """Returns direct reward optimisation: REINFORCE with a quadratic pull to the old policy (as in verl)."""
    assert options.dro_coef is not None
    return -(advantages * logprobs - 0.5 * options.dro_coef * log_ratio**2)
