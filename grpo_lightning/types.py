"""What is asked of a model and what it answered: prompts, sampling parameters, completions."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from grpo_lightning.errors import hinted
from grpo_lightning.utils.ranges import check_numbers

if TYPE_CHECKING:
    import torch

    from grpo_lightning.packing.batch import RolloutBatch

Message = dict[str, Any]
Prompt = str | list[Message]


CHANGES_PROBABILITIES = {
    "allowed_token_ids",
    "bad_words",
    "frequency_penalty",
    "logit_bias",
    "logits_processors",
    "min_tokens",
    "presence_penalty",
    "structured_outputs",
}
"""keys of `SamplingParams.extra` with which an engine samples from something else than the policy"""


class Truncation(NamedTuple):
    """What forms the set of tokens that sampling keeps."""

    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@hinted
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How completions are sampled; the names are vLLM's.

    Args:
        temperature: divides the logits; 0 means greedy, which only validation may use.
        top_p: nucleus mass in (0, 1]; 1 keeps the whole vocabulary.
        top_k: number of most likely tokens kept; 0 keeps all.
        min_p: drops tokens less likely than `min_p` times the most likely one.
        repetition_penalty: 1 is off.
        max_tokens: most tokens of one completion, the end token included.
        regex: completions must match it (engines with structured outputs only).
        extra: passed to the engine as it is.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    max_tokens: int = 512
    regex: str | None = None
    extra: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        bounds: tuple[tuple[str, bool, str], ...] = (
            ("temperature", self.temperature >= 0, ">= 0 (0 is greedy)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, ">= 0 (0 keeps all)"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "null or in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "> 0 (1 is off)"),
            ("max_tokens", self.max_tokens >= 1, ">= 1"),
        )
        check_numbers("sampling", self, bounds)

    @property
    def truncation(self) -> Truncation | None:
        """What the vocabulary is cut down to, or None where all of it is sampled from."""
        kept = Truncation(self.top_p, self.top_k, self.min_p or 0.0)
        return None if kept == Truncation() else kept

    @property
    def off_policy_options(self) -> list[str]:
        """Options for which the engine's log-probabilities are not those of any policy we can compute."""
        own = [("repetition_penalty", self.repetition_penalty != 1.0), ("regex", self.regex is not None)]
        return [key for key, on in own if on] + sorted(CHANGES_PROBABILITIES & set(self.extra))


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled completion; `token_ids` ends with the end token unless it was cut at `max_tokens`."""

    token_ids: list[int]
    logprobs: list[float] | None = None
    """of each token under the sampler's distribution, in nats; any number where `loss_mask` is False"""
    finish_reason: Literal["stop", "length"] = "stop"
    loss_mask: list[bool] | None = None
    """which tokens were sampled and train; the others are context, as a tool's answer; None: all"""


@dataclass(slots=True, kw_only=True)
class PromptBatch:
    """P prompts of one rollout on this rank, dealt once per micro-batch: `micro_batch` of `micro_batches`.

    `rollout` is empty when a loader yields the batch; the rollout callback puts its micro-batch there.
    """

    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    columns: dict[str, list[Any]]
    uids: list[int]
    """a number per prompt that is stable over runs and ranks; keys its sampling seeds"""
    model_inputs: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """what a model reads of each prompt beside its tokens, by the engine's names, e.g.
    {multi_modal_data: ...}; empty for prompts of text. Engines get them; a module that takes them from here
    says so by `reads_model_inputs = True`, since a `RolloutBatch` does not carry them"""
    rollout_index: int = 0
    """how many rollouts came before this one, since the beginning of training"""
    micro_batch: int = 0
    micro_batches: int = 1
    rollout: "RolloutBatch | None" = None
    samples: dict[str, list[Any]] | None = None
    """columns of the rollout's samples, for people to read; put here together with the rollout"""
    spares: "list[PromptBatch]" = field(default_factory=list["PromptBatch"])
    """further batches of P prompts, whose i-th may stand in for the i-th prompt here"""

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def take(self, i: int) -> "PromptBatch":
        """Returns prompt `i` alone."""
        return PromptBatch(
            prompts=[self.prompts[i]],
            prompt_ids=[self.prompt_ids[i]],
            columns={name: [values[i]] for name, values in self.columns.items()},
            uids=[self.uids[i]],
            model_inputs=self.model_inputs[i : i + 1],
            rollout_index=self.rollout_index,
        )

    @classmethod
    def join(cls, batches: "list[PromptBatch]") -> "PromptBatch":
        """Returns the prompts of all `batches`, of one rollout; a column that some lack is None there."""
        names = dict.fromkeys(name for b in batches for name in b.columns)
        return cls(
            prompts=[p for b in batches for p in b.prompts],
            prompt_ids=[ids for b in batches for ids in b.prompt_ids],
            columns={n: [v for b in batches for v in b.columns.get(n, [None] * len(b))] for n in names},
            uids=[uid for b in batches for uid in b.uids],
            model_inputs=[x for b in batches for x in b.model_inputs or [{}] * len(b)]
            if any(b.model_inputs for b in batches)
            else [],
            rollout_index=batches[0].rollout_index if batches else 0,
        )

    def to(self, device: "torch.device | str") -> "PromptBatch":
        """Returns itself with its rollout, if any, on `device`; Lightning calls it."""
        if self.rollout is not None:
            self.rollout = self.rollout.to(device)
        return self
