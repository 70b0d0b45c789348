"""The kept set of truncated sampling (top_p, top_k, min_p), and how much of a policy's mass lies in it.

An engine that samples from a kept set reports log-probabilities of the renormalised distribution. They
compare with a full-vocabulary policy once the log of the kept mass is added.
"""

import math

import torch
from torch import Tensor

from grpo_lightning.ops.lm_head.chunked_logits import chunks
from grpo_lightning.ops.lm_head.logprobs import temperatures
from grpo_lightning.ops.lm_head.rows import Head, Inputs
from grpo_lightning.types import Truncation


def truncate(z: Tensor, kept: Truncation) -> Tensor:
    """Returns tempered logits [R, V] with -inf outside the kept set: min_p, top_k, top_p, in vLLM's order."""
    if kept.min_p:
        floor = z.max(-1, keepdim=True).values + math.log(kept.min_p)
        z = z.masked_fill(z < floor, -torch.inf)
    if 0 < kept.top_k < z.shape[1]:
        z = z.masked_fill(z < z.topk(kept.top_k, -1).values[:, -1:], -torch.inf)
    if kept.top_p < 1:
        ordered, order = z.sort(-1, descending=True)
        mass = ordered.softmax(-1)
        drop = torch.zeros_like(z, dtype=torch.bool).scatter(1, order, mass.cumsum(-1) - mass >= kept.top_p)
        z = z.masked_fill(drop, -torch.inf)
    return z


@torch.no_grad()
def kept_logmass(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    *,
    kept: Truncation,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """Returns log of the sum over the kept set of p(v), [N] in nats, without gradient; never above 0.

    The sampled token counts as kept: at the edge of the set two implementations round differently.

    Args:
        hidden: [N, H].
        weight: [V, H], the LM head.
        ids: [N] int64, the sampled tokens.
        temperature: divides the logits, before the set is formed.
        kept: what forms the set.
        bias: [V] of the head.
        softcap: as in `fused_linear_logprobs`.
        logit_scale: as in `fused_linear_logprobs`.
        chunk_rows: rows whose logits exist at one time.
    """
    tau = temperatures(temperature, hidden)
    call = Inputs(hidden, weight, bias, ids, tau, Head(softcap, logit_scale), chunk_rows)
    out = torch.empty_like(tau)
    with torch.autocast(hidden.device.type, enabled=False):
        for at, z, _ in chunks(call):
            x = call.head.tempered(z if bias is None else z.add_(bias), tau[at])
            own = ids[at, None]
            inside = truncate(x, kept).scatter(1, own, x.gather(1, own))
            out[at] = (inside.logsumexp(1) - x.logsumexp(1)).clamp(max=0.0)
    return out
