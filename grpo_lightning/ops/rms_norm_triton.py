"""The row kernels of `rms_norm`: one sweep over x forward, one over x and dy back.

A program holds a tile of whole rows, several where they are short (the norms of q and k have one head's
width). With a trained weight every program adds up its own stretch of rows, and the partial sums are added
up after it in a fixed order: the same gradient at every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048
"""numbers in a tile of rows, unless one row is longer"""
STRETCHES = 512
"""how many partial sums there are of dw at most"""


@triton.jit(do_not_specialize=["rows"])  # every step has another number of them
def _forward(
    x_ptr, weight_ptr, y_ptr, inverse_ptr, rows, width, x_stride, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    inside = (r < rows)[:, None] & (c < width)[None, :]
    x = tl.load(x_ptr + r[:, None] * x_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
    kind = y_ptr.dtype.element_ty
    n = (x * inverse[:, None]).to(kind).to(tl.float32)
    w = tl.load(weight_ptr + c, mask=c < width, other=0.0).to(tl.float32)
    tl.store(y_ptr + r[:, None] * width + c[None, :], (n * w[None, :]).to(kind), mask=inside)
    tl.store(inverse_ptr + r, inverse, mask=r < rows)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _backward(
    dy_ptr, x_ptr, weight_ptr, inverse_ptr, dx_ptr, partial_ptr,
    rows, width, dy_stride, x_stride, tiles,
    WANT_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    w = tl.load(weight_ptr + c, mask=c < width, other=0.0).to(tl.float32)
    kind = dx_ptr.dtype.element_ty
    dw = tl.zeros([BLOCK], tl.float32)
    for tile in range(0, tiles):
        r = (program * tiles + tile) * ROWS + tl.arange(0, ROWS)
        inside = (r < rows)[:, None] & (c < width)[None, :]
        x = tl.load(x_ptr + r[:, None] * x_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + r[:, None] * dy_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + r, mask=r < rows, other=0.0)
        n = x * inverse[:, None]
        dn = dy * w[None, :]
        along = tl.sum(dn * n, 1) / width
        dx = (dn - n * along[:, None]) * inverse[:, None]
        tl.store(dx_ptr + r[:, None] * width + c[None, :], dx.to(kind), mask=inside)
        if WANT_WEIGHT:
            dw += tl.sum(dy * n.to(kind).to(tl.float32), 0)
    if WANT_WEIGHT:
        tl.store(partial_ptr + program * width + c, dw, mask=c < width)


def _tile(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"ROWS": max(1, TILE // block), "BLOCK": block, "num_warps": 4 if block <= 4096 else 8}


def _dense(x: Tensor) -> Tensor:
    """Returns `x` [T, H] with its columns beside one another; its rows may lie apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `rms_norm.forward`, whose twin this is; `inverse` fp32."""
    x = _dense(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    inverse = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if len(x):
        tile = _tile(x.shape[1])
        grid = (triton.cdiv(len(x), tile["ROWS"]),)
        _forward[grid](
            x, weight.contiguous(), y, inverse, len(x), x.shape[1], x.stride(0), eps, **tile
        )  # fmt: skip
    return y, inverse


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, want_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """As `rms_norm.backward`, whose twin this is."""
    dy, x = _dense(dy), _dense(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not len(x):
        return dx, torch.zeros_like(weight) if want_weight else None
    tile = _tile(x.shape[1])
    all_tiles = triton.cdiv(len(x), tile["ROWS"])
    each = triton.cdiv(all_tiles, STRETCHES) if want_weight else 1
    programs = triton.cdiv(all_tiles, each)
    partial = torch.empty(programs, x.shape[1], dtype=torch.float32, device=x.device) if want_weight else dx
    _backward[(programs,)](
        dy, x, weight.contiguous(), inverse, dx, partial,
        len(x), x.shape[1], dy.stride(0), x.stride(0), each,
        WANT_WEIGHT=want_weight, **tile,
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype) if want_weight else None
