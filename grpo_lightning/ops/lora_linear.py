"""A linear layer with a LoRA adapter as one op: one base product and two thin ones, forward and backward.

    y = x W^T + b + s (x A^T) B^T
The adapter's fp32 masters are rounded to the type of `x` for the products, whose results for A and B are
fp32. The backward needs x and h = x A^T, nothing as wide as y.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from grpo_lightning.ops.products import wide_product


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """Returns x W^T + bias + scaling (x A^T) B^T, [..., O], in the type of `x`.

    Args:
        x: [..., K].
        weight: [O, K], frozen, of the type of `x`.
        bias: [O] or None, frozen.
        a: [r, K], trains.
        b: [O, r], trains.
        scaling: the adapter's.
    """
    flat = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled():
        y = _LoraLinear.apply(flat, weight, bias, a, b, scaling)
    else:
        y = _with_delta(linear(flat, weight, bias), flat @ a.to(x.dtype).T, b, scaling)
    return y.view(*x.shape[:-1], -1)  # pyright: ignore[reportOptionalMemberAccess]  # apply() is untyped


def lora_delta(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Returns y + scaling (x A^T) B^T, for a base layer that has computed `y` [..., O] itself (4 bit)."""
    out = _LoraDelta.apply(y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), a, b, scaling)
    return out.view(y.shape)  # pyright: ignore[reportOptionalMemberAccess]  # apply() is untyped


def _with_delta(y: Tensor, h: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Adds scaling h B^T to `y`, in its memory."""
    return y.addmm_(h, b.to(y.dtype).T, alpha=scaling)


def _thin_backward(
    dy: Tensor, x: Tensor, h: Tensor, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dh [T, r], dA and dB, the last two in the masters' type."""
    dh = (dy @ b.to(dy.dtype)).mul_(scaling)
    return dh, wide_product(dh.T, x).to(a.dtype), wide_product(dy.T, h).mul_(scaling).to(b.dtype)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        h = x @ a.to(x.dtype).T
        ctx.save_for_backward(x, h, weight, a, b)
        ctx.scaling = scaling
        return _with_delta(linear(x, weight, bias), h, b, scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, weight, a, b = ctx.saved_tensors
        dh, da, db = _thin_backward(dy, x, h, a, b, ctx.scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).addmm_(dh, a.to(dy.dtype))
        return dx, None, None, da, db, None


class _LoraDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        h = x @ a.to(x.dtype).T
        ctx.save_for_backward(x, h, a, b)
        ctx.scaling = scaling
        return torch.addmm(y, h, b.to(y.dtype).T, alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, a, b = ctx.saved_tensors
        dh, da, db = _thin_backward(dy, x, h, a, b, ctx.scaling)
        dx = dh @ a.to(dy.dtype) if ctx.needs_input_grad[1] else None
        return dy, dx, da, db, None
