"""The geometry of a packed rollout: which rows and targets follow from lengths and masks; on the host."""

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
class Selection:
    """What of a packed batch some completions need."""

    groups: list[int]
    rows: list[int]  # of T
    tokens: list[int]  # of N


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """How long the prompts and completions of a packed batch are, which belong together, and what trains."""

    prompt_lengths: tuple[int, ...]  # P
    loss_positions: tuple[Sequence[int], ...]
    """S; where in its completion the tokens are that train, ascending; `range(n)` for all of n"""
    host_groups: tuple[int, ...]  # S; sorted

    @classmethod
    def of(cls, prompts: Sequence[int], lengths: Sequence[int], groups: Sequence[int]) -> "SequenceLayout":
        """Returns the layout of completions of which all tokens train."""
        return cls(tuple(prompts), tuple(range(n) for n in lengths), tuple(groups))

    @property
    def lengths(self) -> tuple[int, ...]:
        """S; tokens of each completion that train, 0 is legal."""
        return tuple(len(positions) for positions in self.loss_positions)

    @property
    def rows(self) -> tuple[int, ...]:
        """S; rows of T of each completion: its tokens before the last one that trains."""
        return tuple(positions[-1] if positions else 0 for positions in self.loss_positions)

    @property
    def group_rows(self) -> list[int]:
        """Rows of T of each group."""
        out = list(self.prompt_lengths)
        for g, own in zip(self.host_groups, self.rows, strict=True):
            out[g] += own
        return out

    @property
    def group_tokens(self) -> list[int]:
        """P; loss tokens of each group."""
        out = [0] * len(self.prompt_lengths)
        for g, own in zip(self.host_groups, self.lengths, strict=True):
            out[g] += own
        return out

    @property
    def num_tokens(self) -> int:
        """T: rows that go through the model."""
        return sum(self.group_rows)

    @property
    def sharing(self) -> float:
        """How many times the rows of T there would be with a copy of its prompt before every completion."""
        return self.unshared().num_tokens / max(self.num_tokens, 1)

    def row_starts(self) -> RowStarts:
        """Returns the first row of T of each prompt and of each completion."""
        prompts: list[int] = []
        completions: list[int] = []
        row = 0
        for p, own in zip(self.prompt_lengths, self._members_rows(), strict=True):
            prompts.append(row)
            row += p
            for n in own:
                completions.append(row)
                row += n
        return RowStarts(prompts, completions)

    def take(self, sequences: Sequence[int]) -> "SequenceLayout":
        """Returns the completions `sequences` (sorted) and their prompts."""
        groups = sorted({self.host_groups[s] for s in sequences})
        place = {g: i for i, g in enumerate(groups)}
        return SequenceLayout(
            tuple(self.prompt_lengths[g] for g in groups),
            tuple(self.loss_positions[s] for s in sequences),
            tuple(place[self.host_groups[s]] for s in sequences),
        )

    def select(self, sequences: Sequence[int]) -> Selection:
        """Returns the groups, rows and tokens that the completions `sequences` (sorted) need."""
        starts, own, first = self.row_starts(), self.rows, [0]
        for n in self.lengths:
            first.append(first[-1] + n)
        rows: list[int] = []
        groups: list[int] = []
        for s in sequences:
            g = self.host_groups[s]
            if not groups or groups[-1] != g:
                groups.append(g)
                rows.extend(range(starts.prompts[g], starts.prompts[g] + self.prompt_lengths[g]))
            rows.extend(range(starts.completions[s], starts.completions[s] + own[s]))
        tokens = [n for s in sequences for n in range(first[s], first[s + 1])]
        return Selection(groups, rows, tokens)

    def split(self, m: int, *, whole_groups: bool = False) -> list[list[int]]:
        """Returns the completions of `m` micro-batches, the heaviest as light as can be; some may be empty.

        The cost of one is its T. Completions stay whole and in order; with `whole_groups`, so do groups.
        """
        units = runs(self.host_groups) if whole_groups else [[s] for s in range(len(self.host_groups))]
        return balance(units, self.host_groups, self.rows, self.prompt_lengths, m)

    def unshared(self) -> "SequenceLayout":
        """Returns the layout with a copy of its prompt before every completion that has tokens."""
        prompts = [
            self.prompt_lengths[g] if n else 0 for g, n in zip(self.host_groups, self.lengths, strict=True)
        ]
        return SequenceLayout(tuple(prompts), self.loss_positions, tuple(range(len(prompts))))

    def index_tensors(self) -> dict[str, Tensor]:
        """Returns position_ids, segment_ids [T], target_rows, sequence_ids [N]."""
        positions: list[int] = []
        segments: list[int] = []
        targets: list[int] = []
        trained = iter(self.loss_positions)
        for p, rows in zip(self.prompt_lengths, self._members_rows(), strict=True):
            before = len(positions) + p - 1  # the row that predicts a completion's first token
            positions.extend(range(p))
            segments.extend([0] * p)
            for segment, own in enumerate(rows, 1):
                start = len(positions) - 1
                targets.extend(start + i if i else before for i in next(trained))
                positions.extend(range(p, p + own))
                segments.extend([segment] * own)
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        return {
            "position_ids": torch.tensor(positions, dtype=torch.int64),
            "segment_ids": torch.tensor(segments, dtype=torch.int64),
            "target_rows": torch.tensor(targets, dtype=torch.int64),
            "sequence_ids": torch.repeat_interleave(torch.arange(len(lengths)), lengths),
        }

    def input_ids(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[int]:
        """Returns the T tokens: each prompt, then of the completions of its group what the model reads."""
        tokens: list[int] = []
        rows = self.rows
        for prompt, own in zip(prompts, members_of(self.host_groups, len(prompts)), strict=True):
            tokens.extend(prompt)
            for s in own:
                tokens.extend(completions[s][: rows[s]])
        return tokens

    def _members_rows(self) -> list[list[int]]:
        """Returns for each group the rows of its completions."""
        rows = self.rows
        return [[rows[s] for s in own] for own in members_of(self.host_groups, len(self.prompt_lengths))]


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
    units: Sequence[list[int]], groups: Sequence[int], rows: Sequence[int], prompts: Sequence[int], m: int
) -> list[list[int]]:
    """Returns `m` runs of neighbouring units whose largest T is as small as it can be.

    A prompt costs once in every run that touches its group. Bisects the capacity that a greedy fill needs.
    """
    if m < 1:
        raise ConfigError(f"a rollout is split into {m} micro-batches; it must be at least 1")

    heights = [sum(rows[s] for s in unit) for unit in units]

    def fill(capacity: int) -> list[list[int]]:
        parts: list[list[int]] = [[]]
        used, group = 0, -1
        for unit, own in zip(units, heights, strict=True):
            g = groups[unit[0]]
            cost = own + (prompts[g] if g != group else 0)
            if parts[-1] and used + cost > capacity:
                parts.append([])
                used, cost = 0, own + prompts[g]
            parts[-1].extend(unit)
            used, group = used + cost, g
        return parts

    total = sum(heights) + sum(prompts[g] for g in {groups[unit[0]] for unit in units})
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
