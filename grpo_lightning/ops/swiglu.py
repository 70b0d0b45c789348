"""SwiGLU's product silu(g) u as one op, which keeps g and u and nothing else for its backward.

    s = g sigmoid(g),  y = s u,  dg = dy u (sigmoid(g) + s (1 - sigmoid(g))),  du = dy s
`s` is rounded to the inputs' type before it is multiplied, as the two ops it stands for do.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from grpo_lightning.utils.dispatch import use_triton


def swiglu(g: Tensor, u: Tensor, backend: str = "auto") -> Tensor:
    """Returns silu(g) u, of the shape and type of `g` and `u`.

    Args:
        g: of any shape.
        u: of the same shape and type.
        backend: `auto`, `torch` or `triton`.
    """
    y: Any = _SwiGLU.apply(_rows(g), _rows(u), use_triton(g.device, backend))
    return y.view(g.shape)


def _rows(x: Tensor) -> Tensor:
    """Returns x as [T, F], whose rows may lie apart."""
    flat = x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def forward(g: Tensor, u: Tensor) -> Tensor:
    """Returns silu(g) u."""
    return silu(g).mul_(u)


def backward(dy: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Returns dg and du, computed in fp32 at least."""
    wide = torch.promote_types(g.dtype, torch.float32)
    dy_, g_, u_ = dy.to(wide), g.to(wide), u.to(wide)
    p = g_.sigmoid()
    s = g_ * p
    return (dy_ * u_ * (p + s * (1 - p))).to(g.dtype), (dy_ * s).to(g.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor, kernel: bool) -> Tensor:
        ctx.save_for_backward(g, u)
        ctx.kernel = kernel
        if kernel:
            from grpo_lightning.ops import swiglu_triton

            return swiglu_triton.forward(g, u)
        return forward(g, u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        g, u = ctx.saved_tensors
        if ctx.kernel:
            from grpo_lightning.ops import swiglu_triton

            return *swiglu_triton.backward(dy, g, u), None
        return *backward(dy, g, u), None
