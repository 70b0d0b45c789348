"""The geometry of a packed rollout, from lengths alone; runs on the host."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_lightning.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RowStarts:
    prompts: list[int]
    completions: list[int]


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """How long the prompts and completions of a packed batch are, and which belong together."""

    prompt_lengths: tuple[int, ...]  # P
    lengths: tuple[int, ...]  # S; trainable tokens, 0 is legal
    host_groups: tuple[int, ...]  # S; sorted

    @property
    def group_rows(self) -> list[int]:
        """Rows of T of each group."""
        rows = list(self.prompt_lengths)
        for g, n in zip(self.host_groups, self.lengths, strict=True):
            rows[g] += max(n - 1, 0)
        return rows

    @property
    def num_tokens(self) -> int:
        """T: rows that go through the model."""
        return sum(self.group_rows)

    @property
    def sharing(self) -> float:
        """How many times the rows of T there would be with a copy of its prompt before every completion."""
        return self.unshared().num_tokens / max(self.num_tokens, 1)

    def take(self, sequences: Sequence[int]) -> "SequenceLayout":
        """Returns the completions `sequences` (sorted) and their prompts."""
        groups = sorted({self.host_groups[s] for s in sequences})
        place = {g: i for i, g in enumerate(groups)}
        return SequenceLayout(
            tuple(self.prompt_lengths[g] for g in groups),
            tuple(self.lengths[s] for s in sequences),
            tuple(place[self.host_groups[s]] for s in sequences),
        )

    def split(self, m: int, *, whole_groups: bool = False) -> list[list[int]]:
        """Returns the completions of exactly `m` parts, the heaviest as light as can be; some may be empty.

        The cost of a part is its T. Completions stay whole and in order; with `whole_groups`, so do groups.
        """
        units = runs(self.host_groups) if whole_groups else [[s] for s in range(len(self.lengths))]
        return balance(units, self.host_groups, self.lengths, self.prompt_lengths, m)

    def unshared(self) -> "SequenceLayout":
        """Returns the sequence_layout with a copy of its prompt before every completion that has tokens."""
        prompts = [
            self.prompt_lengths[g] if n else 0 for g, n in zip(self.host_groups, self.lengths, strict=True)
        ]
        return SequenceLayout(tuple(prompts), self.lengths, tuple(range(len(self.lengths))))


def row_starts(prompt_lengths: Sequence[int], lengths: Sequence[int], groups: Sequence[int]) -> RowStarts:
    """Returns the first row of T of each prompt and of each completion."""
    prompts: list[int] = []
    completions: list[int] = []
    row = s = 0
    for g, p in enumerate(prompt_lengths):
        prompts.append(row)
        row += p
        while s < len(groups) and groups[s] == g:
            completions.append(row)
            row += max(lengths[s] - 1, 0)
            s += 1
    return RowStarts(prompts, completions)


def select(
    prompt_lengths: Sequence[int], lengths: Sequence[int], groups: Sequence[int], sequences: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Returns the groups, rows of T and tokens of N that the completions `sequences` (sorted) need."""
    starts = row_starts(prompt_lengths, lengths, groups)
    first = [0]
    for n in lengths:
        first.append(first[-1] + n)
    rows: list[int] = []
    touched: list[int] = []
    for s in sequences:
        g = groups[s]
        if not touched or touched[-1] != g:
            touched.append(g)
            rows.extend(range(starts.prompts[g], starts.prompts[g] + prompt_lengths[g]))
        rows.extend(range(starts.completions[s], starts.completions[s] + max(lengths[s] - 1, 0)))
    tokens = [n for s in sequences for n in range(first[s], first[s + 1])]
    return touched, rows, tokens


