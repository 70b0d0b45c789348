"""Attention over segments of one packed row, and over prompts that several completions share.

For shared prompts two calls are merged: (i) every prompt and every completion looks at itself, causally;
(ii) the completions of a group look at their prompt. With l the log-sum-exps and o the outputs of both,
    l = logaddexp(l1, l2),  o = exp(l1 - l) o1 + exp(l2 - l) o2.
Each call's own backward, given the merged o and l, is the gradient of the whole softmax over its part of the
keys, and the parts add up.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_lightning.ops.attention.shared_prompts import SharedPrompts, Spans


class Kernels(Protocol):
    """Attention of segments: q [Tq, heads, D], k and v [Tk, kv_heads, D]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
        """Returns out [Tq, heads, D] and log-sum-exp [heads, Tq] fp32."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Returns dq, dk and dv for probabilities exp(scale q k - lse), whatever else `lse` holds."""
        ...

    def merge(self, out: Tensor, lse: Tensor, more: Tensor, mass: Tensor) -> None:
        """Makes of two softmaxes [Tq, heads, D], [heads, Tq] the one over both; in `out`, `lse`, `mass`."""
        ...


class Flash:
    """torch's own variable-length flash attention: half types on CUDA, no other package.

    The operators behind `torch.nn.attention.varlen` are private; they are named here and nowhere else.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
        """Returns out and log-sum-exp."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, spans.query, spans.key, spans.longest_query, spans.longest_key, 0.0, spans.causal,
            return_debug_mask=False, scale=scale,
        )  # fmt: skip
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Returns dq, dk, dv."""
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # state of the dropout that there is not
        return torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse, spans.query, spans.key, spans.longest_query, spans.longest_key, 0.0,
            spans.causal, unused, torch.empty(0, device=q.device), scale=scale,
        )  # fmt: skip

    def merge(self, out: Tensor, lse: Tensor, more: Tensor, mass: Tensor) -> None:
        """Merges in one kernel."""
        from grpo_lightning.ops.attention import varlen_triton

        varlen_triton.merge(out, lse, more, mass)


class Dense:
    """The same in plain torch, segment by segment: the oracle, on any device and in any type."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
        """Returns out and log-sum-exp."""
        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
        for a, b in _pairs(spans):
            scores = self._scores(q[a], k[b], spans.causal, scale)
            lse[:, a] = scores.logsumexp(-1)
            out[a] = torch.einsum("hqk,khd->qhd", (scores - lse[:, a, None]).exp(), _wide(v[b], q))
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Returns dq, dk, dv."""
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for a, b in _pairs(spans):
            p = (self._scores(q[a], k[b], spans.causal, scale) - lse[:, a, None]).exp()
            dp = torch.einsum("qhd,khd->hqk", dout[a], _wide(v[b], q))
            ds = p * (dp - (dout[a] * out[a]).sum(-1).T[:, :, None]) * scale
            dq[a] = torch.einsum("hqk,khd->qhd", ds, _wide(k[b], q))
            dk[b] += _narrow(torch.einsum("hqk,qhd->khd", ds, q[a]), k)
            dv[b] += _narrow(torch.einsum("hqk,qhd->khd", p, dout[a]), v)
        return dq, dk, dv

    def merge(self, out: Tensor, lse: Tensor, more: Tensor, mass: Tensor) -> None:
        """Merges in plain torch."""
        whole = torch.logaddexp(lse, mass)
        share, rest = ((x - whole).exp().T[:, :, None] for x in (lse, mass))
        out.copy_(share * out + rest * more)
        lse.copy_(whole)
        mass.copy_(whole)

    def _scores(self, q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        scores = torch.einsum("qhd,khd->hqk", q, _wide(k, q)) * scale
        if causal:
            ahead = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(ahead, -torch.inf)
        return scores


def _pairs(spans: Spans) -> list[tuple[slice, slice]]:
    q, k = spans.query.tolist(), spans.key.tolist()
    return [(slice(q[i], q[i + 1]), slice(k[i], k[i + 1])) for i in range(len(q) - 1)]


def _wide(kv: Tensor, q: Tensor) -> Tensor:
    """Returns keys or values repeated to one per query head."""
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], 1)


def _narrow(grad: Tensor, kv: Tensor) -> Tensor:
    """Returns gradients summed over the query heads that share a key head."""
    return grad.view(grad.shape[0], kv.shape[1], -1, grad.shape[2]).sum(2)


def shared_prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: SharedPrompts, scale: float, kernels: Kernels
) -> Tensor:
    """Returns [T, heads, D]: each token attends to its prompt and to its own completion, causally.

    Args:
        q: [T, heads, D].
        k: [T, kv_heads, D]; heads is a multiple of kv_heads.
        v: [T, kv_heads, D].
        layout: where prompts and completions lie; rows stand in its `order`.
        scale: multiplies q . k.
        kernels: `Flash()` or `Dense()`.
    """
    return _SharedPrompts.apply(q, k, v, layout, scale, kernels)  # pyright: ignore[reportReturnType]


class _SharedPrompts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: SharedPrompts, scale: float, kernels: Kernels
    ) -> Tensor:
        out, lse = kernels.forward(q, k, v, layout.self_attention, scale)
        c, p = layout.completions, layout.prompts
        mass = None
        if c.start < c.stop:
            more, mass = kernels.forward(q[c], k[p], v[p], layout.prefix_attention, scale)
            kernels.merge(out[c], lse[:, c], more, mass)
        ctx.save_for_backward(q, k, v, out, lse, mass)
        ctx.call = (layout, scale, kernels)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, mass = ctx.saved_tensors
        layout, scale, kernels = ctx.call
        dout = dout.contiguous()
        dq, dk, dv = kernels.backward(dout, q, k, v, out, lse, layout.self_attention, scale)
        c, p = layout.completions, layout.prompts
        if mass is not None:
            parts = kernels.backward(dout[c], q[c], k[p], v[p], out[c], mass, layout.prefix_attention, scale)
            for whole, rows, part in zip((dq, dk, dv), (c, p, p), parts, strict=True):
                whole[rows] += part
        return dq, dk, dv, None, None, None
