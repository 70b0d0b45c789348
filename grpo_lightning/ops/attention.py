"""Attention over a packed rollout: a token sees its prompt and its own completion, nothing else.

The torch form runs group by group with an explicit mask and is the oracle for every faster one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where the groups of a packed batch lie in T and what may attend to what inside them."""

    bounds: tuple[tuple[int, int], ...]  # P pairs: first row of the group, row after its last
    segment_ids: Tensor  # [T] int64; 0 in prompts, 1, 2, ... in the completions of a group
    position_ids: Tensor  # [T] int64
    masks: dict[int | None, list[Tensor]] = field(default_factory=dict[int | None, list[Tensor]])

    @classmethod
    def of(
        cls,
        prompt_lengths: Sequence[int],
        lengths: Sequence[int],
        group_ids: Sequence[int],
        segment_ids: Tensor,
        position_ids: Tensor,
    ) -> "PackedLayout":
        """Returns the layout of P prompts and S completions, `group_ids` sorted."""
        sizes = list(prompt_lengths)
        for g, n in zip(group_ids, lengths, strict=True):
            sizes[g] += max(n - 1, 0)
        ends = torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist()
        return cls(tuple(zip([0, *ends][:-1], ends, strict=True)), segment_ids, position_ids)

    def group_masks(self, window: int | None) -> list[Tensor]:
        """Returns P boolean masks [L, L], True where a row may look; `window` in tokens."""
        if window not in self.masks:
            self.masks[window] = [self._mask(start, end, window) for start, end in self.bounds]
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
    parts = [
        scaled_dot_product_attention(
            query[:, :, s:e],
            key[:, :, s:e],
            value[:, :, s:e],
            attn_mask=mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for (s, e), mask in zip(layout.bounds, layout.group_masks(window), strict=True)
    ]
    return torch.cat(parts, dim=2) if parts else torch.zeros_like(query)
