"""Ops that are worth a kernel; each has a torch twin that is the CPU path and the oracle."""

from grpo_lightning.ops.lm_head.logprobs import fused_linear_logprobs

__all__ = ["fused_linear_logprobs"]
