"""Loss, gradient and statistics in one call: in plain torch, or in one launch of a Triton kernel."""

from grpo_lightning.losses.fused.gradient import policy_loss, policy_loss_grad
from grpo_lightning.losses.policy_loss import LossGrad

__all__ = ["LossGrad", "policy_loss", "policy_loss_grad"]
