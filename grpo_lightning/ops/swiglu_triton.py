"""The elementwise kernels of `swiglu`: two reads and one write forward, three reads and two writes back."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _forward(g_ptr, u_ptr, y_ptr, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    g = tl.load(g_ptr + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + i, mask=inside, other=0.0).to(tl.float32)
    kind = y_ptr.dtype.element_ty
    s = (g * tl.sigmoid(g)).to(kind).to(tl.float32)
    tl.store(y_ptr + i, (s * u).to(kind), mask=inside)


@triton.jit
def _backward(dy_ptr, g_ptr, u_ptr, dg_ptr, du_ptr, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    dy = tl.load(dy_ptr + i, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + i, mask=inside, other=0.0).to(tl.float32)
    p = tl.sigmoid(g)
    s = g * p
    kind = dg_ptr.dtype.element_ty
    tl.store(dg_ptr + i, (dy * u * (p + s * (1.0 - p))).to(kind), mask=inside)
    tl.store(du_ptr + i, (dy * s).to(kind), mask=inside)


def forward(g: Tensor, u: Tensor) -> Tensor:
    """As `swiglu.forward`, whose twin this is."""
    g, u = g.contiguous(), u.contiguous()
    y = torch.empty_like(g)
    if g.numel():
        _forward[(triton.cdiv(g.numel(), BLOCK),)](g, u, y, g.numel(), BLOCK=BLOCK, num_warps=4)
    return y


def backward(dy: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """As `swiglu.backward`, whose twin this is."""
    dy, g, u = dy.contiguous(), g.contiguous(), u.contiguous()
    dg, du = torch.empty_like(g), torch.empty_like(g)
    if g.numel():
        grid = (triton.cdiv(g.numel(), BLOCK),)
        _backward[grid](dy, g, u, dg, du, g.numel(), BLOCK=BLOCK, num_warps=4)
    return dg, du