def geometry(
    prompt_lengths: Sequence[int], lengths: Sequence[int], groups: Sequence[int]
) -> dict[str, Tensor]:
    """Returns position_ids, segment_ids [T], target_rows, sequence_ids [N]; all follow from the lengths."""
    positions: list[int] = []
    segments: list[int] = []
    targets: list[int] = []
    s, row = 0, 0
    for g, p in enumerate(prompt_lengths):
        positions.extend(range(p))
        segments.extend([0] * p)
        last_prompt_row = row + p - 1
        row += p
        segment = 0
        while s < len(groups) and groups[s] == g:
            segment += 1
            n, own = lengths[s], max(lengths[s] - 1, 0)
            positions.extend(range(p, p + own))
            segments.extend([segment] * own)
            targets.extend([last_prompt_row, *range(row, row + own)][:n])
            row += own
            s += 1
    sequence_ids = torch.repeat_interleave(
        torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64)
    )
    return {
        "position_ids": torch.tensor(positions, dtype=torch.int64),
        "segment_ids": torch.tensor(segments, dtype=torch.int64),
        "target_rows": torch.tensor(targets, dtype=torch.int64),
        "sequence_ids": sequence_ids,
    }


def interleaved(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], members: Sequence[Sequence[int]]
) -> list[int]:
    """Returns the T tokens: each prompt, then the completions of its group, each without its last token."""
    tokens: list[int] = []
    for prompt, own in zip(prompts, members, strict=True):
        tokens.extend(prompt)
        for s in own:
            tokens.extend(completions[s][:-1])
    return tokens


def members_of(groups: Sequence[int], count: int) -> list[list[int]]:
    """Returns for each of `count` groups the indices of its members."""
    out: list[list[int]] = [[] for _ in range(count)]
    for s, g in enumerate(groups):
        out[g].append(s)
    return out


def runs(groups: Sequence[int]) -> list[list[int]]:
    """Returns the indices of equal neighbours: [0, 0, 1] -> [[0, 1], [2]]."""
    out: list[list[int]] = []
    for s, g in enumerate(groups):
        if s and groups[s - 1] == g:
            out[-1].append(s)
        else:
            out.append([s])
    return out


def balance(
    units: Sequence[list[int]], groups: Sequence[int], lengths: Sequence[int], prompts: Sequence[int], m: int
) -> list[list[int]]:
    """Returns `m` runs of neighbouring units whose largest T is as small as it can be.

    A prompt costs once in every part that touches its group. Bisects the capacity that a greedy fill needs.
    """
    if m < 1:
        raise ConfigError(f"a rollout is split into {m} parts; it must be at least 1")

    rows = [sum(max(lengths[s] - 1, 0) for s in unit) for unit in units]

    def fill(capacity: int) -> list[list[int]]:
        parts: list[list[int]] = [[]]
        used, group = 0, -1
        for unit, own in zip(units, rows, strict=True):
            g = groups[unit[0]]
            cost = own + (prompts[g] if g != group else 0)
            if parts[-1] and used + cost > capacity:
                parts.append([])
                used, cost = 0, own + prompts[g]
            parts[-1].extend(unit)
            used, group = used + cost, g
        return parts

    total = sum(rows) + sum(prompts[g] for g in {groups[unit[0]] for unit in units})
    low, high = total // m, total
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(fill(middle)) <= m else (middle + 1, high)
    parts = fill(low)
    return parts + [[] for _ in range(m - len(parts))]


def sampling_weights(lengths: Sequence[int], draws: int, u: float) -> list[float]:
    """Returns how many completions each one stands for in a systematic sample, 0 for those left out.

    All tokens lie on a line, and `draws` evenly spaced points of it choose the completions they fall on: one
    is chosen in proportion to its tokens. With weights w_s and any y_s, the sum of w_s y_s is an unbiased
    estimate of the sum of y_s, and the sum of w_s times lengths is the number of tokens exactly (Madow 1949).

    Args:
        lengths: tokens of each completion.
        draws: points; a completion longer than their distance may be hit more than once.
        u: in [0, 1), where the first point lies within the first distance.
    """
    step = sum(lengths) / draws
    weights: list[float] = []
    before = 0
    for n in lengths:
        hits = _points_below((before + n) / step, u) - _points_below(before / step, u)
        weights.append(hits * step / n if hits else 0.0)
        before += n
    return weights


def _points_below(x: float, u: float) -> int:
    """Returns how many of u, u + 1, u + 2, ... are below x."""
    return max(-int((u - x) // 1), 0)
