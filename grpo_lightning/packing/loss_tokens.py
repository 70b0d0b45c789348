"""What is taken of completions: only their loss tokens, which were sampled."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_lightning.packing.geometry import SequenceLayout
from grpo_lightning.types import Completion


def loss_positions(completion: Completion) -> Sequence[int]:
    """Returns where the tokens are that train; raises ValueError if the mask has another length."""
    mask, n = completion.loss_mask, len(completion.token_ids)
    if mask is None:
        return range(n)
    if len(mask) != n:
        raise ValueError(f"a completion has {n} tokens and a loss_mask of {len(mask)}")
    return range(n) if all(mask) else tuple(i for i, trains in enumerate(mask) if trains)


def token_advantages(
    advantages: Sequence[Tensor], completions: Sequence[Completion], layout: SequenceLayout
) -> Tensor:
    """Returns [N] of S tensors with a value per token; raises ValueError where one has another shape."""
    for own, completion in zip(advantages, completions, strict=True):
        n = len(completion.token_ids)
        if own.shape != (n,):
            raise ValueError(f"a completion of {n} tokens has advantages of shape {tuple(own.shape)}")
    positions = zip(advantages, layout.loss_positions, strict=True)
    return torch.cat([torch.zeros(0), *(own.float()[list(at)] for own, at in positions)])


def sampler_logprobs(trained: Sequence[tuple[Completion, Sequence[int]]]) -> Tensor | None:
    """Returns [N] float32 of the loss tokens, or None unless the engine reported all of them."""
    if not trained or any(c.logprobs is None for c, _ in trained):
        return None
    return torch.tensor([(c.logprobs or ())[i] for c, at in trained for i in at], dtype=torch.float32)
