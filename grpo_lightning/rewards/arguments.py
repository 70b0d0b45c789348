"""What a reward function is called with: the contract of TRL 1.16, by keyword."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

from grpo_lightning.errors import ConfigError
from grpo_lightning.rewards.resolve import RewardFunction

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""what every function may ask for besides the dataset's columns"""
HIDDEN = frozenset({"prompt", "completion", *GIVEN})
"""columns that never reach a function: they would stand for something else than their name says"""


@dataclass(frozen=True, slots=True)
class NamedReward:
    name: str
    function: RewardFunction
    accepted: frozenset[str] | None
    """parameters it names; None = takes everything"""
    required: frozenset[str]
    bound: frozenset[str]
    """parameters that a `partial` has set: they stay as set, even if a column has the name"""

    @classmethod
    def of(cls, name: str, function: RewardFunction) -> "NamedReward":
        bound = frozenset(function.keywords) if isinstance(function, partial) else frozenset[str]()
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # some functions written in C have no signature
            return cls(name, function, None, frozenset(), bound)
        single = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        required = frozenset(p.name for p in single if p.default is p.empty)
        positional = [p.name for p in single if p.kind is p.POSITIONAL_ONLY and p.name in required]
        if positional:
            raise ConfigError(
                f"reward function {name!r} has the positional-only parameters {positional}; "
                "rewards are called with keywords, so remove the '/'"
            )
        everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return cls(name, function, None if everything else frozenset(p.name for p in single), required, bound)

    def pick(self, copies: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
        """Returns fresh copies of the arguments that the function takes."""
        names = [n for n in copies if (self.accepted is None or n in self.accepted) and n not in self.bound]
        return {name: copies[name]() for name in names}


def copies_of(
    prompts: Sequence[Any],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
    trainer_state: Any,
) -> dict[str, Callable[[], Any]]:
    """Returns what makes fresh copies of the arguments, by name; changing them reaches no one."""
    return {
        **{name: partial(_copied, values) for name, values in columns.items() if name not in HIDDEN},
        "prompts": partial(_copied, prompts),
        "completions": partial(_as_messages, prompts, completions),
        "completion_ids": lambda: [list(ids) for ids in completion_ids],
        "trainer_state": lambda: deepcopy(trainer_state),
    }


def _copied(values: Sequence[Any]) -> list[Any]:
    # One by one: the completions of a group share one object, of which a common copy would still be shared.
    return [deepcopy(value) for value in values]


def _as_messages(prompts: Sequence[Any], completions: Sequence[str]) -> list[Any]:
    return [
        [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text
        for prompt, text in zip(prompts, completions, strict=True)
    ]


def name_of(function: Any) -> str:
    if isinstance(function, partial):
        return name_of(function.func)
    return getattr(function, "__name__", None) or type(function).__name__


def unique(names: Sequence[str]) -> list[str]:
    """Returns the names, a repeated one with a number: metrics are kept by name."""
    out: list[str] = []
    for name in names:
        candidate, n = name, 1
        while candidate in out:
            n += 1
            candidate = f"{name}_{n}"
        out.append(candidate)
    return out
