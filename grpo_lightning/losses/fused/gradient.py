"""The loss, its gradient and its statistics in one call over the [N] tokens of a micro-batch.

A backend is a function that returns a `LossGrad`; what calls `policy_loss` does not see which one ran. The
torch twin differentiates the tables of `losses/` as they are, so it holds for every row, a user's own too.
"""

import warnings
from functools import cache
from typing import Any, Unpack

import torch
from torch import Tensor

from grpo_lightning import losses
from grpo_lightning.losses import LossConfig, LossOutput
from grpo_lightning.losses.policy_loss import LossGrad, Weights
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.utils.dispatch import use_triton


def policy_loss_grad(
    logprobs: Tensor,
    batch: RolloutBatch,
    config: LossConfig,
    entropy: Tensor | None = None,
    *,
    backend: str = "torch",
    **weights: Unpack[Weights],
) -> LossGrad:
    """Returns loss, gradient and statistics. Arguments and errors as in `losses.policy_loss`.

    Args:
        backend: torch, triton, or auto, which is triton on CUDA. What the kernel does not cover runs in
            torch, and that is said once.
    """
    config = config.resolve()
    if len(logprobs) and use_triton(logprobs.device, backend):
        from grpo_lightning.losses.fused import launch_triton as kernel

        kl_coef = weights.get("kl_coef", config.kl_coef)
        entropy_coef = weights.get("entropy_coef", config.entropy_coef)
        wide = None if logprobs.dtype == torch.float32 else f"log-probabilities in {logprobs.dtype}"
        reason = kernel.why_not(config) or wide
        if reason is not None:
            _say_once(reason)
        elif not kernel.lacks(batch, config, entropy, entropy_coef):
            return kernel.policy_loss_grad(logprobs, batch, config, entropy, kl_coef, entropy_coef)
    return _twin(logprobs, batch, config, entropy, **weights)


@cache
def _say_once(reason: str) -> None:
    warnings.warn(f"the loss kernel does not cover {reason}: it runs in plain torch, slower", stacklevel=4)


def _twin(
    logprobs: Tensor,
    batch: RolloutBatch,
    config: LossConfig,
    entropy: Tensor | None,
    **weights: Unpack[Weights],
) -> LossGrad:
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        spread = None if entropy is None else entropy.detach().requires_grad_()
        out = losses.policy_loss(leaf, batch, config, spread, **weights)
        wanted = [leaf] if spread is None else [leaf, spread]
        grads = torch.autograd.grad(out.loss, wanted, allow_unused=True)
    dlogprobs = torch.zeros_like(leaf) if grads[0] is None else grads[0]
    return LossGrad(out.loss.detach(), dlogprobs, grads[1] if len(grads) > 1 else None, out.stats)


def policy_loss(
    logprobs: Tensor,
    batch: RolloutBatch,
    config: LossConfig,
    entropy: Tensor | None = None,
    *,
    backend: str = "torch",
    **weights: Unpack[Weights],
) -> LossOutput:
    """Returns the loss, attached to `logprobs` and `entropy` by the gradient that was computed with it.

    Arguments and errors as in `policy_loss_grad`; equals `losses.policy_loss` in value, gradient and
    statistics.
    """
    out = policy_loss_grad(logprobs, batch, config, entropy, backend=backend, **weights)
    loss = _Attached.apply(logprobs, entropy, out.loss, out.dlogprobs, out.dentropy)
    return LossOutput(loss, out.stats)  # pyright: ignore[reportArgumentType]  # apply() is untyped


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,
        entropy: Tensor | None,
        loss: Tensor,
        dlogprobs: Tensor,
        dentropy: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(dlogprobs, dentropy)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        dlogprobs, dentropy = ctx.saved_tensors
        return g * dlogprobs, None if dentropy is None else g * dentropy, None, None, None
