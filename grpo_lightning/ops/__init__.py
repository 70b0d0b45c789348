"""Ops that are worth a kernel; each has a torch twin that is the CPU path and the oracle."""

from grpo_lightning.ops.logprobs import fused_linear_logprobs
from grpo_lightning.ops.policy_loss import LossGrad, policy_loss, policy_loss_grad

__all__ = ["LossGrad", "fused_linear_logprobs", "policy_loss", "policy_loss_grad"]
