"""Log-probabilities of chosen tokens straight from hidden states, chunk by chunk: no [N, V] tensor is made.

With a frozen head the gradient of a log-probability with respect to its hidden row does not depend on the
loss:
    u_n = d logp_n / d h_n = W^T (onehot(y_n) - softmax(z_n / tau)) / tau,
so the forward builds U [N, H] while a chunk of logits is at hand, and the backward only scales its rows: two
matrix multiplies for forward and backward, whatever the loss. A trainable head recomputes its chunks in the
backward.
"""

from collections.abc import Iterator
from functools import reduce
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_lightning.ops import head as torch_twin
from grpo_lightning.ops.dispatch import use_triton
from grpo_lightning.ops.head import Head, rows_in_budget
from grpo_lightning.ops.products import wide_product, wide_product_into


def fused_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy_grad: bool = False,
    chunk_rows: int | None = None,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Returns log-probabilities [N] and entropies [N] of softmax((hidden @ weight.T) / temperature).

    Both in fp32 (fp64 for fp64 inputs), in nats; never above 0, never below 0.

    Args:
        hidden: [N, H].
        weight: [V, H], the LM head; trains if it requires grad.
        ids: [N] int64, the chosen tokens.
        temperature: > 0, divides the logits; a number, or [N].
        bias: [V] of the head.
        softcap: logits become softcap * tanh(logits / softcap) before the temperature.
        logit_scale: multiplies the logits before the softcap.
        entropy_grad: whether the entropies carry a gradient (they cost memory for another [N, H] then).
        chunk_rows: rows whose logits exist at one time; None derives them from a memory budget.
        backend: torch, triton, or auto, which is triton on CUDA.

    Raises:
        ValueError: `temperature` is not positive.
    """
    if not isinstance(temperature, Tensor) and temperature <= 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities need one above 0")
    tau = temperatures(temperature, hidden)
    size = chunk_rows or rows_in_budget(hidden.shape[0], weight.shape[0], hidden.device)
    kernels = _kernels(hidden.device, backend if tau.dtype == torch.float32 else "torch")
    call = Call(Head(softcap, logit_scale), size, kernels)
    grad = torch.is_grad_enabled()
    with torch.autocast(hidden.device.type, enabled=False):
        if grad and (weight.requires_grad or (bias is not None and bias.requires_grad)):
            logp, entropy = _TrainableHead.apply(hidden, weight, bias, ids, tau, call)  # pyright: ignore
        elif grad and hidden.requires_grad:
            logp, entropy = _FrozenHead.apply(hidden, weight, bias, ids, tau, call, entropy_grad)  # pyright: ignore
        else:
            logp, entropy = _values(hidden, weight, bias, ids, tau, call)
    return logp, entropy if entropy_grad else entropy.detach()


def temperatures(temperature: float | Tensor, hidden: Tensor) -> Tensor:
    """Returns [N] temperatures in the type that logits are made in."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if isinstance(temperature, Tensor):
        return temperature.to(hidden.device, wide).expand(hidden.shape[0]).contiguous()
    return torch.full((hidden.shape[0],), temperature, dtype=wide, device=hidden.device)


def _kernels(device: torch.device, backend: str) -> ModuleType:
    if not use_triton(device, backend):
        return torch_twin
    from grpo_lightning.ops import head_triton

    return head_triton


class Call(NamedTuple):
    """What is constant over the chunks of one call."""

    head: Head
    rows: int
    kernels: ModuleType


class Chunk(NamedTuple):
    at: slice
    z: Tensor  # [C, V] raw logits
    q: Tensor  # [C, V] in the weight's type, over the same memory


def chunks(hidden: Tensor, weight: Tensor, call: Call) -> Iterator[Chunk]:
    """Yields the logits of one chunk after the other, all in the same memory."""
    n, vocabulary = hidden.shape[0], weight.shape[0]
    if not n:
        return
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    buffer = torch.empty(min(call.rows, n), vocabulary, dtype=wide, device=hidden.device)
    narrow = buffer.view(weight.dtype)[:, :vocabulary]
    for start in range(0, n, call.rows):
        at = slice(start, min(start + call.rows, n))
        size = at.stop - start
        yield Chunk(at, wide_product_into(hidden[at], weight.T, buffer[:size]), narrow[:size])


def _values(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, tau: Tensor, call: Call
) -> tuple[Tensor, Tensor]:
    logp, entropy = torch.empty_like(tau), torch.empty_like(tau)
    for at, z, _ in chunks(hidden, weight, call):
        logp[at], entropy[at] = call.kernels.score_rows(z, ids[at], tau[at], call.head, bias)
    return logp, entropy


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        tau: Tensor,
        call: Call,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        logp, entropy = torch.empty_like(tau), torch.empty_like(tau)
        u, v = torch.empty_like(hidden), torch.empty_like(hidden) if entropy_grad else None
        score = call.kernels.score_rows
        for at, z, q in chunks(hidden, weight, call):
            args = (ids[at], tau[at], call.head, bias)
            if v is not None:
                one = torch.ones_like(args[1])
                p = torch.empty(z.shape, dtype=weight.dtype, device=z.device)
                score(z.clone(), *args, q=p, g=torch.zeros_like(one), e=one)
                torch.mm(p, weight, out=v[at])
            logp[at], entropy[at] = score(z, *args, q=q)
            torch.mm(q, weight, out=u[at])
        ctx.save_for_backward(u, v)
        ctx.scale = call.kernels.scale_rows
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, e: Tensor | None) -> tuple[Tensor | None, ...]:
        u, v = ctx.saved_tensors
        parts = [ctx.scale(d, k) for k, d in ((g, u), (e, v)) if k is not None and d is not None]
        dh = reduce(torch.add, parts) if parts else None
        return dh, None, None, None, None, None, None


class _TrainableHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, tau: Tensor, call: Call
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, bias, ids, tau)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return _values(hidden, weight, bias, ids, tau, call)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, e: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, tau = ctx.saved_tensors
        call: Call = ctx.call
        dh = torch.zeros_like(hidden)
        dw = torch.zeros_like(weight, dtype=tau.dtype)
        db = None if bias is None else torch.zeros_like(bias, dtype=tau.dtype)
        zero = torch.zeros_like(tau) if g is None else g
        for at, z, q in chunks(hidden, weight, call):
            mine = None if e is None else e[at].contiguous()
            gs = zero[at].contiguous()
            call.kernels.score_rows(z, ids[at], tau[at], call.head, bias, q=q, g=gs, e=mine)
            torch.mm(q, weight, out=dh[at])
            dw += wide_product(q.T, hidden[at])
            if db is not None:
                db += q.sum(0, dtype=db.dtype)
        db = None if db is None or bias is None else db.to(bias.dtype)
        return dh, dw.to(weight.dtype), db, None, None, None
