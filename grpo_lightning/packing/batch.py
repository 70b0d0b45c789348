"""The packed rollout: what travels from sampling to training. Knows torch and nothing else.

Four axes: `T` packed tokens that go through the model, `N` loss tokens, `S` completions, `P` prompts, each of
which has a group of completions. Nothing is padded: each prompt stands once, its completions follow it. A
completion's loss tokens are those that were sampled; others, as a tool's answer, are context: in T, not in N.
The last loss token and what follows it predict nothing and do not go through the model.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (strict otherwise: torch leaves the types of tolist() and its like unknown)

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_lightning.packing.geometry import RowStarts, SequenceLayout, members_of
from grpo_lightning.packing.loss_tokens import by_token, layout_of, loss_tokens, sampler_logprobs
from grpo_lightning.types import Completion, Truncation


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalizers:
    """Counts of one optimizer step: of all micro-batches, over all ranks, that feed it.

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
"""optional fields of a RolloutBatch with one entry per loss token"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """S scored completions of P prompts, packed. Axes: T model tokens, N loss tokens, S completions.

    Built by `pack`; cut by `optimizer_steps` (whole groups, own normalizers) and `split` (micro-batches).
    """

    input_ids: Tensor  # [T] int64; a prompt stands once, its completions follow it
    position_ids: Tensor  # [T] int64; a completion goes on counting where its prompt ends
    segment_ids: Tensor  # [T] int64; 0 in prompts, 1, 2, ... in the completions of a group
    target_rows: Tensor  # [N] int64; the row of T whose hidden state predicts loss token n
    target_ids: Tensor  # [N] int64; that token
    sequence_ids: Tensor  # [N] int64 in [0, S), sorted
    group_ids: Tensor  # [S] int64 in [0, P), sorted
    rewards: Tensor  # [S] float32; NaN where no reward applies
    advantages: Tensor  # [N] float32; equal within a completion unless `token_advantages`
    group_tokens: Tensor  # [P] int64; loss tokens of each group in the whole optimizer step
    sample_weights: Tensor | None = None  # [S] float32; completions it stands for in metrics; None: all 1
    sampler_logprobs: Tensor | None = None  # [N] nats, the engine's policy; over its kept set if `truncation`
    old_logprobs: Tensor | None = (
        None  # [N] nats, the policy before the first update; None: the training forward's
    )
    ref_logprobs: Tensor | None = None  # [N] nats, the reference policy
    old_entropies: Tensor | None = None  # [N] nats, the policy before the first update
    selected: Tensor | None = None  # [N] bool, the optimizer step's covariance selection
    entropy_keep: Tensor | None = None  # [N] bool, the optimizer step's tokens of high entropy
    sequence_layout: SequenceLayout  # on the host, so that layouts need no device synchronisation
    policy_versions: tuple[int, ...]  # S; optimizer steps before the policy that sampled each completion
    normalizers: Normalizers
    temperature: float
    token_advantages: bool = False
    """whether advantages may differ within a completion, which losses of whole completions refuse"""
    truncation: Truncation | None = None
    """the kept set that `sampler_logprobs` are over; None: the whole vocabulary"""

    @classmethod
    def pack(
        cls,
        *,
        prompt_ids: Sequence[Sequence[int]],
        completions: Sequence[Completion],
        group_ids: Sequence[int],
        advantages: Tensor | Sequence[Tensor],
        rewards: Tensor | None = None,
        max_tokens: int,
        temperature: float = 1.0,
        policy_versions: int | Sequence[int] = 0,
        truncation: Truncation | None = None,
        mask_truncated: bool = False,
        micro_batches: int = 1,
    ) -> "RolloutBatch":
        """Returns the packed form of S completions of P prompts, as one optimizer step of one rank.

        Args:
            prompt_ids: P lists of token ids.
            completions: S completions, those of a group next to each other.
            group_ids: for each completion the index of its prompt, sorted.
            advantages: [S] float; or S tensors with a value for each token of the completion.
            rewards: [S] float; zeros if missing.
            max_tokens: `SamplingParams.max_tokens`, the divisor of Dr. GRPO's aggregation.
            policy_versions: of all completions, or of each.
            truncation: what the sampled completions' log-probabilities are renormalised over.
            mask_truncated: completions cut at `max_tokens` get no loss token; they still count in S.

        Raises:
            ValueError: `group_ids` is not sorted, or sizes differ.
        """
        if len(advantages) != len(completions):
            raise ValueError(f"{len(completions)} completions have {len(advantages)} advantages")
        layout = layout_of(prompt_ids, completions, group_ids, mask_truncated)
        index, n = layout.index_tensors(), len(completions)
        group_tokens = torch.tensor(layout.group_tokens, dtype=torch.int64)
        counts = {"tokens": sum(layout.lengths), "groups": int((group_tokens > 0).sum()), "sequences": n}
        versions = (policy_versions,) * n if isinstance(policy_versions, int) else tuple(policy_versions)
        ids = layout.input_ids(prompt_ids, [c.token_ids for c in completions])
        targets = loss_tokens([c.token_ids for c in completions], layout)
        return cls(
            input_ids=torch.tensor(ids, dtype=torch.int64),
            target_ids=torch.tensor(targets, dtype=torch.int64),
            group_ids=torch.tensor(layout.host_groups, dtype=torch.int64),
            rewards=torch.zeros(n) if rewards is None else rewards.float(),
            advantages=by_token(advantages, completions, layout, index["sequence_ids"]),
            token_advantages=not isinstance(advantages, Tensor),
            policy_versions=versions,
            group_tokens=group_tokens,
            sampler_logprobs=sampler_logprobs(completions, layout),
            sequence_layout=layout,
            normalizers=Normalizers(**counts, max_tokens=max_tokens, micro_batches=micro_batches),
            temperature=temperature,
            truncation=truncation,
            **index,
        )

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """P; tokens of each prompt."""
        return self.sequence_layout.prompt_lengths

    @property
    def lengths(self) -> tuple[int, ...]:
        """S; loss tokens of each completion, 0 is legal."""
        return self.sequence_layout.lengths

    @property
    def host_groups(self) -> tuple[int, ...]:
        """S; `group_ids`, on the host."""
        return self.sequence_layout.host_groups

    @property
    def newest_version(self) -> int:
        """The newest of `policy_versions`; 0 without a completion."""
        return max(self.policy_versions, default=0)

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
        return self.sequence_layout.row_starts()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "RolloutBatch":
        """Returns the batch on `device`."""
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name in self.__slots__
            if isinstance(value := getattr(self, name), Tensor)
        }
        return replace(self, **moved)

    def take(self, sequences: Sequence[int]) -> "RolloutBatch":
        """Returns the completions `sequences` (sorted) and their prompts; the normalizers stay."""
        if len(sequences) == len(self.host_groups) and len(set(self.host_groups)) == len(self.prompt_lengths):
            return self
        selection, layout = self.sequence_layout.select(sequences), self.sequence_layout.take(sequences)
        device = self.input_ids.device

        def on_device(index: Sequence[int]) -> Tensor:
            return torch.tensor(list(index), dtype=torch.int64, device=device)

        token, seq = on_device(selection.tokens), on_device(sequences)
        optional = {
            name: None if (value := getattr(self, name)) is None else value[token] for name in PER_TOKEN
        }
        return replace(
            self,
            input_ids=self.input_ids[on_device(selection.rows)],
            target_ids=self.target_ids[token],
            group_ids=on_device(layout.host_groups),
            rewards=self.rewards[seq],
            advantages=self.advantages[token],
            policy_versions=tuple(self.policy_versions[s] for s in sequences),
            sample_weights=None if self.sample_weights is None else self.sample_weights[seq],
            group_tokens=self.group_tokens[on_device(selection.groups)],
            sequence_layout=layout,
            **{k: v.to(device) for k, v in layout.index_tensors().items()},
            **optional,
        )

    def split(self, m: int, *, whole_groups: bool = False) -> list["RolloutBatch"]:
        """Returns exactly `m` micro-batches, the heaviest as light as can be; some may be empty."""
        return [self.take(part) for part in self.sequence_layout.split(m, whole_groups=whole_groups)]

    def optimizer_steps(self, u: int) -> list["RolloutBatch"]:
        """Returns the batches of `u` optimizer steps, of whole groups, each with the counts of this rank."""
        out = []
        for w in self.split(u, whole_groups=True):
            normalizers = replace(
                self.normalizers,
                tokens=sum(w.lengths),
                sequences=len(w.lengths),
                groups=int((w.group_tokens > 0).sum()),
            )
            out.append(replace(w, normalizers=normalizers))
        return out

    def all_reduce_normalizers(
        self, all_sum: Callable[[Tensor], Tensor], micro_batches: int
    ) -> "RolloutBatch":
        """Returns the batch with the counts of all ranks; `all_sum` adds an int64 vector over ranks."""
        names = ("tokens", "sequences", "groups", "empty_micro_batches")
        sums = all_sum(
            torch.tensor([getattr(self.normalizers, n) for n in names], dtype=torch.int64)
        ).tolist()
        normalizers = replace(
            self.normalizers, **dict(zip(names, sums, strict=True)), micro_batches=micro_batches
        )
        return replace(self, normalizers=normalizers)

    def unshared(self) -> "RolloutBatch":
        """Returns the batch with a copy of its prompt before every completion, for a forward.

        The [N] axis stays as it is. Every completion is a group of its own then, so no loss may see it.
        """
        starts, alone = self.row_starts(), self.sequence_layout.unshared()
        rows: list[int] = []
        for s, (g, p, n) in enumerate(zip(self.host_groups, alone.prompt_lengths, alone.rows, strict=True)):
            rows.extend(range(starts.prompts[g], starts.prompts[g] + p))
            rows.extend(range(starts.completions[s], starts.completions[s] + n))
        device = self.input_ids.device
        return replace(
            self,
            input_ids=self.input_ids[torch.tensor(rows, dtype=torch.int64, device=device)],
            group_ids=torch.arange(len(alone.host_groups), device=device),
            sequence_layout=alone,
            **{k: v.to(device) for k, v in alone.index_tensors().items()},
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
        lengths, heights = self.lengths, self.sequence_layout.rows
        for g, own in enumerate(members_of(self.host_groups, len(self.prompt_lengths))):
            pair = sorted((s for s in own if lengths[s]), key=lambda s: heights[s])[:2]
            rows = self.prompt_lengths[g] + sum(heights[s] for s in pair)
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
        """Returns the groups whose loss tokens all have an advantage of 0."""
        alive = set(self.group_ids[self.sequence_ids[self.advantages != 0]].tolist())
        return set(range(len(self.prompt_lengths))) - alive

    def without_groups(self, groups: Collection[int]) -> "RolloutBatch":
        """Returns the batch less `groups`; their tokens stay in the normalizers."""
        keep = [s for s, g in enumerate(self.host_groups) if g not in groups]
        return self if len(keep) == len(self.lengths) else self.take(keep)
