"""Surrogates that hold back the few tokens by which entropy falls."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from grpo_lightning.losses.surrogate_table import register_surrogate
from grpo_lightning.losses.surrogates.clipped import TOKEN, ppo_clip
from grpo_lightning.losses.surrogates.options import ClipOptions, SurrogateOptions
from grpo_lightning.utils.ranges import Bound, not_negative


@dataclass(frozen=True, kw_only=True)
class CovarianceOptions(SurrogateOptions):
    """Options of clip_cov and kl_cov.

    Args:
        cov_frac: share of the step's tokens that clip_cov and kl_cov select.
        cov_low: lowest covariance that clip_cov selects from.
        cov_high: highest covariance that clip_cov selects from.
        kl_cov_coef: weight of kl_cov's penalty.
    """

    cov_frac: float = 2e-4
    cov_low: float = 1.0
    cov_high: float = 5.0
    kl_cov_coef: float = 1.0
    may_be_infinite: ClassVar[tuple[str, ...]] = ("cov_high",)

    def bounds(self) -> list[Bound]:
        """Returns what each option has to be."""
        return [
            ("cov_frac", 0 < self.cov_frac <= 1, "in (0, 1]"),
            ("cov_low", self.cov_low <= self.cov_high, "at most cov_high"),
            *not_negative(self, "kl_cov_coef"),
        ]


@register_surrogate(
    "clip_cov",
    levels=TOKEN,
    formula="ppo_clip, without gradient on randomly selected tokens of high covariance",
    paper="2505.22617",
    needs_old=True,
    picks_at_random=True,
    still_at_zero=True,
)
def clip_cov(ratio: Tensor, advantages: Tensor, selected: Tensor, options: ClipOptions) -> Tensor:
    """Returns PPO's objective, 0 on the selected tokens."""
    return ppo_clip(ratio, advantages, options).masked_fill(selected, 0.0)


@register_surrogate(
    "kl_cov",
    levels=TOKEN,
    formula="-A rho, plus kl_cov_coef |d| on the tokens of highest covariance",
    paper="2505.22617",
    needs_old=True,
)
def kl_cov(
    ratio: Tensor, advantages: Tensor, log_ratio: Tensor, selected: Tensor, options: CovarianceOptions
) -> Tensor:
    """Returns the unclipped objective with a penalty on the selected tokens."""
    return -advantages * ratio + options.kl_cov_coef * log_ratio.abs() * selected.to(ratio.dtype)
