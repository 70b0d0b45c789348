"""Log-probabilities of chosen tokens straight from hidden states, chunk by chunk: no [N, V] tensor is made.

With a frozen head the gradient of a log-probability with respect to its hidden row does not depend on the
loss:
    u_n = d logp_n / d h_n = W^T (onehot(y_n) - softmax(z_n / tau)) / tau,
so the forward builds U [N, H] while a chunk of the vocabulary is at hand, and the backward only scales its
rows: two matrix multiplies for forward and backward, whatever the loss. A trainable head, and a gradient
through the entropies, go through the vocabulary again in the backward.

Two ways lead through the vocabulary (`LMHeadBackend`): `fused_gemm.py` for bf16 on a GPU that loads tiles by
itself, where a GEMM ends in exponentials and no logits are written; `chunked_logits.py` for all else.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_lightning.ops.lm_head import rows as torch_twin
from grpo_lightning.ops.lm_head.chunked_logits import Logits
from grpo_lightning.ops.lm_head.rows import Head, Inputs, LMHeadBackend, Scores
from grpo_lightning.ops.matmul import wide_product
from grpo_lightning.utils.dispatch import use_triton


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
        entropy_grad: whether the entropies carry a gradient; it costs a third product with a frozen head.
        chunk_rows: rows that go through the vocabulary at one time; None derives them from a memory budget.
        backend: torch, triton, or auto, which is triton on CUDA.

    Raises:
        ValueError: `temperature` is not positive.
    """
    if not isinstance(temperature, Tensor) and temperature <= 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities need one above 0")
    tau = temperatures(temperature, hidden)
    chosen = _head_backend(hidden, weight, backend if tau.dtype == torch.float32 else "torch")
    call, ids = Call(Head(softcap, logit_scale), chunk_rows, chosen), ids.contiguous()
    head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    with torch.autocast(hidden.device.type, enabled=False):
        if torch.is_grad_enabled() and (head_trains or (entropy_grad and hidden.requires_grad)):
            logp, entropy = _RecomputedGrad.apply(hidden, weight, bias, ids, tau, call)  # pyright: ignore
        elif torch.is_grad_enabled() and hidden.requires_grad:
            logp, entropy = _PrecomputedGrad.apply(hidden, weight, bias, ids, tau, call)  # pyright: ignore
        else:
            logp, entropy, *_ = chosen.scores(call.on(hidden, weight, bias, ids, tau), want_u=False)
    return logp, entropy if entropy_grad else entropy.detach()


def temperatures(temperature: float | Tensor, hidden: Tensor) -> Tensor:
    """Returns [N] temperatures in the type that logits are made in."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if isinstance(temperature, Tensor):
        return temperature.to(hidden.device, wide).expand(hidden.shape[0]).contiguous()
    return torch.full((hidden.shape[0],), temperature, dtype=wide, device=hidden.device)


def _head_backend(hidden: Tensor, weight: Tensor, backend: str) -> LMHeadBackend:
    if not use_triton(hidden.device, backend):
        return Logits(torch_twin)
    from grpo_lightning.ops.lm_head import fused_gemm as head_gemm
    from grpo_lightning.ops.lm_head import rows_triton as head_triton

    logits = Logits(head_triton)
    return head_gemm.FusedGemmHead(logits) if head_gemm.suits(hidden, weight) else logits


class Call(NamedTuple):
    """What is no tensor of a call."""

    head: Head
    rows: int | None
    backend: LMHeadBackend

    def on(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, tau: Tensor) -> Inputs:
        """Returns the whole call."""
        return Inputs(hidden, weight, bias, ids, tau, self.head, self.rows)


class _PrecomputedGrad(torch.autograd.Function):
    """A frozen head: the forward builds d logp / d hidden, which the backward scales."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, tau: Tensor, call: Call
    ) -> tuple[Tensor, Tensor]:
        logp, entropy, u, k = call.backend.scores(call.on(hidden, weight, bias, ids, tau), want_u=True)
        ctx.save_for_backward(u, k)
        ctx.scale = call.backend.scale_rows
        ctx.mark_non_differentiable(entropy)
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, _e: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None, None, None, None
        u, k = ctx.saved_tensors
        return ctx.scale(u, g if k is None else g * k), None, None, None, None, None


class _RecomputedGrad(torch.autograd.Function):
    """The backward goes through the vocabulary again, for gradients that only it can know."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, tau: Tensor, call: Call
    ) -> tuple[Tensor, Tensor]:
        logp, entropy, *_ = call.backend.scores(call.on(hidden, weight, bias, ids, tau), want_u=False)
        ctx.save_for_backward(hidden, weight, bias, ids, tau, logp, entropy)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, e: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, tau, logp, entropy = ctx.saved_tensors
        call: Call = ctx.call
        want_h, want_w, want_b, *_ = ctx.needs_input_grad
        dh = torch.empty_like(hidden) if want_h else None
        dw = torch.zeros_like(weight, dtype=tau.dtype) if want_w else None
        db = torch.zeros_like(bias, dtype=tau.dtype) if want_b else None
        x, found = call.on(hidden, weight, bias, ids, tau), Scores(logp, entropy)
        for at, q in call.backend.gradient_rows(x, found, torch.zeros_like(tau) if g is None else g, e):
            if dh is not None:
                torch.mm(q, weight, out=dh[at])
            if dw is not None:
                dw += wide_product(q.T, hidden[at])
            if db is not None:
                db += q.sum(0, dtype=db.dtype)
        dw = None if dw is None else dw.to(weight.dtype)
        db = None if db is None else db.to(bias.dtype)
        return dh, dw, db, None, None, None
