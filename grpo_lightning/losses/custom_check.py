"""A user's own surrogate on a few made-up tokens, before anything is loaded."""

from dataclasses import replace

import torch

from grpo_lightning.errors import ConfigError
from grpo_lightning.losses.config import LossConfig
from grpo_lightning.losses.policy_loss import policy_loss
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.types import Completion

LENGTHS = (3, 0, 1, 2)
"""tokens of the completions, two to a group"""


def check_surrogate(config: LossConfig) -> None:
    """Raises ConfigError if a surrogate that is not ours raises, or returns another shape than [N]."""
    config = config.resolve()
    if config.surrogate_row.ours:
        return
    count = sum(LENGTHS)
    batch = RolloutBatch.pack(
        prompt_ids=[[5], [6]],
        completions=[Completion(token_ids=[5, 6, 7][:n]) for n in LENGTHS],
        group_ids=[0, 0, 1, 1],
        advantages=torch.tensor([1.0, -1.0, 0.5, -0.5]),
        max_tokens=max(LENGTHS),
    )
    logprobs, everything = -torch.linspace(0.1, 2.0, count), torch.ones(count, dtype=torch.bool)
    batch = replace(
        batch,
        old_logprobs=logprobs - 0.1,
        ref_logprobs=logprobs - 0.2,
        selected=everything,
        entropy_keep=everything,
    )
    try:
        policy_loss(logprobs.requires_grad_(), batch, config, torch.ones(count))
    except ConfigError:
        raise
    except Exception as error:  # whatever somebody else's function raises
        raise ConfigError(
            f"model.loss: the surrogate {config.surrogate!r} fails on {count} made-up tokens: "
            f"{type(error).__name__}: {error}; examples/custom_loss.py shows one that works"
        ) from error
