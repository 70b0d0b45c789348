"""Log-probabilities of chosen tokens straight from hidden states, chunk by chunk: no [N, V] tensor is ever
made.

With a frozen head the gradient of a log-probability with respect to its hidden row does not depend on the
loss:
    u_n = d logp_n / d h_n = W^T (onehot(y_n) - softmax(z_n / tau)) / tau,
so the forward builds U [N, H] while a chunk of logits is at hand, and the backward only scales its rows: two
matrix
multiplies for forward and backward, whatever the loss. A trainable head recomputes its chunks in the
backward.
"""

from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 64 << 20
"""memory for the logits of one chunk"""


def fused_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy_grad: bool = False,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns log-probabilities [N] and entropies [N] of softmax((hidden @ weight.T) / temperature), fp32, in
    nats.

    Near-certain tokens keep their precision: logp = -softplus(logsumexp of the others - own logit).

    Args:
        hidden: [N, H].
        weight: [V, H], the LM head; trains if it requires grad.
        ids: [N] int64, the chosen tokens.
        temperature: > 0, divides the logits.
        bias: [V] of the head.
        softcap: logits become softcap * tanh(logits / softcap) before the temperature.
        logit_scale: multiplies the logits before the softcap.
        entropy_grad: whether the entropies carry a gradient (they cost memory for another [N, H] then).
        chunk_rows: rows whose logits exist at one time; default: `CHUNK_BYTES` worth.

    Raises:
        ValueError: `temperature` is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities need one above 0")
    head = Head(temperature, softcap, logit_scale, chunk_rows, weight.shape[0])
    grad = torch.is_grad_enabled()
    wants_hidden = grad and hidden.requires_grad
    wants_head = grad and (weight.requires_grad or (bias is not None and bias.requires_grad))
    with torch.autocast(hidden.device.type, enabled=False):
        if wants_head:
            logp, entropy = _TrainableHead.apply(hidden, weight, bias, ids, head)  # pyright: ignore
        elif wants_hidden:
            logp, entropy = _FrozenHead.apply(hidden, weight, bias, ids, head, entropy_grad)  # pyright: ignore
        else:
            logp, entropy = _values(hidden, weight, bias, ids, head)
    return logp, entropy if entropy_grad else entropy.detach()


