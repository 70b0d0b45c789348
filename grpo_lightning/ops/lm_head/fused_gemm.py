"""Through exponentials: a GEMM of our own ends in what the next product and the scores are made of.

With x a tempered logit, y the own token, d_i = x_i - x_y and odds S = sum over i != y of e^d_i:
    logp = -log(1 + S),    entropy = log(1 + S) - (sum of e^d_i d_i) / (1 + S),
    d logp / d raw_i = -slope e^d_i / (1 + S),    at the own column slope S / (1 + S).
The reference x_y is known before the GEMM, one dot product per row, and a row's factor can wait until after
the second product. So a chunk is one GEMM that writes E = e^d in bf16 and sums per tile, and one that makes
d logp / d hidden of it: no pass over logits. A backward that goes again knows logp, and its GEMM
writes gradient rows at once.

A token that is less likely than 2^-90 would take e^d out of range: one look at all odds, before the last
product, and such a call goes through logits instead (`chunked_logits.py`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_lightning.ops.lm_head import fused_gemm_triton as kernels
from grpo_lightning.ops.lm_head.chunked_logits import Logits
from grpo_lightning.ops.lm_head.rows import Inputs, Scores, new_rows, parts, rows_in_budget

MOST_ROWS = 2048
"""of a chunk: more of h would not stay in the second-level cache beside a tile of W"""
MOST_ODDS = 2.0**90
"""e^62; sums and products of such numbers, and their inverses times a gradient, are normal fp32 numbers"""


def suits(hidden: Tensor, weight: Tensor) -> bool:
    """Returns whether this way can be gone: bf16 on a GPU whose copy engine loads tiles, rows it can load."""
    if not (hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16 and _loadable(weight)):
        return False
    gpu = torch.cuda.get_device_properties(hidden.device)
    return gpu.major >= 9 and gpu.shared_memory_per_block_optin >= kernels.SHARED_BYTES


def _loadable(x: Tensor) -> bool:
    size = x.element_size()
    return x.stride(1) == 1 and x.stride(0) * size % 16 == 0 and x.data_ptr() % 16 == 0


@dataclass(frozen=True, slots=True)
class FusedGemmHead:
    """The way; `otherwise` takes calls whose numbers leave the range."""

    otherwise: Logits

    def scale_rows(self, u: Tensor, g: Tensor) -> Tensor:
        """As `LMHeadBackend` says."""
        return self.otherwise.scale_rows(u, g)

    def scores(self, x: Inputs, want_u: bool) -> Scores:
        """As `LMHeadBackend` says."""
        found = _scores(x, want_u)
        return self.otherwise.scores(x, want_u) if found is None else found

    def gradient_rows(
        self, x: Inputs, found: Scores, g: Tensor, e: Tensor | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """As `LMHeadBackend` says; nothing leaves the range here, since the reference is the log-sum-exp.

        With log p_i = t ln 2: p_i (g + e (log p_i + H)) slope, negative, for all but the own column.
        """
        g = g * (x.head.logit_scale / x.tau)
        e = torch.zeros_like(g) if e is None else e * (x.head.logit_scale / x.tau)
        a, b = -g - e * found.entropy, e * -math.log(2)
        mine = -g * found.logp.expm1() - e * found.logp.exp() * (found.logp + found.entropy)
        base = found.logp * kernels.LOG2E
        rows = _rows(x, x.weight.element_size())
        q = _padded(rows, x)
        for at, chunk in _chunks(x, rows):
            size = at.stop - at.start
            reference = kernels.own_logits(chunk) - base[at]
            kernels.multiply(chunk, reference, q[:size], gradient=(a[at], b[at], mine[at]))
            yield at, q[:size]


def _scores(x: Inputs, want_u: bool) -> Scores | None:
    """Returns scores, or None if a number is out of range."""
    logp, entropy, odds = (torch.empty_like(x.tau) for _ in range(3))
    rows = _rows(x, x.weight.element_size() if want_u else 0)
    sums = torch.empty(2 * kernels.column_tiles(len(x.weight)) * rows, dtype=x.tau.dtype, device=x.tau.device)
    u, e = (new_rows(x), _padded(rows, x)) if want_u else (None, None)
    for at, chunk in _chunks(x, rows):
        size = at.stop - at.start
        own = kernels.own_logits(chunk)
        mine = sums[: len(sums) // rows * size].view(2, -1, size)
        part = None if e is None else e[:size]
        kernels.multiply(chunk, own, part, mine)
        kernels.finish(chunk, own, mine, part, (logp[at], entropy[at], odds[at]))
        # The one wait for the GPU, which has a product to do while Python goes on. NaN is out of range too.
        if at.stop == len(odds) and not bool((odds < MOST_ODDS).all()):
            return None
        if u is not None and part is not None:
            torch.mm(part, x.weight, out=u[at])
    k = x.head.logit_scale / x.tau / -(1 + odds) if want_u else None
    return Scores(logp, entropy, u, k)


def _rows(x: Inputs, entry_bytes: int) -> int:
    """Returns how many rows a chunk has that writes `entry_bytes` per vocabulary entry."""
    n, vocabulary = len(x.hidden), len(x.weight)
    row_bytes = entry_bytes * (vocabulary + 7) + 8 * kernels.column_tiles(vocabulary)
    return min(x.rows or min(rows_in_budget(n, row_bytes, x.hidden.device), MOST_ROWS), max(n, 1))


def _padded(rows: int, x: Inputs) -> Tensor:
    """Returns memory for [rows, V] in the weight's type, whose rows start where the copy engine can store."""
    vocabulary = len(x.weight)
    padded = (vocabulary + 7) // 8 * 8
    return torch.empty(rows, padded, dtype=x.weight.dtype, device=x.weight.device)[:, :vocabulary]


def _chunks(x: Inputs, rows: int) -> Iterator[tuple[slice, Inputs]]:
    """Yields rows and the call for them."""
    for at in parts(len(x.hidden), rows):
        hidden = x.hidden[at]
        if not _loadable(hidden):
            hidden = hidden.clone(memory_format=torch.contiguous_format)
        yield at, x._replace(hidden=hidden, ids=x.ids[at], tau=x.tau[at])
