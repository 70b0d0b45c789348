"""Errors a user can act on: each names the key, the value, what is allowed and one remedy."""

import inspect
from collections.abc import Iterable
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar

from grpo_lightning.migration.options import explain

C = TypeVar("C")


class GRPOError(Exception):
    """Base of every error that grpo-lightning raises on purpose."""


class ConfigError(GRPOError, ValueError):
    """An option has a value that cannot work; known before any model is loaded."""


class UnknownOption(ConfigError, TypeError):
    """A keyword argument that a class does not have; a TypeError too, which Python raises for functions."""


class DataError(ConfigError):
    """The dataset cannot be used as it is; names file and line, or the column."""


class RewardError(GRPOError, RuntimeError):
    """A reward function failed or returned something that is not a reward."""


class EngineError(GRPOError, RuntimeError):
    """A rollout engine could not start, synchronise or generate."""


class CheckpointError(GRPOError, RuntimeError):
    """A checkpoint could not be written, or what is there cannot be read."""


class OutOfMemory(GRPOError, MemoryError):
    """A device had no memory left; names what takes it, with present values."""


def choices(value: object, allowed: Iterable[str]) -> str:
    """Returns `"'dapoo' (did you mean 'dapo'? allowed: bnpo, dapo)"`, for use in an error message."""
    names = sorted(allowed)
    close = get_close_matches(str(value), names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{value!r} ({hint}allowed: {', '.join(names)})"


def hinted(cls: type[C]) -> type[C]:
    """Makes a class name all unknown keywords, and where the options are that are meant.

    Its signature stays as it is, for editors and for the command line.

    Raises:
        UnknownOption: by the class, on construction.
    """
    init = cls.__init__
    names = [name for name in inspect.signature(init).parameters if name != "self"]

    @wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        if unknown := [key for key in kwargs if key not in names]:
            raise UnknownOption("; ".join(_no_option(cls.__name__, key, names) for key in unknown))
        init(self, *args, **kwargs)

    cls.__init__ = checked
    return cls


def _no_option(owner: str, key: str, names: list[str]) -> str:
    near = get_close_matches(key, names, n=1, cutoff=0.75)
    meant = explain(key) or (f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names)}")
    return f"{owner} has no option {key!r}: {meant}"
