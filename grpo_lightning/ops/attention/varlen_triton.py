"""The kernel that makes one softmax of two: `Dense.merge` of varlen.py is its twin."""

import triton
import triton.language as tl
from torch import Tensor

ROWS = 4


@triton.jit(  # what changes from batch to batch makes no variant
    do_not_specialize=["rows", "lse_stride", "mass_stride"],
    do_not_specialize_on_alignment=["lse_ptr", "mass_ptr"],
)
def _merge(
    out_ptr, lse_ptr, more_ptr, mass_ptr, rows, heads, width, lse_stride, mass_stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    own = tl.load(lse_ptr + head * lse_stride + row, mask=inside, other=0.0)
    mass = tl.load(mass_ptr + head * mass_stride + row, mask=inside, other=0.0)
    top = tl.maximum(own, mass)
    share, rest = tl.exp(own - top), tl.exp(mass - top)
    whole = top + tl.log(share + rest)
    share, rest = share / (share + rest), rest / (share + rest)
    c = tl.arange(0, WIDTH)
    at = (row.to(tl.int64)[:, None] * heads + head) * width + c[None, :]
    tile = inside[:, None] & (c < width)[None, :]
    a = tl.load(out_ptr + at, mask=tile, other=0.0).to(tl.float32)
    b = tl.load(more_ptr + at, mask=tile, other=0.0).to(tl.float32)
    merged = share[:, None] * a + rest[:, None] * b
    tl.store(out_ptr + at, merged.to(out_ptr.dtype.element_ty), mask=tile)
    tl.store(lse_ptr + head * lse_stride + row, whole, mask=inside)
    tl.store(mass_ptr + head * mass_stride + row, whole, mask=inside)


def merge(out: Tensor, lse: Tensor, more: Tensor, mass: Tensor) -> None:
    """Makes of two softmaxes the one over both; in `out`, `lse` and `mass`.

    Args:
        out: [T, heads, D], contiguous.
        lse: [heads, T] fp32, finite, as `mass` is.
        more: [T, heads, D], contiguous.
        mass: [heads, T] fp32.
    """
    rows, heads, width = out.shape
    _merge[(triton.cdiv(rows, ROWS), heads)](
        out, lse, more, mass, rows, heads, width, lse.stride(0), mass.stride(0),
        ROWS=ROWS, WIDTH=triton.next_power_of_2(width), num_warps=1,
    )  # fmt: skip
