"""Rotary embeddings of q and k as one op, which keeps cos and sin and nothing else for its backward.

    q' = q cos + turned(q) sin  with  turned([a, b]) = [-b, a]  over the halves of a head; k' likewise.
Its transpose is the same with -sin, the halves of which have changed places. In fp32, rounded once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_lightning.utils.dispatch import use_triton


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Returns q' and k', contiguous, of the shapes and the type of q and k.

    Args:
        q: [T, heads, D], or [1, T, heads, D]; D is even. Rows and heads may lie apart.
        k: [T, kv_heads, D], or [1, T, kv_heads, D], of the type of `q`.
        cos: [T, D], or [1, T, D]; has no gradient.
        sin: likewise.
        backend: `auto`, `torch` or `triton`.
    """
    return _Rotary.apply(q, k, cos, sin, use_triton(q.device, backend))  # pyright: ignore[reportReturnType]  # untyped


def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """Returns q and k turned as above, or by the transpose of that with `back`."""
    width = q.shape[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    cos, sin = (t.reshape(-1, 1, width).to(wide) for t in (cos, sin))
    if back:
        sin = -sin.roll(width // 2, -1)

    def turned(x: Tensor) -> Tensor:
        a, b = x.to(wide).chunk(2, -1)
        return (x * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)

    return turned(q), turned(k)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kernel: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.kernel = kernel
        return _turn(kernel, q, k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        return *_turn(ctx.kernel, dq, dk, *ctx.saved_tensors, True), None, None, None


def _turn(kernel: bool, *args: Any) -> tuple[Tensor, Tensor]:
    if kernel:
        from grpo_lightning.ops import rotary_triton

        return rotary_triton.turn(*args)
    return turn(*args)
