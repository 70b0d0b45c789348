"""The kernel of `rotary`: one read and one write of q and k in one launch, forward and back alike.

A program turns all heads of a few tokens, so that it reads their cos and sin once.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048
"""pairs of numbers of q in a program, unless one token has more"""


@triton.jit
def _turn_heads(
    x_ptr, y_ptr, r, alive, row_stride, head_stride, cos_a, sin_a, cos_b, sin_b,
    HEADS: tl.constexpr, HEAD_BLOCK: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    h = tl.arange(0, HEAD_BLOCK).to(tl.int64)[None, :, None]
    c = tl.arange(0, BLOCK)[None, None, :]
    inside = alive[:, None, None] & (h < HEADS) & (c < HALF)
    x = x_ptr + r[:, None, None] * row_stride + h * head_stride + c
    a = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + HALF, mask=inside, other=0.0).to(tl.float32)
    y = y_ptr + (r[:, None, None] * HEADS + h) * (2 * HALF) + c
    kind = y_ptr.dtype.element_ty
    tl.store(y, (a * cos_a - b * sin_a).to(kind), mask=inside)
    tl.store(y + HALF, (b * cos_b + a * sin_b).to(kind), mask=inside)


@triton.jit(do_not_specialize=["rows"])  # every step has another number of them
def _turn(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    rows, q_row, q_head, k_row, k_head,
    BACK: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, HEAD_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    alive = r < rows
    inside = alive[:, None] & (c < HALF)[None, :]
    at = r[:, None] * (2 * HALF) + c[None, :]
    cos_a = tl.load(cos_ptr + at, mask=inside, other=0.0).to(tl.float32)[:, None, :]
    cos_b = tl.load(cos_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)[:, None, :]
    sin_a = tl.load(sin_ptr + at, mask=inside, other=0.0).to(tl.float32)[:, None, :]
    sin_b = tl.load(sin_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)[:, None, :]
    if BACK:
        sin_a, sin_b = -sin_b, -sin_a
    _turn_heads(
        q_ptr, q_out_ptr, r, alive, q_row, q_head, cos_a, sin_a, cos_b, sin_b,
        HEADS, HEAD_BLOCK, HALF, BLOCK,
    )  # fmt: skip
    _turn_heads(
        k_ptr, k_out_ptr, r, alive, k_row, k_head, cos_a, sin_a, cos_b, sin_b,
        KV_HEADS, KV_BLOCK, HALF, BLOCK,
    )  # fmt: skip


@cache
def _tile(heads: int, kv_heads: int, width: int) -> dict[str, int]:
    blocks = [triton.next_power_of_2(n) for n in (heads, kv_heads, width // 2)]
    pairs = blocks[0] * blocks[2]
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HALF": width // 2,
        "ROWS": max(1, TILE // pairs),
        "HEAD_BLOCK": blocks[0],
        "KV_BLOCK": blocks[1],
        "BLOCK": blocks[2],
        "num_warps": 4 if pairs <= 2 * TILE else 8,
    }


def _dense(x: Tensor) -> Tensor:
    """Returns `x` with the numbers of a head beside one another; heads and rows may lie apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """As `rotary.turn`, whose twin this is."""
    q, k = _dense(q), _dense(k)
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    rows, heads, width = q.shape[-3:]
    if rows:
        tile = _tile(heads, k.shape[-2], width)
        _turn[(triton.cdiv(rows, tile["ROWS"]),)](
            q, k, cos.contiguous(), sin.contiguous(), q_out, k_out,
            rows, q.stride(-3), q.stride(-2), k.stride(-3), k.stride(-2), BACK=back, **tile,
        )  # fmt: skip
    return q_out, k_out
