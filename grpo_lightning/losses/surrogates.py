"""Surrogates: the per-token objective, minimised. A row is a function that asks by name for what it needs.

Any of `AVAILABLE` may be a parameter; most need `(ratio, advantages, logprobs, config)`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_lightning.errors import ConfigError, choices

if TYPE_CHECKING:
    from grpo_lightning.losses.config import LossConfig

AVAILABLE = ("ratio", "advantages", "logprobs", "log_ratio", "segments", "config")
"""ratio, advantages, logprobs, log_ratio [N]; segments: sums per completion; config: the LossConfig"""


@dataclass(frozen=True, slots=True)
class Surrogate:
    """A row of `SURROGATES`."""

    function: Callable[..., Tensor]
    wants: tuple[str, ...]
    levels: tuple[str, ...]
    formula: str
    paper: str

    def __call__(self, **inputs: Any) -> Tensor:
        """Returns l [N]."""
        return self.function(**{name: inputs[name] for name in self.wants})


SURROGATES: dict[str, Surrogate] = {}


def register_surrogate(
    name: str,
    *,
    levels: tuple[str, ...] = ("token", "sequence", "sequence_token"),
    formula: str = "",
    paper: str = "",
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Returns a decorator that adds a function of `AVAILABLE` names, returning [N], to the table.

    Raises:
        ConfigError: the function asks for something that is not available.
    """

    def add(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        wants = tuple(inspect.signature(function).parameters)
        for want in wants:
            if want not in AVAILABLE:
                raise ConfigError(f"surrogate {name!r} asks for the argument {choices(want, AVAILABLE)}")
        SURROGATES[name] = Surrogate(function, wants, levels, formula, paper)
        return function

    return add


@register_surrogate(
    "ppo_clip",
    formula="-min(min(ratio, dual_clip) * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)",
    paper="2402.03300",
)
def ppo_clip(ratio: Tensor, advantages: Tensor, config: "LossConfig") -> Tensor:
    """Returns PPO's clipped objective; `dual_clip` bounds what a negative advantage can cost (1912.09729)."""
    assert config.clip_low is not None
    assert config.clip_high is not None
    free = ratio if config.dual_clip is None else ratio.clamp(max=config.dual_clip)
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    return -torch.minimum(free * advantages, clipped * advantages)
