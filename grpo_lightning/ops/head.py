"""How logits are made of hidden states and what a chunk of them says: the torch twin of `head_triton.py`."""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_BYTES = {"cuda": 600 << 20, "cpu": 64 << 20}
"""memory for the logits of one chunk"""


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


def rows_in_budget(n: int, vocabulary: int, device: torch.device) -> int:
    """Returns how many rows of logits exist at one time: a budget's worth, in steps that suit a GEMM."""
    rows = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // (4 * vocabulary)
    rows = rows // 128 * 128 if rows >= 128 else max(rows, 1)
    return min(rows, max(n, 1))


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
