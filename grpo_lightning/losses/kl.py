"""Estimators of the KL divergence from the reference policy, per token: `x [N] = ref - policy -> [N]`, in
nats."""

from collections.abc import Callable

import torch
from torch import Tensor


def k3(x: Tensor) -> Tensor:
    """Returns e^x - x - 1, non-negative and unbiased (Schulman 2020)."""
    return torch.expm1(x) - x


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k3": k3}