class Head:
    """The constants of one call: how logits are made of hidden states, and how many rows at one time."""

    __slots__ = ("chunk_rows", "logit_scale", "softcap", "temperature")

    def __init__(
        self,
        temperature: float,
        softcap: float | None,
        logit_scale: float,
        chunk_rows: int | None,
        vocabulary: int,
    ) -> None:
        self.temperature, self.softcap, self.logit_scale = temperature, softcap, logit_scale
        self.chunk_rows = chunk_rows or max(CHUNK_BYTES // (4 * vocabulary), 1)

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns z [C, V] in fp32 (fp64 for fp64 inputs), and dz/d(hidden @ W^T) if not constant."""
        z = _matmul_fp32(hidden, weight.T)
        if bias is not None:
            z += bias
        if self.logit_scale != 1.0:
            z *= self.logit_scale
        slope = None
        if self.softcap is not None:
            t = torch.tanh(z.div_(self.softcap))
            slope = (1 - t * t) * (self.logit_scale / self.temperature)
            z = t.mul_(self.softcap)
        return z.div_(self.temperature), slope

    def chunks(self, n: int) -> list[slice]:
        return [slice(i, min(i + self.chunk_rows, n)) for i in range(0, n, self.chunk_rows)]


def _matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Returns a @ b with fp32 output (fp64 for fp64 inputs), without rounding the product to a half type."""
    if a.dtype == b.dtype and a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda and a.dtype == b.dtype:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _row_values(z: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns logp, entropy, log-sum-exp and 1 - p_y, each [C], from tempered logits z [C, V]."""
    own = z.gather(1, ids[:, None])
    others = z.scatter(1, ids[:, None], -torch.inf).logsumexp(1)
    own = own[:, 0]
    odds = others - own
    lse = torch.logaddexp(others, own)
    logp = z - lse[:, None]
    entropy = -logp.mul_(logp.exp()).sum(1)
    return -torch.nn.functional.softplus(odds), entropy, lse, torch.sigmoid(odds)


def _logit_grad(
    z: Tensor, ids: Tensor, values: tuple[Tensor, Tensor, Tensor, Tensor], g: Tensor | None, e: Tensor | None
) -> Tensor:
    """Returns g * d logp/dz + e * d entropy/dz, [C, V]; destroys z. None is 0."""
    _, entropy, lse, rest = values
    logp = z.sub_(lse[:, None])
    p = logp.exp()
    out = torch.zeros_like(p) if g is None else p * -g[:, None]
    if g is not None:
        out.scatter_(1, ids[:, None], (rest * g)[:, None])
    if e is not None:
        out -= p.mul_(logp.add_(entropy[:, None])).mul_(e[:, None])
    return out


def _values(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, head: Head
) -> tuple[Tensor, Tensor]:
    n = hidden.shape[0]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logp, entropy = hidden.new_empty(n, dtype=dtype), hidden.new_empty(n, dtype=dtype)
    for c in head.chunks(n):
        z, _ = head.logits(hidden[c], weight, bias)
        logp[c], entropy[c], _, _ = _row_values(z, ids[c])
    return logp, entropy


def _to_raw(dz: Tensor, slope: Tensor | None, head: Head) -> Tensor:
    """Returns the gradient at hidden @ weight.T from that at the tempered logits."""
    return dz.mul_(slope) if slope is not None else dz.mul_(head.logit_scale / head.temperature)


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        head: Head,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        n = hidden.shape[0]
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logp, entropy = hidden.new_empty(n, dtype=dtype), hidden.new_empty(n, dtype=dtype)
        u, v = torch.empty_like(hidden), torch.empty_like(hidden) if entropy_grad else None
        for c in head.chunks(n):
            z, slope = head.logits(hidden[c], weight, bias)
            values = _row_values(z, ids[c])
            logp[c], entropy[c] = values[0], values[1]
            one = torch.ones_like(values[0])
            if v is not None:
                dz = _to_raw(_logit_grad(z.clone(), ids[c], values, None, one), slope, head)
                v[c] = dz.to(weight.dtype) @ weight
            u[c] = _to_raw(_logit_grad(z, ids[c], values, one, None), slope, head).to(weight.dtype) @ weight
        ctx.save_for_backward(u, v)
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, e: Tensor | None) -> tuple[Tensor | None, ...]:
        u, v = ctx.saved_tensors
        parts = [k[:, None] * d for k, d in ((g, u), (e, v)) if k is not None and d is not None]
        dh = reduce(torch.add, parts).to(u.dtype) if parts else None
        return dh, None, None, None, None, None


class _TrainableHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, head: Head
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, bias, ids)
        ctx.head = head
        ctx.set_materialize_grads(False)
        return _values(hidden, weight, bias, ids, head)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, e: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids = ctx.saved_tensors
        head: Head = ctx.head
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        dh = torch.zeros_like(hidden)
        dw = torch.zeros_like(weight, dtype=wide)
        db = None if bias is None else torch.zeros_like(bias, dtype=wide)
        for c in head.chunks(hidden.shape[0]):
            z, slope = head.logits(hidden[c], weight, bias)
            values = _row_values(z, ids[c])
            dz = _logit_grad(z, ids[c], values, None if g is None else g[c], None if e is None else e[c])
            dz = _to_raw(dz, slope, head)
            dh[c] = dz.to(weight.dtype) @ weight
            dw += _matmul_fp32(dz.to(hidden.dtype).T, hidden[c])
            if db is not None:
                db += dz.sum(0)
        return dh, dw.to(weight.dtype), None if db is None else db.to(weight.dtype), None, None
