"""Where the prompts and completions of a packed batch stand as segments of one row, for attention.

Rows stand so that each of the two calls of `shared_prompt_attention` reads and writes one slice of them:
first what looks at nothing but itself, then the shared prompts, then their completions, group by group.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_lightning.ops.attention.shape_buckets import Shape, fill


class Spans(NamedTuple):
    """Segments of queries and the segments of keys that they look at, B each."""

    query: Tensor  # [B + 1] int32, ends
    key: Tensor  # [B + 1] int32
    longest_query: int
    longest_key: int
    causal: bool

    @classmethod
    def of(
        cls,
        query: list[int],
        key: list[int],
        *,
        causal: bool,
        device: torch.device,
        longest: tuple[int, int] | None = None,
    ) -> "Spans":
        """Returns the spans of the given lengths; of queries and of keys, none is longer than `longest`."""

        def ends(lengths: list[int]) -> Tensor:
            host = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            return host.to(device, non_blocking=True)

        if longest is None:
            longest = max(query, default=0), max(key, default=0)
        return cls(ends(query), ends(key), *longest, causal)


@dataclass(frozen=True, slots=True)
class SharedPrompts:
    """Where prompts and completions stand in T', which is T and, where a shape is given, filling.

    Rows of filling look at filling and at nothing else.
    """

    self_attention: Spans  # everything, onto itself
    prefix_attention: Spans  # the completions of a group, onto its prompt
    prompts: slice  # rows of T' of the keys of `prefix_attention`
    completions: slice  # rows of T' of its queries, to the end of T'
    order: Tensor | None
    """[T'] the row of the packed batch that stands in each row; None is one after the other"""
    places: Tensor | None
    """[T] where the rows of the packed batch stand; None is where they are"""
    shape: Shape | None = None
    """what it is filled up to"""

    @classmethod
    def of(
        cls,
        prompt_lengths: list[int],
        rows: list[list[int]],
        device: torch.device,
        *,
        filled: bool = False,
    ) -> "SharedPrompts":
        """Returns the layout of groups, each a prompt and the rows of its completions, one after the other.

        Args:
            prompt_lengths: P.
            rows: P lists, the number of rows of each completion; 0 is legal.
            device: of the index tensors.
            filled: fill up to one of few shapes.
        """
        whole: list[range] = []
        prompts: list[range] = []
        completions: list[range] = []
        queries: list[int] = []
        # A single completion goes on where its prompt ends; but beside shared prompts that is another shape.
        several = any(p and sum(map(bool, own)) > 1 for p, own in zip(prompt_lengths, rows, strict=True))
        fewest = 1 if filled and several else 2
        start = 0
        for p, own in zip(prompt_lengths, rows, strict=True):
            pieces = _pieces(start, [p, *own])
            start += p + sum(own)
            if p and len(pieces) > fewest:
                prompts.append(pieces[0])
                completions += pieces[1:]
                queries.append(sum(own))
            elif p:
                whole.append(range(pieces[0].start, start))
            else:
                whole += pieces
        regions = (whole, prompts, completions)
        segments = [[len(r) for r in region] for region in regions]
        shape = None
        if filled:
            shape, missing = fill(segments[0], segments[1], segments[2], queries)
            for lengths, added in zip((*segments, queries), missing, strict=True):
                lengths += added
        keys = segments[1]
        first, second, third = sizes = [sum(lengths) for lengths in segments]
        order, places = None, None
        if queries or filled:
            order, places = (x.to(device, non_blocking=True) for x in _standing(regions, sizes, start))
        alone = [n for lengths in segments for n in lengths]
        return cls(
            Spans.of(
                alone, alone, causal=True, device=device, longest=shape and (shape.longest, shape.longest)
            ),
            Spans.of(queries, keys, causal=False, device=device, longest=shape and shape.longest_towards),
            slice(first, first + second),
            slice(first + second, first + second + third),
            order,
            places,
            shape,
        )


def _pieces(start: int, lengths: list[int]) -> list[range]:
    """Returns the rows of those of `lengths` that are not 0."""
    out = []
    for n in lengths:
        if n:
            out.append(range(start, start + n))
        start += n
    return out


def _standing(regions: tuple[list[range], ...], sizes: list[int], total: int) -> tuple[Tensor, Tensor]:
    """Returns which row stands where, row 0 for filling, and where each row stands."""
    order = torch.zeros(sum(sizes), dtype=torch.int64)
    places = torch.empty(total, dtype=torch.int64)
    at = 0
    for region, size in zip(regions, sizes, strict=True):
        rows = torch.cat([torch.arange(r.start, r.stop) for r in region]) if region else order[:0]
        order[at : at + len(rows)] = rows
        places[rows] = torch.arange(at, at + len(rows))
        at += size
    return order, places
