"""A product h W^T that ends in exponentials: no logits are written. See `fused_gemm.py` for what they become.

Tempered logits are in base 2 here. `_multiply` is persistent: as many programs as the GPU has processors
walk over the tiles, all row tiles of a column tile together, so that W is read once. The copy engine (TMA)
loads tiles of h and W and stores rows; it fills what lies outside with zeros and stores nothing there.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from grpo_lightning.ops.lm_head.rows import Head, Inputs

ROWS, COLUMNS, DEPTH = 128, 256, 64
"""a tile; with 8 warps and 3 stages the fastest of 30 settings on an H200"""
SHARED_BYTES = 180 << 10
"""shared memory that `_multiply` takes in bf16, at most"""
LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tempered(z, factor, inner, HAS_CAP: tl.constexpr):
    """Returns tempered logits in base 2 from raw ones, and 1 minus the square of the softcap's tanh."""
    if HAS_CAP:
        u = 2.0 / (1.0 + tl.exp2(z * inner)) - 1.0
        return u * factor, 1.0 - u * u
    return z * factor, z


@triton.jit(do_not_specialize_on_alignment=["h_ptr", "ids_ptr", "tau_ptr", "own_ptr"])
def _own(
    h_ptr, w_ptr, bias_ptr, ids_ptr, tau_ptr, own_ptr,
    h_stride, w_stride, width, factor, inner,
    HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row's logit of its own token."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(ids_ptr + row)
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        c = start + columns
        h = tl.load(h_ptr + row * h_stride + c, mask=c < width, other=0.0).to(tl.float32)
        total += h * tl.load(w_ptr + y * w_stride + c, mask=c < width, other=0.0).to(tl.float32)
    z = tl.sum(total, 0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + y).to(tl.float32)
    own, _bend = _tempered(z, factor / tl.load(tau_ptr + row), inner, HAS_CAP)
    tl.store(own_ptr + row, own)


@triton.jit
def _piece(
    z, first, row0, y, reference, factor, a, b, mine, hit, out, bias_ptr, vocabulary, inner,
    HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr, SUMS: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Ends some columns of a tile, from `first` on: writes their rows, returns their sums."""
    c = first + tl.arange(0, z.shape[1])
    if HAS_BIAS:
        z += tl.load(bias_ptr + c, mask=c < vocabulary, other=0.0).to(tl.float32)[None, :]
    x, bend = _tempered(z, factor[:, None], inner, HAS_CAP)
    t = x - reference[:, None]
    total, moment = reference, reference
    if SUMS:
        if hit:
            t = tl.where((c[None, :] == y[:, None]) | (c[None, :] >= vocabulary), -1.0e30, t)
        value = tl.exp2(t)
        total, moment = tl.sum(value, 1), tl.sum(value * t, 1)
    else:
        value = tl.exp2(t) * (a[:, None] + b[:, None] * t)
        if hit:
            value = tl.where(c[None, :] == y[:, None], mine[:, None], value)
    if WRITE:
        if HAS_CAP:
            value *= bend
        out.store([row0, first], value.to(out.dtype))
    return total, moment


@triton.jit(
    do_not_specialize=["rows"],  # the last chunk of a call has another number of them
    do_not_specialize_on_alignment=[
        "ids_ptr", "tau_ptr", "reference_ptr", "a_ptr", "b_ptr", "mine_ptr", "total_ptr", "moment_ptr"
    ],
)  # fmt: skip
def _multiply(
    h, w, out, bias_ptr, ids_ptr, tau_ptr, reference_ptr, a_ptr, b_ptr, mine_ptr, total_ptr, moment_ptr,
    rows, vocabulary, width, factor, inner,
    HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr, SUMS: tl.constexpr, WRITE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Writes, of t = tempered logit - reference in base 2, either of two things.

    SUMS: the sums of 2^t and 2^t t over each tile's columns but the own one, [column tiles, rows]; with
    WRITE also 2^t, 0 at the own column. Otherwise rows 2^t (a + b t), `mine` at the own column. What is
    written is times the softcap's slope.
    """
    tall = tl.cdiv(rows, ROWS)
    deep = tl.cdiv(width, DEPTH)
    half: tl.constexpr = COLUMNS // 2
    later = tl.program_id(0) - PROGRAMS
    for tile in tl.range(tl.program_id(0), tall * tl.cdiv(vocabulary, COLUMNS), PROGRAMS, flatten=True):
        row0, column0 = tile % tall * ROWS, tile // tall * COLUMNS
        z = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(deep):
            z = tl.dot(h.load([row0, k * DEPTH]), w.load([column0, k * DEPTH]).T, z, input_precision="ieee")
        # The loops become one, in which loads run ahead: the end of a tile counts for itself.
        later += PROGRAMS
        row0, column0 = later % tall * ROWS, later // tall * COLUMNS
        r = row0 + tl.arange(0, ROWS)
        inside = r < rows
        y = tl.load(ids_ptr + r, mask=inside, other=-1).to(tl.int32)
        reference = tl.load(reference_ptr + r, mask=inside, other=0.0)
        scale = factor / tl.load(tau_ptr + r, mask=inside, other=1.0)
        a, b, mine = reference, reference, reference
        if not SUMS:
            a = tl.load(a_ptr + r, mask=inside, other=0.0)
            b = tl.load(b_ptr + r, mask=inside, other=0.0)
            mine = tl.load(mine_ptr + r, mask=inside, other=0.0)
        # Most tiles hold neither an own column nor the edge, and skip the comparisons.
        hit = tl.max(((y >= column0) & (y < column0 + COLUMNS)).to(tl.int32), 0) > 0
        hit |= column0 + COLUMNS > vocabulary
        # In halves: only one has its exponentials in registers.
        left, right = z.reshape(ROWS, 2, half).permute(0, 2, 1).split()
        total, moment = _piece(
            left, column0, row0, y, reference, scale, a, b, mine, hit, out, bias_ptr, vocabulary, inner,
            HAS_CAP, HAS_BIAS, SUMS, WRITE,
        )  # fmt: skip
        total1, moment1 = _piece(
            right, column0 + half, row0, y, reference, scale, a, b, mine, hit, out, bias_ptr, vocabulary,
            inner, HAS_CAP, HAS_BIAS, SUMS, WRITE,
        )  # fmt: skip
        if SUMS:
            at = (later // tall).to(tl.int64) * rows + r
            tl.store(total_ptr + at, total + total1, mask=inside)
            tl.store(moment_ptr + at, moment + moment1, mask=inside)


@triton.jit
def _log1p(u):
    """Returns log(1 + u) for u >= 0, precise near 0 (Kahan)."""
    w = 1.0 + u
    return tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=[
        "total_ptr", "moment_ptr", "ids_ptr", "tau_ptr", "own_ptr", "logp_ptr", "entropy_ptr", "odds_ptr"
    ],
)  # fmt: skip
def _finish(
    total_ptr, moment_ptr, e_ptr, ids_ptr, tau_ptr, own_ptr, logp_ptr, entropy_ptr, odds_ptr,
    e_stride, rows, tiles, factor,
    HAS_CAP: tl.constexpr, WRITE: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Log-probabilities, entropies and odds of the others from sums; E's own column, for the gradient."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = r < rows
    t = tl.arange(0, TILES)
    odds, moment = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, tiles, TILES):
        at = (start + t)[:, None].to(tl.int64) * rows + r[None, :]
        mask = ((start + t) < tiles)[:, None] & inside[None, :]
        odds += tl.sum(tl.load(total_ptr + at, mask=mask, other=0.0), 0)
        moment += tl.sum(tl.load(moment_ptr + at, mask=mask, other=0.0), 0)
    log = _log1p(odds)
    entropy = log - LN2 * moment / (1.0 + odds)
    tl.store(logp_ptr + r, -log, mask=inside)
    tl.store(entropy_ptr + r, tl.where(entropy < 0.0, 0.0, entropy), mask=inside)
    tl.store(odds_ptr + r, odds, mask=inside)
    if WRITE:
        own = -odds
        if HAS_CAP:
            u = tl.load(own_ptr + r, mask=inside, other=0.0) * tl.load(tau_ptr + r, mask=inside) / factor
            own *= 1.0 - u * u
        y = tl.load(ids_ptr + r, mask=inside, other=0)
        tl.store(e_ptr + r.to(tl.int64) * e_stride + y, own.to(e_ptr.dtype.element_ty), mask=inside)


@cache
def programs(device: torch.device) -> int:
    """Returns how many programs run at one time; few on a CPU, where each walks over several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def column_tiles(vocabulary: int) -> int:
    """Returns how many sums there are per row."""
    return triton.cdiv(vocabulary, COLUMNS)


def _constants(head: Head) -> tuple[float, float]:
    """Returns the factor of a raw logit, or of its tanh, in base 2, and that of the exponent in tanh."""
    if head.softcap is None:
        return head.logit_scale * LOG2E, 0.0
    return head.softcap * LOG2E, -2 * LOG2E * head.logit_scale / head.softcap


def own_logits(x: Inputs) -> Tensor:
    """Returns the tempered logits [C] of the own tokens in base 2; rows of hidden have stride 1."""
    own = torch.empty_like(x.tau)
    width = x.weight.shape[1]
    _own[(len(own),)](
        x.hidden, x.weight, x.bias, x.ids, x.tau, own,
        x.hidden.stride(0), x.weight.stride(0), width, *_constants(x.head),
        HAS_CAP=x.head.softcap is not None, HAS_BIAS=x.bias is not None,
        BLOCK=min(1024, triton.next_power_of_2(width)),
    )  # fmt: skip
    return own


def multiply(
    x: Inputs,
    reference: Tensor,
    rows: Tensor | None,
    sums: Tensor | None = None,
    gradient: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Fills `rows` and `sums` as `_multiply` says.

    Args:
        x: the call for one chunk; hidden and weight [., H] with rows that start at multiples of 16 bytes.
        reference: [C] in base 2.
        rows: [C, V], whose rows start at multiples of 16 bytes; None writes none.
        sums: [2, column tiles, C] fp32.
        gradient: a, b and mine, [C] each; given exactly if `sums` is not.
    """
    (n, width), vocabulary = x.hidden.shape, x.weight.shape[0]
    tiles = triton.cdiv(n, ROWS) * column_tiles(vocabulary)
    most = programs(x.hidden.device)
    a, b, mine = gradient or (None, None, None)
    total, moment = (None, None) if sums is None else sums
    _multiply[(min(tiles, most),)](
        TensorDescriptor.from_tensor(x.hidden, [ROWS, DEPTH]),
        TensorDescriptor.from_tensor(x.weight, [COLUMNS, DEPTH]),
        None if rows is None else TensorDescriptor.from_tensor(rows, [ROWS, COLUMNS // 2]),
        x.bias, x.ids, x.tau, reference, a, b, mine, total, moment,
        n, vocabulary, width, *_constants(x.head),
        HAS_CAP=x.head.softcap is not None, HAS_BIAS=x.bias is not None,
        SUMS=sums is not None, WRITE=rows is not None,
        ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH, PROGRAMS=most,
        num_warps=8, num_stages=3,
    )  # fmt: skip


def finish(
    x: Inputs, own: Tensor, sums: Tensor, e: Tensor | None, out: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Fills log-probabilities, entropies and the odds of the others, [C] each, and the own column of `e`.

    Args:
        x: the call for one chunk.
        own: [C], as `own_logits` gives.
        sums: [2, column tiles, C], as `multiply` gives.
        e: [C, V]; its own column becomes -odds times the softcap's slope, so that with E' as it is then
            d logp / d hidden = -slope / (1 + odds) E' W.
        out: log-probabilities, entropies, odds.
    """
    factor, _inner = _constants(x.head)
    _finish[(triton.cdiv(len(own), 8),)](
        *sums, e, x.ids, x.tau, own, *out,
        0 if e is None else e.stride(0), len(own), sums.shape[1], factor,
        HAS_CAP=x.head.softcap is not None, WRITE=e is not None, ROWS=8, TILES=128,
    )  # fmt: skip
