"""Errors a user can act on: each names the key, the value, what is allowed and one remedy."""

from collections.abc import Iterable
from difflib import get_close_matches


class GRPOError(Exception):
    """Base of every error that grpo-lightning raises on purpose."""


class ConfigError(GRPOError, ValueError):
    """An option has a value that cannot work; known before any model is loaded."""


class DataError(ConfigError):
    """The dataset cannot be used as it is; names file and line, or the column."""


class RewardError(GRPOError, RuntimeError):
    """A reward function failed or returned something that is not a reward."""


class EngineError(GRPOError, RuntimeError):
    """A rollout engine could not start, synchronise or generate."""


class CheckpointError(GRPOError, RuntimeError):
    """A checkpoint could not be written, or what is there cannot be read."""


def choices(value: object, allowed: Iterable[str]) -> str:
    """Returns `"'dapoo' (did you mean 'dapo'? allowed: bnpo, dapo)"`, for use in an error message."""
    names = sorted(allowed)
    close = get_close_matches(str(value), names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{value!r} ({hint}allowed: {', '.join(names)})"
