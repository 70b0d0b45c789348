"""RMSNorm as one op: a frozen weight has no gradient, and x and one number per row are all it keeps.

    n = x / sqrt(mean(x^2) + eps),  y = w n,  dx = (w dy - n mean(w dy n)) / sqrt(mean(x^2) + eps)
In fp32, with n rounded to the type of `x` before it is multiplied, as Hugging Face's norms do.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_lightning.ops.dispatch import use_triton


def rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str = "auto") -> Tensor:
    """Returns w x / sqrt(mean(x^2) + eps) over the last axis, in the type of `x`.

    Args:
        x: [..., H].
        weight: [H], of the type of `x`, frozen or not.
        eps: under the root.
        backend: `auto`, `torch` or `triton`.
    """
    y: Any = _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps, use_triton(x.device, backend))
    return y.view(x.shape)


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns y [T, H] and 1 / sqrt(mean(x^2) + eps) [T], at least fp32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = (wide.square().mean(-1) + eps).rsqrt()
    return weight * (wide * inverse[:, None]).to(x.dtype), inverse


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, want_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns dx [T, H] and, if it is wanted, dw [H]."""
    wide = inverse.dtype
    n = x.to(wide) * inverse[:, None]
    dn = dy.to(wide) * weight.to(wide)
    dx = (dn - n * (dn * n).mean(-1, keepdim=True)) * inverse[:, None]
    dw = (dy.to(wide) * n.to(x.dtype).to(wide)).sum(0).to(weight.dtype) if want_weight else None
    return dx.to(x.dtype), dw


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kernel: bool) -> Tensor:
        ctx.kernel = kernel
        if kernel:
            from grpo_lightning.ops import rms_norm_triton

            y, inverse = rms_norm_triton.forward(x, weight, eps)
        else:
            y, inverse = forward(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        if ctx.kernel:
            from grpo_lightning.ops import rms_norm_triton

            dx, dw = rms_norm_triton.backward(dy, x, weight, inverse, ctx.needs_input_grad[1])
        else:
            dx, dw = backward(dy, x, weight, inverse, ctx.needs_input_grad[1])
        return dx, dw, None, None
