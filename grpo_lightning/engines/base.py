"""The seam between training and sampling: token ids go in, token ids and their log-probabilities come out."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from grpo_lightning.policy.policy import Policy
from grpo_lightning.types import Completion, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and the seeds of the completions that are wanted of it."""

    prompt_ids: list[int]
    seeds: list[int]
    """one 64-bit seed per completion"""
    uid: int = 0
    rollout_index: int = 0
    model_inputs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """what the model reads beside the tokens, by the engine's names, e.g. {multi_modal_data: ...}"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineContext:
    """What an engine may want to know before it starts."""

    policy: Policy
    """the live policy, for engines in this process; others take their weights from `sync`"""
    model_path: str
    max_model_len: int | None
    """longest prompt plus longest completion, in tokens; None where the data does not say"""
    sampling: SamplingParams
    model_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """passed to `from_pretrained`, trust_remote_code and revision among them"""
    corrected: bool = False
    """whether the loss corrects for an engine that samples from something else than the policy"""
    world_size: int = 1
    rank: int = 0
    local_rank: int = 0


NamedWeight = tuple[str, Tensor]
"""a weight and its name in the checkpoint"""

SyncKind = Literal["adapter", "merge", "full"]


class AdaptedModule(NamedTuple):
    """What trains of one adapted linear layer."""

    a: Tensor  # [r, K]
    b: Tensor  # [O, r]
    rows: Tensor | None = None  # [O] fp32; DoRA scales each output by its magnitude over its norm


class WeightSource(Protocol):
    """The weights of one policy version, for an engine that keeps its own copy, here or in another process.

    Tensors come one after the other, so that no second copy of a model is ever whole in memory. They may be
    the policy's own: copy or send each before asking for the next.
    """

    def adapter(self) -> Mapping[str, AdaptedModule]:
        """Returns what trains of each adapted linear layer, by the layer's name."""
        ...

    def tensors(
        self,
        kind: SyncKind,
        dtype: torch.dtype,
        *,
        stacked: Mapping[str, list[str]] | None = None,
        first: bool = False,
    ) -> Iterator[NamedWeight]:
        """Yields (name, weight) of what a sync of this kind sends.

        Args:
            kind: `merge`: every module that training changes, adapter added; `full`: every weight;
                `adapter`: what an engine that was given `adapter()` holds otherwise than it loaded, which
                are modules that train as a whole, and before the first rollout a base that PiSSA has changed.
            dtype: of the tensors.
            stacked: the engine's module -> its parts, e.g. {qkv_proj: [q_proj, k_proj, v_proj]}, which then
                come together, biases included; None where each weight may come alone.
            first: whether this is the first sync.
        """
        ...


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples completions from a policy that it is given; holds no training state.

    `policy_version` is the version last given to `sync`; a rollout asserts that it is being trained. An
    engine whose numbers need not be the policy's sets `exact = False`; all others are compared in each step.
    """

    policy_version: int

    def start(self, context: EngineContext) -> None:
        """Makes the engine ready; called once, after the strategy is set up. Raises EngineError."""
        ...

    def sync(self, source: WeightSource, version: int) -> None:
        """Makes the engine serve the weights of `source`, from now on called `version`."""
        ...

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[list[Completion]]:
        """Returns for each request one completion per seed, in order; wakes a sleeping engine."""
        ...

    def sleep(self) -> None:
        """Gives memory back until the next `sync` or `generate`."""
        ...

    def close(self) -> None:
        """Ends the engine."""
        ...


def sample_seeds(run_seed: int, rollout_index: int, uid: int, count: int) -> list[int]:
    """Returns `count` 64-bit seeds, a pure function of run, rollout, prompt and sample."""
    keys = (f"{run_seed}:{rollout_index}:{uid}:{i}".encode() for i in range(count))
    return [int.from_bytes(hashlib.blake2b(k, digest_size=8).digest(), "little") for k in keys]


def describe(engine: Any) -> str:
    """Returns an engine's name for messages."""
    return type(engine).__name__
