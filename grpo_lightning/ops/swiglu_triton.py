"""The elementwise kernels of `swiglu`: two reads and one write forward, three reads and two writes back."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _forward(g_ptr, u_ptr, y_ptr, width, g_stride, u_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    g = tl.load(g_ptr + row * g_stride + c, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + row * u_stride + c, mask=inside, other=0.0).to(tl.float32)
    kind = y_ptr.dtype.element_ty
    s = (g * tl.sigmoid(g)).to(kind).to(tl.float32)
    tl.store(y_ptr + row * width + c, (s * u).to(kind), mask=inside)


@triton.jit
def _backward(
    dy_ptr, g_ptr, u_ptr, dg_ptr, du_ptr, width, g_stride, u_stride, out_stride, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    dy = tl.load(dy_ptr + row * width + c, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + row * g_stride + c, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + row * u_stride + c, mask=inside, other=0.0).to(tl.float32)
    p = tl.sigmoid(g)
    s = g * p
    kind = dg_ptr.dtype.element_ty
    tl.store(dg_ptr + row * out_stride + c, (dy * u * (p + s * (1.0 - p))).to(kind), mask=inside)
    tl.store(du_ptr + row * out_stride + c, (dy * s).to(kind), mask=inside)


def _grid(rows: int, width: int) -> tuple[tuple[int, int], int]:
    block = min(BLOCK, triton.next_power_of_2(width))
    return (rows, triton.cdiv(width, block)), block


def forward(g: Tensor, u: Tensor) -> Tensor:
    """As `swiglu.forward`, whose twin this is; rows of `g` and `u` [T, F] may lie apart."""
    y = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    if g.numel():
        grid, block = _grid(*g.shape)
        _forward[grid](g, u, y, g.shape[1], g.stride(0), u.stride(0), BLOCK=block, num_warps=4)
    return y


def backward(dy: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """As `swiglu.backward`, whose twin this is; dg and du [T, F] lie side by side."""
    width = g.shape[1]
    both = torch.empty(g.shape[0], 2 * width, dtype=g.dtype, device=g.device)
    dg, du = both.split(width, 1)
    if g.numel():
        grid, block = _grid(*g.shape)
        _backward[grid](
            dy.contiguous(), g, u, dg, du, width, g.stride(0), u.stride(0), 2 * width,
            BLOCK=block, num_warps=4,
        )  # fmt: skip
    return dg, du
