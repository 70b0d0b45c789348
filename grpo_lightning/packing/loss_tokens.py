"""What is taken of completions: only their loss tokens, which were sampled."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from grpo_lightning.packing.geometry import SequenceLayout
from grpo_lightning.types import Completion

X = TypeVar("X")


def layout_of(
    prompt_ids: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    group_ids: Sequence[int],
    mask_truncated: bool,
) -> SequenceLayout:
    """Returns where prompts and completions lie in T and N; raises ValueError if `group_ids` do not fit."""
    groups = tuple(group_ids)
    if list(groups) != sorted(groups) or len(groups) != len(completions):
        raise ValueError("group_ids must be sorted, one per completion")
    masked = [mask_truncated and c.finish_reason == "length" for c in completions]
    return SequenceLayout(
        prompt_lengths=tuple(len(ids) for ids in prompt_ids),
        loss_positions=tuple(
            () if out else loss_positions(c) for c, out in zip(completions, masked, strict=True)
        ),
        host_groups=groups,
    )


def loss_positions(completion: Completion) -> Sequence[int]:
    """Returns where the tokens are that train; raises ValueError if the mask has another length."""
    mask, n = completion.loss_mask, len(completion.token_ids)
    if mask is None:
        return range(n)
    if len(mask) != n:
        raise ValueError(f"a completion has {n} tokens and a loss_mask of {len(mask)}")
    return range(n) if all(mask) else tuple(i for i, trains in enumerate(mask) if trains)


def loss_tokens(of: Sequence[Sequence[X]], layout: SequenceLayout) -> list[X]:
    """Returns, of S sequences with an item per token, the N items of the loss tokens."""
    return [own[i] for own, at in zip(of, layout.loss_positions, strict=True) for i in at]


def by_token(
    advantages: Tensor | Sequence[Tensor],
    completions: Sequence[Completion],
    layout: SequenceLayout,
    sequence_ids: Tensor,
) -> Tensor:
    """Returns [N] of [S], or of S tensors with a value per token; ValueError where one has another shape."""
    if isinstance(advantages, Tensor):
        return advantages.float()[sequence_ids]
    for own, completion in zip(advantages, completions, strict=True):
        n = len(completion.token_ids)
        if own.shape != (n,):
            raise ValueError(f"a completion of {n} tokens has advantages of shape {tuple(own.shape)}")
    positions = zip(advantages, layout.loss_positions, strict=True)
    return torch.cat([torch.zeros(0), *(own.float()[list(at)] for own, at in positions)])


def sampler_logprobs(completions: Sequence[Completion], layout: SequenceLayout) -> Tensor | None:
    """Returns [N] float32 of the loss tokens, or None unless the engine reported all of them."""
    if not completions or any(c.logprobs is None for c in completions):
        return None
    return torch.tensor(loss_tokens([c.logprobs or () for c in completions], layout), dtype=torch.float32)
