"""The seam between training and sampling: token ids go in, token ids and their log-probabilities come out."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

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


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineContext:
    """What an engine may want to know before it starts."""

    policy: Policy
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

    def sync(self, policy: Policy, version: int) -> None:
        """Makes the engine serve the weights of `policy`, from now on called `version`."""
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
