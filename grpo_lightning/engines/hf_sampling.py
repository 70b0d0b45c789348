"""Choosing tokens from logits, each sample by its own counter-based random numbers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_lightning.ops.lm_head.truncation import truncate
from grpo_lightning.types import SamplingParams

_MASK = (1 << 64) - 1


def uniforms(seeds: Sequence[int], position: int) -> list[float]:
    """Returns one number in (0, 1) per seed: splitmix64 of seed and position; there is no state."""
    return [(_mix(seed + (position + 1) * 0x9E3779B97F4A7C15) >> 11 | 1) / (1 << 53) for seed in seeds]


def _mix(x: int) -> int:
    x &= _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def choose(
    logits: Tensor, sampling: SamplingParams, u: Tensor, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns token ids [R] and their log-probabilities [R] under the distribution they were drawn from.

    Args:
        logits: [R, V].
        sampling: temperature 0 takes the most likely token and reports its untempered log-probability.
        u: [R] float64 in (0, 1), one uniform number per row.
        seen: [R, V] bool, tokens that the repetition penalty applies to.
    """
    z = logits.float()
    if seen is not None and sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        z = torch.where(seen, torch.where(z > 0, z / penalty, z * penalty), z)
    if sampling.temperature == 0:
        ids = z.argmax(-1)
    else:
        z = z / sampling.temperature if sampling.temperature != 1.0 else z
        z = z if sampling.truncation is None else truncate(z, sampling.truncation)
        cumulative = z.softmax(-1).cumsum(-1, dtype=torch.float64)
        target = (u * cumulative[:, -1])[:, None]
        ids = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=z.shape[1] - 1)
    chosen = z.gather(1, ids[:, None])[:, 0]
    return ids, chosen - z.logsumexp(-1)
