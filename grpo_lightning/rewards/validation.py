"""Checks what a reward function returns, and shows the sample on which it fails."""

import asyncio
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

from grpo_lightning.errors import ConfigError, RewardError
from grpo_lightning.rewards.time_limit import TimeLimitError
from grpo_lightning.utils.signals import Stopped, listening

LARGEST = 3e38
"""magnitude of rewards, which training keeps in float32; their squares fit into float64 many times over"""
_CLIP = 300
_CONTRACT = "a reward function returns a list with one float, or None where it does not apply, per completion"


@dataclass(frozen=True, slots=True)
class Samples:
    """The S completions that a call scores, as error messages show them."""

    prompts: Sequence[Any]
    completions: Sequence[str]
    columns: Mapping[str, Sequence[Any]]

    def show(self, s: int) -> str:
        """Returns three clipped lines on completion `s`: the end of its prompt, its text, its columns."""
        if not self.completions:
            return "\n  (there were no completions)"
        prompt = repr(self.prompts[s])
        columns = repr({name: values[s] for name, values in self.columns.items()})
        return (
            f"\n  prompt:     {prompt if len(prompt) <= _CLIP else '…' + prompt[-_CLIP:]}"
            f"\n  completion: {clipped(repr(self.completions[s]))}"
            f"\n  columns:    {clipped(columns)}"
        )


@contextmanager
def failures_named(name: str, samples: Samples, seconds: float | None = None) -> Iterator[None]:
    """Turns an exception of the reward function `name` into a RewardError that shows the call's first sample.

    Among them what would end the process with exit code 0, or as if by Ctrl-C: sys.exit, KeyboardInterrupt. A
    ConfigError passes: it says already what to change; a real signal does too. `seconds` is the time limit.
    """
    try:
        yield
    except (ConfigError, Stopped, GeneratorExit):
        raise
    except TimeLimitError:
        raise late(name, samples, seconds) from None
    except BaseException as error:
        if _is_the_runs_own(error):
            raise
        raise RewardError(
            f"reward function {name!r} raised {type(error).__name__}: {error}\n"
            f"The call was for {len(samples.completions)} completions; this is the first:{samples.show(0)}"
        ) from error


def _is_the_runs_own(error: BaseException) -> bool:
    """Whether a reward function did not raise it: a real Ctrl-C, or a task that is being cancelled."""
    if isinstance(error, asyncio.CancelledError):
        try:
            task = asyncio.current_task()
        except RuntimeError:  # no loop: a plain function raised it
            return False
        return task is not None and task.cancelling() > 0
    return isinstance(error, KeyboardInterrupt) and not listening()


def late(name: str, samples: Samples, seconds: float | None) -> RewardError:
    """Returns the error of a call that took longer than `seconds`."""
    return RewardError(
        f"reward function {name!r} did not return within rollout.reward_timeout_s, {seconds:g} s; make it "
        "faster, give what it waits for a time limit of its own, or raise rollout.reward_timeout_s\n"
        f"The call was for {len(samples.completions)} completions; this is the first:{samples.show(0)}"
    )


def as_floats(name: str, returned: object, samples: Samples) -> list[float]:
    """Returns the S rewards of one function; NaN stands for its None.

    Accepts a list, a tuple, or a one-dimensional array or tensor; in it bool, int, float, numpy scalars, 0-d
    tensors and None.

    Raises:
        RewardError: another type, another length, an element that is not a number, NaN or infinity.
    """
    values = _as_list(returned)
    if values is None:
        shape = getattr(returned, "shape", None)
        kind = type(returned).__name__ + ("" if shape is None else f" of shape {tuple(shape)}")
        raise RewardError(
            f"reward function {name!r} returned {clipped(repr(returned))} ({kind}); {_CONTRACT}.\n"
            f"The first completion of the call:{samples.show(0)}"
        )
    if len(values) != len(samples.completions):
        raise RewardError(
            f"reward function {name!r} returned {len(values)} values, expected {len(samples.completions)}; "
            f"{_CONTRACT}.\nThe first completion of the call:{samples.show(0)}"
        )
    return [_as_float(name, s, value, samples) for s, value in enumerate(values)]


def _as_list(returned: Any) -> Sequence[Any] | None:
    if isinstance(returned, list | tuple):
        return returned
    if getattr(returned, "ndim", None) == 1 and hasattr(returned, "tolist"):
        return returned.tolist()
    return None


def _as_float(name: str, s: int, value: Any, samples: Samples) -> float:
    scalar = value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
    if scalar is None:
        return math.nan
    if not isinstance(scalar, Real):
        raise RewardError(
            f"reward function {name!r} returned {clipped(repr(value))} ({type(value).__name__}) "
            f"for completion {s}; {_CONTRACT}.{samples.show(s)}"
        )
    try:
        number = float(scalar)
    except OverflowError:
        number = math.inf
    if not abs(number) <= LARGEST:
        raise RewardError(
            f"reward function {name!r} returned {number} for completion {s}; return a finite number of at "
            f"most {LARGEST:.2g}, or None where the function does not apply.{samples.show(s)}"
        )
    return number


def check_total(names: Sequence[str], row: Sequence[float], total: float, s: int, samples: Samples) -> None:
    """Raises RewardError if the weighted sum of a completion's rewards is beyond what training computes with.

    Args:
        names: K functions.
        row: their values; NaN stands for None.
        total: their weighted sum, NaN where none applies.
        s: the completion.
        samples: of the call.
    """
    if abs(total) > LARGEST:
        values = ", ".join(f"{name} {value:g}" for name, value in zip(names, row, strict=True))
        raise RewardError(
            f"the weighted rewards of completion {s} add up to {total:g} ({values}); the limit is "
            f"{LARGEST:.2g}: lower rollout.reward_weights or what the functions return.{samples.show(s)}"
        )


def clipped(text: str) -> str:
    """Returns the beginning of a text, for a message."""
    return text if len(text) <= _CLIP else f"{text[:_CLIP]}…"
