"""Estimators of the KL divergence from the reference policy, per token, in nats.

`x [N] = reference - policy -> [N]`; the gradient runs through the policy.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KLEstimator:
    """A row of `KL_ESTIMATORS`."""

    value: Callable[[Tensor], Tensor]
    formula: str
    correctable: bool = True
    """whether the bias correction changes it; where not, its gradient is unbiased on-policy already"""
    needs_correction: bool = False
    """whether its gradient vanishes in expectation without the correction"""


def k1(x: Tensor) -> Tensor:
    """Returns -x: unbiased, may be negative."""
    return -x


def k2(x: Tensor) -> Tensor:
    """Returns x^2 / 2, whose on-policy gradient is that of the reverse KL."""
    return 0.5 * x * x


def k3(x: Tensor) -> Tensor:
    """Returns e^x - x - 1, non-negative and unbiased (Schulman 2020)."""
    return torch.expm1(x) - x


def straight(value: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns the estimator with the value of `value` and the gradient of k2."""
    return lambda x: value(x.detach()) + k2(x) - k2(x.detach())


KL_ESTIMATORS: dict[str, KLEstimator] = {
    "k1": KLEstimator(k1, "-x", needs_correction=True),
    "k2": KLEstimator(k2, "x^2 / 2", correctable=False),
    "k3": KLEstimator(k3, "e^x - x - 1"),
    "k1_straight": KLEstimator(straight(k1), "-x with the gradient of k2", correctable=False),
    "k3_straight": KLEstimator(straight(k3), "e^x - x - 1 with the gradient of k2", correctable=False),
}
