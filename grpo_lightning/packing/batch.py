"""The packed rollout: what travels from sampling to training. Knows torch and nothing else.

Four axes: `T` packed tokens that go through the model, `N` completion tokens that train, `S` completions,
`P` prompts (groups). A rollout is packed: nothing is padded and there is no mask. Each prompt stands once,
its completions follow it; the last token of a completion predicts nothing and therefore does not go through
the model.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (strict otherwise: torch leaves the types of tolist() and its like unknown)

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_lightning.packing.geometry import (
    RowStarts,
    SequenceLayout,
    geometry,
    interleaved,
    members_of,
    row_starts,
    select,
)
from grpo_lightning.types import Completion, Truncation


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTotals:
    """Counts of one window: all micro-batches, over all ranks, that feed one optimizer step.

    Aggregations divide by these, never by local counts: a gradient does not depend on how the work is split.
    """

    tokens: int
    sequences: int
    groups: int
    """groups with at least one trainable token"""
    max_tokens: int
    """longest completion that sampling allows"""
    entropy_tokens: int = 0
    """tokens that `entropy_keep` keeps"""
    micro_batches: int = 1
    """K * W: accumulated micro-batches times ranks; Lightning and DDP divide the returned loss by it, and
    `GRPOModule` takes it from its Trainer"""
    empty_micro_batches: int = 0
    """those of them without a token; a mean over micro-batches is over the others"""


PER_TOKEN = (
    "sampler_logprobs",
    "old_logprobs",
    "ref_logprobs",
    "old_entropies",
    "selected",
    "entropy_keep",
)
"""optional fields of a RolloutBatch with one entry per completion token"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """S scored completions of P prompts, packed. Axes: T model tokens, N completion tokens, S completions.

    Built by `pack`; cut by `windows` (whole groups, own totals) and `split` (micro-batches of one window).
    """

    input_ids: Tensor  # [T] int64; a prompt stands once, its completions follow without their last token
    position_ids: Tensor  # [T] int64; a completion goes on counting where its prompt ends
    segment_ids: Tensor  # [T] int64; 0 in prompts, 1, 2, ... in the completions of a group
    target_rows: Tensor  # [N] int64; the row of T whose hidden state predicts completion token n
    target_ids: Tensor  # [N] int64; that token
    sequence_ids: Tensor  # [N] int64 in [0, S), sorted
    group_ids: Tensor  # [S] int64 in [0, P), sorted
    rewards: Tensor  # [S] float32; NaN where no reward applies
    advantages: Tensor  # [S] float32
    group_tokens: Tensor  # [P] int64; trainable tokens of each group in the whole window
    sample_weights: Tensor | None = None  # [S] float32; completions it stands for in metrics; None: all 1
    sampler_logprobs: Tensor | None = None  # [N] nats, the engine's policy; over its kept set if `truncation`
    old_logprobs: Tensor | None = (
        None  # [N] nats, the policy before the first update; None: the training forward's
    )
    ref_logprobs: Tensor | None = None  # [N] nats, the reference policy
    old_entropies: Tensor | None = None  # [N] nats, the policy before the first update
    selected: Tensor | None = None  # [N] bool, the window's covariance selection
    entropy_keep: Tensor | None = None  # [N] bool, the window's tokens of high entropy
    prompt_lengths: tuple[int, ...]  # P; on the host, so that layouts need no device synchronisation
    lengths: tuple[int, ...]  # S; trainable tokens of each completion, 0 is legal
    host_groups: tuple[int, ...]  # S; group_ids
    totals: LossTotals
    temperature: float
    policy_version: int = 0
    truncation: Truncation | None = None
    """the kept set that `sampler_logprobs` are over; None: the whole vocabulary"""

    @classmethod
    def pack(
        cls,
        *,
        prompt_ids: Sequence[Sequence[int]],
        completions: Sequence[Completion],
        group_ids: Sequence[int],
        advantages: Tensor,
        rewards: Tensor | None = None,
        max_tokens: int,
        temperature: float = 1.0,
        policy_version: int = 0,
        truncation: Truncation | None = None,
        mask_truncated: bool = False,
        micro_batches: int = 1,
    ) -> "RolloutBatch":
        """Returns the packed form of S completions of P prompts, as one window of one rank.

        Args:
            prompt_ids: P lists of token ids.
            completions: S completions, those of a group next to each other.
            group_ids: for each completion the index of its prompt, sorted.
            advantages: [S] float.
            rewards: [S] float; zeros if missing.
            max_tokens: `SamplingParams.max_tokens`, the divisor of Dr. GRPO's aggregation.
            truncation: what the sampled completions' log-probabilities are renormalised over.
            mask_truncated: completions cut at `max_tokens` get no trainable token; they still count in S.

        Raises:
            ValueError: `group_ids` is not sorted, or sizes differ.
        """
        groups = list(group_ids)
        if groups != sorted(groups) or len(groups) != len(completions) or len(advantages) != len(groups):
            raise ValueError("group_ids must be sorted, with one group and one advantage per completion")
        kept = [
            () if mask_truncated and c.finish_reason == "length" else tuple(c.token_ids) for c in completions
        ]
        lengths = tuple(len(ids) for ids in kept)
        prompt_lengths = tuple(len(ids) for ids in prompt_ids)
        members = members_of(groups, len(prompt_ids))
        group_tokens = torch.tensor([sum(lengths[s] for s in m) for m in members], dtype=torch.int64)
        return cls(
            input_ids=torch.tensor(interleaved(prompt_ids, kept, members), dtype=torch.int64),
            target_ids=torch.tensor([t for ids in kept for t in ids], dtype=torch.int64),
            group_ids=torch.tensor(groups, dtype=torch.int64),
            rewards=torch.zeros(len(groups)) if rewards is None else rewards.float(),
            advantages=advantages.float(),
            group_tokens=group_tokens,
            sampler_logprobs=_sampler_logprobs(completions, kept),
            prompt_lengths=prompt_lengths,
            lengths=lengths,
            host_groups=tuple(groups),
            totals=LossTotals(
                tokens=sum(lengths),
                sequences=len(lengths),
                groups=int((group_tokens > 0).sum()),
                max_tokens=max_tokens,
                micro_batches=micro_batches,
            ),
            temperature=temperature,
            policy_version=policy_version,
            truncation=truncation,
            **geometry(prompt_lengths, lengths, groups),
        )

    @property
    def sequence_layout(self) -> SequenceLayout:
        """The lengths alone."""
        return SequenceLayout(self.prompt_lengths, self.lengths, self.host_groups)

    @property
    def num_tokens(self) -> int:
        """T: rows that go through the model."""
        return self.sequence_layout.num_tokens

    @property
    def sharing(self) -> float:
        """How many times the rows of T there would be with a copy of its prompt before every completion."""
        return self.sequence_layout.sharing

    def row_starts(self) -> RowStarts:
        """Returns the first row of T of each prompt and of each completion."""
        return row_starts(self.prompt_lengths, self.lengths, self.host_groups)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "RolloutBatch":
        """Returns the batch on `device`."""
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name in self.__slots__
            if isinstance(value := getattr(self, name), Tensor)
        }
        return replace(self, **moved)

    def take(self, sequences: Sequence[int]) -> "RolloutBatch":
        """Returns the completions `sequences` (sorted) and their prompts; totals stay the window's."""
        if len(sequences) == len(self.lengths) and len(set(self.host_groups)) == len(self.prompt_lengths):
            return self
        groups, rows, tokens = select(self.prompt_lengths, self.lengths, self.host_groups, sequences)
        lengths = tuple(self.lengths[s] for s in sequences)
        prompt_lengths = tuple(self.prompt_lengths[g] for g in groups)
        renumbered = [groups.index(self.host_groups[s]) for s in sequences]
        device = self.input_ids.device
        row = torch.tensor(rows, dtype=torch.int64, device=device)
        token = torch.tensor(tokens, dtype=torch.int64, device=device)
        seq = torch.tensor(list(sequences), dtype=torch.int64, device=device)
        weights = None if self.sample_weights is None else self.sample_weights[seq]
        layout = {k: v.to(device) for k, v in geometry(prompt_lengths, lengths, renumbered).items()}
        optional = {
            name: None if (value := getattr(self, name)) is None else value[token] for name in PER_TOKEN
        }
        return replace(
            self,
            input_ids=self.input_ids[row],
            target_ids=self.target_ids[token],
            group_ids=torch.tensor(renumbered, dtype=torch.int64, device=device),
            rewards=self.rewards[seq],
            advantages=self.advantages[seq],
            sample_weights=weights,
            group_tokens=self.group_tokens[torch.tensor(groups, dtype=torch.int64, device=device)],
            prompt_lengths=prompt_lengths,
            lengths=lengths,
            host_groups=tuple(renumbered),
            **layout,
            **optional,
        )

    def split(self, m: int, *, whole_groups: bool = False) -> list["RolloutBatch"]:
        """Returns exactly `m` micro-batches, the heaviest as light as can be; some may be empty."""
        return [self.take(part) for part in self.sequence_layout.split(m, whole_groups=whole_groups)]

    def windows(self, u: int) -> list["RolloutBatch"]:
        """Returns `u` windows of whole groups, each with the counts of this rank."""
        out = []
        for w in self.split(u, whole_groups=True):
            totals = replace(
                self.totals,
                tokens=sum(w.lengths),
                sequences=len(w.lengths),
                groups=int((w.group_tokens > 0).sum()),
            )
            out.append(replace(w, totals=totals))
        return out

    def all_reduce_totals(self, all_sum: Callable[[Tensor], Tensor], micro_batches: int) -> "RolloutBatch":
        """Returns the window with the counts of all ranks; `all_sum` adds an int64 vector over ranks."""
        names = ("tokens", "sequences", "groups", "empty_micro_batches")
        sums = all_sum(torch.tensor([getattr(self.totals, n) for n in names], dtype=torch.int64)).tolist()
        totals = replace(self.totals, **dict(zip(names, sums, strict=True)), micro_batches=micro_batches)
        return replace(self, totals=totals)

    def unshared(self) -> "RolloutBatch":
        """Returns the batch with a copy of its prompt before every completion, for a forward.

        The [N] axis stays as it is. Every completion is a group of its own then, so no loss may see it.
        """
        starts, alone = self.row_starts(), self.sequence_layout.unshared()
        rows: list[int] = []
        for s, (g, p, n) in enumerate(zip(self.host_groups, alone.prompt_lengths, self.lengths, strict=True)):
            rows.extend(range(starts.prompts[g], starts.prompts[g] + p))
            rows.extend(range(starts.completions[s], starts.completions[s] + max(n - 1, 0)))
        groups, prompts = alone.host_groups, alone.prompt_lengths
        device = self.input_ids.device
        return replace(
            self,
            input_ids=self.input_ids[torch.tensor(rows, dtype=torch.int64, device=device)],
            group_ids=torch.arange(len(groups), device=device),
            host_groups=groups,
            prompt_lengths=prompts,
            **{k: v.to(device) for k, v in geometry(prompts, self.lengths, groups).items()},
        )

    def spot_check_subset(self) -> "RolloutBatch":
        """Returns the first two completions with tokens of the first and of the last group that has some."""
        groups: dict[int, list[int]] = {}
        for s, (g, n) in enumerate(zip(self.host_groups, self.lengths, strict=True)):
            if n:
                groups.setdefault(g, []).append(s)
        ends = list(groups.values())
        return self.take(sorted({s for own in (*ends[:1], *ends[-1:]) for s in own[:2]}))

    def shortest_pair(self) -> "RolloutBatch":
        """Returns the two completions of one group that make the fewest rows; one where no group has two."""
        best: tuple[int, list[int]] = (0, [])
        for g, own in enumerate(members_of(self.host_groups, len(self.prompt_lengths))):
            pair = sorted((s for s in own if self.lengths[s]), key=lambda s: self.lengths[s])[:2]
            rows = self.prompt_lengths[g] + sum(self.lengths[s] for s in pair)
            if (-len(pair), rows) < (-len(best[1]), best[0]):
                best = rows, pair
        return self.take(sorted(best[1]))

    def rescored(self, log_kept: Tensor) -> "RolloutBatch":
        """Returns the batch with `sampler_logprobs` over the whole vocabulary.

        Args:
            log_kept: [N] log of the policy's mass in the kept set, in nats.
        """
        known = self.sampler_logprobs
        whole = None if known is None else known + log_kept.to(known.dtype)
        return replace(self, sampler_logprobs=whole, truncation=None)

    def zero_variance_groups(self) -> set[int]:
        """Returns the groups whose advantages are all 0."""
        alive = {g for g, a in zip(self.host_groups, self.advantages.tolist(), strict=True) if a != 0}
        return set(range(len(self.prompt_lengths))) - alive

    def without_groups(self, groups: Collection[int]) -> "RolloutBatch":
        """Returns the batch less `groups`; their tokens stay in the totals."""
        keep = [s for s, g in enumerate(self.host_groups) if g not in groups]
        return self if len(keep) == len(self.lengths) else self.take(keep)


def _sampler_logprobs(completions: Sequence[Completion], kept: Sequence[Sequence[int]]) -> Tensor | None:
    """Returns [N] float32 of the `kept` tokens, or None unless the engine reported all of them."""
    if not completions or any(c.logprobs is None for c in completions):
        return None
    flat = [x for c, ids in zip(completions, kept, strict=True) for x in (c.logprobs or ())[: len(ids)]]
    return torch.tensor(flat, dtype=torch.float32)
