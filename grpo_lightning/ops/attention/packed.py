"""Attention over a packed rollout: a token sees its prompt and its own completion, nothing else.

Half types on CUDA run as segments (`varlen.py`). Everything else runs group by group with an explicit mask.
"""

import warnings
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from grpo_lightning.ops.attention.shared_prompts import SharedPrompts
from grpo_lightning.ops.attention.varlen import Flash, shared_prompt_attention
from grpo_lightning.packing.geometry import SequenceLayout


@dataclass(slots=True)
class PackedLayout:
    """Where the groups of a packed batch lie in T and what may attend to what inside them.

    Where segments are wanted, the rows go through the model in the order of `shared`. Not frozen: of a frozen
    one torch.compile 2.11 reads every field, and compiles again for another number of groups.
    """

    bounds: tuple[tuple[int, int], ...] | None
    """P pairs: first row of the group, row after its last; None where only segments are known"""
    segment_ids: Tensor  # [T] int64; 0 in prompts, 1, 2, ... in the completions of a group
    position_ids: Tensor  # [T] int64
    shared: SharedPrompts | None
    """the same as segments; None where these are not wanted"""
    longest: int
    """tokens of the longest prompt with a completion"""
    masks: dict[int | None, list[Tensor]] = field(default_factory=dict[int | None, list[Tensor]])

    @classmethod
    def of(
        cls,
        sequences: SequenceLayout,
        segment_ids: Tensor,
        position_ids: Tensor,
        *,
        segments: bool = False,
        filled: bool = False,
    ) -> "PackedLayout":
        """Returns the layout of P prompts and S completions."""
        prompt_lengths = sequences.prompt_lengths
        rows: list[list[int]] = [[] for _ in prompt_lengths]
        for g, n in zip(sequences.host_groups, sequences.rows, strict=True):
            rows[g].append(n)
        sizes = [p + sum(own) for p, own in zip(prompt_lengths, rows, strict=True)]
        ends = torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist()
        longest = max(
            (p + max(own, default=0) for p, own in zip(prompt_lengths, rows, strict=True)), default=0
        )
        shared = None
        if segments:
            device = segment_ids.device
            shared = SharedPrompts.of(list(prompt_lengths), rows, device, filled=filled)
        return cls(tuple(zip([0, *ends][:-1], ends, strict=True)), segment_ids, position_ids, shared, longest)

    def group_masks(self, window: int | None) -> list[Tensor]:
        """Returns P boolean masks [L, L], True where a row may look; `window` in tokens."""
        if window not in self.masks:
            self.masks[window] = [self._mask(start, end, window) for start, end in self.bounds or ()]
        return self.masks[window]

    def _mask(self, start: int, end: int, window: int | None) -> Tensor:
        segment, position = self.segment_ids[start:end], self.position_ids[start:end]
        mask = (segment[:, None] == segment[None, :]) | (segment[None, :] == 0)
        distance = position[:, None] - position[None, :]
        mask &= distance >= 0
        return mask if window is None else mask & (distance < window)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float, window: int | None = None
) -> Tensor:
    """Returns [1, heads, T, D]: softmax attention inside each completion and towards its prompt.

    Args:
        query: [1, heads, T, D].
        key: [1, kv_heads, T, D]; heads is a multiple of kv_heads.
        value: [1, kv_heads, T, D].
        layout: of the batch.
        scale: multiplies query . key.
        window: sliding window in tokens; None looks back without limit.
    """
    if layout.shared is not None:
        reason = why_not_segments(query, layout, window)
        if reason is None:
            q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
            return shared_prompt_attention(q, k, v, layout.shared, scale, Flash()).transpose(0, 1)[None]
        if layout.bounds is None:
            raise RuntimeError(f"attention has only segments to go by, but {reason}")
        _say_once(reason)
    order, places = (None, None) if layout.shared is None else (layout.shared.order, layout.shared.places)
    if places is not None:
        query, key, value = (x[:, :, places] for x in (query, key, value))
    parts = [
        scaled_dot_product_attention(
            query[:, :, s:e],
            key[:, :, s:e],
            value[:, :, s:e],
            attn_mask=mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for (s, e), mask in zip(layout.bounds or (), layout.group_masks(window), strict=True)
    ]
    out = torch.cat(parts, dim=2) if parts else torch.zeros_like(query)
    return out if order is None else out[:, :, order]


def why_not_segments(query: Tensor, layout: PackedLayout, window: int | None) -> str | None:
    """Returns why the flash kernels do not cover a call, or None if they do."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return f"it runs in {query.dtype} on {query.device.type}; they take half types on CUDA"
    if query.shape[-1] > 256 or query.shape[-1] % 8:
        return f"its heads are {query.shape[-1]} wide; they take multiples of 8 up to 256"
    if window is not None and window < layout.longest:  # a window that nothing outgrows is none
        return f"its window of {window} tokens is shorter than the longest sequence"
    return None


@cache
def _say_once(reason: str) -> None:
    warnings.warn(f"attention runs group by group, not on the flash kernels, because {reason}", stacklevel=4)
