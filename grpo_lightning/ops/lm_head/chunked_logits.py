"""Through fp32 logits: a chunk is made, read for its log-probabilities and overwritten with gradient rows.

Any type, any device, any logits; `fused_gemm.py` is the faster way where it can be gone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_lightning.ops.lm_head.rows import Inputs, Scores, new_rows, parts, rows_in_budget
from grpo_lightning.ops.matmul import wide_product_into


class Chunk(NamedTuple):
    at: slice
    z: Tensor  # [C, V] raw logits
    q: Tensor  # [C, V] in the weight's type; on a GPU over the same memory


def chunks(x: Inputs) -> Iterator[Chunk]:
    """Yields the logits of one chunk after the other, all in the same memory."""
    n, vocabulary = x.hidden.shape[0], x.weight.shape[0]
    if not n:
        return
    rows = min(x.rows or rows_in_budget(n, 4 * vocabulary, x.hidden.device), n)
    buffer = torch.empty(rows, vocabulary, dtype=x.tau.dtype, device=x.hidden.device)
    narrow = buffer.view(x.weight.dtype)[:, :vocabulary]
    if not narrow.is_cuda and not narrow.is_contiguous():
        # oneDNN's bf16 product on AMX reads past the end of strided rows, and 0 times what lies there is NaN
        narrow = torch.empty(rows, vocabulary, dtype=narrow.dtype)
    for at in parts(n, rows):
        size = at.stop - at.start
        yield Chunk(at, wide_product_into(x.hidden[at], x.weight.T, buffer[:size]), narrow[:size])


@dataclass(frozen=True, slots=True)
class Logits:
    """The way; `kernels` is `rows.py` or its Triton form."""

    kernels: ModuleType

    def scale_rows(self, u: Tensor, g: Tensor) -> Tensor:
        """As `LMHeadBackend` says."""
        return self.kernels.scale_rows(u, g)

    def scores(self, x: Inputs, want_u: bool) -> Scores:
        """As `LMHeadBackend` says."""
        logp, entropy = torch.empty_like(x.tau), torch.empty_like(x.tau)
        u = new_rows(x) if want_u else None
        for at, z, q in chunks(x):
            logp[at], entropy[at] = self.kernels.score_rows(
                z, x.ids[at], x.tau[at], x.head, x.bias, q=None if u is None else q
            )
            if u is not None:
                torch.mm(q, x.weight, out=u[at])
        return Scores(logp, entropy, u)

    def gradient_rows(
        self, x: Inputs, found: Scores, g: Tensor, e: Tensor | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """As `LMHeadBackend` says; logits say all anew, so `found` is not needed."""
        g, e = g.contiguous(), None if e is None else e.contiguous()
        for at, z, q in chunks(x):
            mine = None if e is None else e[at]
            self.kernels.score_rows(z, x.ids[at], x.tau[at], x.head, x.bias, q=q, g=g[at], e=mine)
            yield at, q
