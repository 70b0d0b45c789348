"""How logits are made of hidden states and what a chunk of them says: the torch twin of `rows_triton.py`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

CHUNK_BYTES = {"cuda": 600 << 20, "cpu": 64 << 20}
"""memory for what one chunk writes per vocabulary entry"""


@dataclass(frozen=True, slots=True)
class Head:
    """The constants of one call: logits are softcap(logit_scale (h W^T + bias)) / temperature."""

    softcap: float | None = None
    logit_scale: float = 1.0

    def tempered(self, z: Tensor, tau: Tensor) -> Tensor:
        """Returns tempered logits [C, V] from raw ones; may destroy `z`."""
        z = z.mul_(self.logit_scale) if self.logit_scale != 1.0 else z
        if self.softcap is not None:
            z = torch.tanh_(z.div_(self.softcap)).mul_(self.softcap)
        return z.div_(tau[:, None])

    def slope(self, x: Tensor, tau: Tensor) -> Tensor:
        """Returns d tempered / d raw, [C, 1] or [C, V], at tempered logits `x`."""
        slope = (self.logit_scale / tau)[:, None]
        return slope if self.softcap is None else slope * (1 - (x * tau[:, None] / self.softcap) ** 2)


class Inputs(NamedTuple):
    """One call of `fused_linear_logprobs`."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    ids: Tensor  # [N] int64
    tau: Tensor  # [N] temperatures, in the type of the results
    head: Head
    rows: int | None  # of a chunk; None derives them from a memory budget


class Scores(NamedTuple):
    """What a call says of its tokens; u times k is d logp / d hidden."""

    logp: Tensor  # [N]
    entropy: Tensor  # [N]
    u: Tensor | None = None  # [N, H] in the type of hidden
    k: Tensor | None = None  # [N] in the type of logp; None is 1


def new_rows(x: Inputs) -> Tensor:
    """Returns memory for u [N, H]; rows of stride 1, whatever the strides of hidden."""
    return torch.empty(x.hidden.shape, dtype=x.hidden.dtype, device=x.hidden.device)


class LMHeadBackend(Protocol):
    """A way through the vocabulary, chunk by chunk: `chunked_logits.py`, `fused_gemm.py`."""

    def scale_rows(self, u: Tensor, g: Tensor) -> Tensor:
        """Returns g[:, None] * u in the type of u, rounded once."""
        ...

    def scores(self, x: Inputs, want_u: bool) -> Scores:
        """Returns log-probabilities and entropies, and the rows of their gradient if wanted."""
        ...

    def gradient_rows(
        self, x: Inputs, found: Scores, g: Tensor, e: Tensor | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yields rows `at` and [C, V] g d logp / d raw + e d entropy / d raw in the weight's type.

        All chunks lie in the same memory: use one before asking for the next.

        Args:
            x: the call.
            found: what `scores` gave, by whichever backend.
            g: [N].
            e: [N]; None is 0.
        """
        ...


def rows_in_budget(n: int, row_bytes: int, device: torch.device) -> int:
    """Returns how many rows of `row_bytes` exist at one time: a budget's worth, in steps that suit a GEMM."""
    rows = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // row_bytes
    rows = rows // 128 * 128 if rows >= 128 else max(rows, 1)
    return min(rows, max(n, 1))


def parts(n: int, rows: int) -> Iterator[slice]:
    """Yields 0..n in pieces of `rows`."""
    for start in range(0, n, rows):
        yield slice(start, min(start + rows, n))


def score_rows(
    z: Tensor,
    ids: Tensor,
    tau: Tensor,
    head: Head,
    bias: Tensor | None,
    q: Tensor | None = None,
    g: Tensor | None = None,
    e: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns log-probabilities [C] and entropies [C] of raw logits `z`, and fills `q` with gradient rows.

    q = g d logp / d raw + e d entropy / d raw. Near-certain tokens keep their precision:
    logp = -softplus(log-sum-exp of the others - own logit).

    Args:
        z: [C, V] fp32 or fp64; destroyed.
        ids: [C] int64.
        tau: [C] temperatures, of the type of `z`.
        head: softcap and scale.
        bias: [V] or None.
        q: [C, V] of any type, or None; may lie over `z`.
        g: [C]; None is 1.
        e: [C]; None is 0.
    """
    x = head.tempered(z if bias is None else z.add_(bias), tau)
    own = x.gather(1, ids[:, None])
    others = x.scatter(1, ids[:, None], -torch.inf).logsumexp(1)
    odds = others - own[:, 0]
    logp_all = x - torch.logaddexp(others, own[:, 0])[:, None]
    p = logp_all.exp()
    entropy = -(logp_all * p).sum(1)
    if q is not None:
        d = -p
        d.scatter_(1, ids[:, None], torch.sigmoid(odds)[:, None])
        d = d if g is None else d.mul_(g[:, None])
        d = d if e is None else d.sub_(p.mul_(logp_all.add_(entropy[:, None])).mul_(e[:, None]))
        q.copy_(d.mul_(head.slope(x, tau)))
    return -torch.nn.functional.softplus(odds), entropy


def scale_rows(x: Tensor, g: Tensor) -> Tensor:
    """Returns g[:, None] * x in the type of x, rounded once."""
    return (x * g[:, None]).to(x.dtype)
