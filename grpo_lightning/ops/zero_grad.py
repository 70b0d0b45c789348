"""What ties a micro-batch without tokens to the parameters."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, nothing: Tensor, *params: Tensor) -> Tensor:
        ctx.params = params
        return nothing.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(torch.zeros_like(p) if p.grad is None else None for p in ctx.params)


def tied(nothing: Tensor, params: list[Tensor]) -> Tensor:
    """Returns `nothing` with a gradient of 0 towards every one of `params`.

    The backward reaches all of them, so that reductions over ranks wait for none, and leaves a gradient in
    each, so that the optimizer steps. A gradient that is there already stays as it is and costs no kernel.
    """
    return _Tie.apply(nothing, *params)  # pyright: ignore[reportReturnType]
