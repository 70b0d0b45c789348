"""One line for an exception of another library: which option led there, its value, the reason, a remedy."""

import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from grpo_lightning.errors import ConfigError, GRPOError

RUNNING = ("advance", "on_advance_end", "_evaluation_step", "_predict_step")
"""functions of Lightning's loops below which batches are worked on; what fails before is refused"""

REMEDY = "--traceback shows where"
_PLAIN = (str, int, float, bool, type(None))


def report(error: Exception, *, full: bool) -> int:
    """Prints one line on standard error, and with `full` the traceback; returns the exit code."""
    known = ours(error) or named(error, {})
    print(f"error: {' '.join(str(known).split())}", file=sys.stderr)
    if full:
        traceback.print_exception(error)
    return 2 if isinstance(known, ConfigError) else 1


def ours(error: BaseException | None) -> GRPOError | None:
    """Returns the error of ours behind one that jsonargparse or Lightning made of it, if there is one."""
    while error is not None and not isinstance(error, GRPOError):
        error = error.__cause__
    return error


@contextmanager
def explained(given: Callable[[], Mapping[str, Any]], kind: type[GRPOError] = GRPOError) -> Iterator[None]:
    """Turns an exception of another library into one of ours.

    Args:
        given: returns dotted option -> value, of all that differ from the defaults.
        kind: what is raised where no option is known.

    Raises:
        ConfigError: nothing has run yet, and an option that led there is known.
        GRPOError: every other fault.
    """
    try:
        yield
    except Exception as error:
        if ours(error) is not None:
            raise
        raise named(error, given(), kind) from error


def named(error: Exception, given: Mapping[str, Any], kind: type[GRPOError] = GRPOError) -> GRPOError:
    """Returns the error that says in one line what `error` says, and which option it is about.

    Its class is ConfigError where that option is known and nothing ran yet, else `kind`.
    """
    frames = _frames(error)
    section = None
    while isinstance(error.__cause__, Exception) and _wraps(frames):  # what jsonargparse makes of an error
        section = re.search(r'[Kk]ey "([^"]+)"', str(error)) or section
        error = error.__cause__
        frames = _frames(error)
    inside = {k: v for k, v in given.items() if k.startswith(f"{section[1]}.")} if section else {}
    keys = blamed(error, frames, inside or given) or [k for k in inside if k.endswith("class_path")][:1]
    running = any(f.f_code.co_name in RUNNING and "lightning" in f.f_code.co_filename for f in frames)
    text = " ".join(str(error).split())[:400]
    reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if not keys:
        where = (
            f" ({Path(frames[-1].f_code.co_filename).name}, {frames[-1].f_code.co_name})" if frames else ""
        )
        return kind(f"{reason}{where}; {REMEDY}")
    options = " and ".join(f"{key} is {given[key]!r:.100}" for key in keys)
    kind = GRPOError if running else ConfigError
    return kind(f"{options}: {reason}; change {'it' if len(keys) == 1 else 'one of them'} ({REMEDY})")


def _frames(error: BaseException) -> list[FrameType]:
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


def _wraps(frames: list[FrameType]) -> bool:
    return bool(frames) and "jsonargparse" in frames[-1].f_code.co_filename


def blamed(error: Exception, frames: list[FrameType], given: Mapping[str, Any]) -> list[str]:
    """Returns the options that the error is most likely about, at most three; none without evidence.

    Evidence is the option's name or value in the message, the class it names among those that were running,
    and an argument of its name and value in one of the calls that failed.
    """
    scores = {key: _evidence(key, value, str(error), frames) for key, value in given.items()}
    most = max(scores.values(), default=0)
    return [key for key, score in scores.items() if score == most][:3] if most >= 2 else []


def _evidence(key: str, value: Any, message: str, frames: list[FrameType]) -> int:
    name = next(part for part in reversed(key.split(".")) if not part.isdigit())
    quoted = re.search(rf"['\"`]{re.escape(name)}['\"`]|\b{re.escape(name)}=", message)
    spoken = "_" in name and re.search(rf"\b{re.escape(name)}\b", message)
    points = 3 if quoted or spoken else 0
    if name == "class_path":
        own = str(value).rpartition(".")[2]
        running = any(f.f_code.co_qualname.startswith(f"{own}.") for f in frames[-3:])
        missing = running and re.search("not met|not installed|No module named", message)  # a package
        return 3 if missing or re.search(rf"\b{re.escape(own)}\b", message) else 2 if running else 0
    items = value if isinstance(value, list) else [value]
    said = [str(x) for x in items if isinstance(x, _PLAIN) and re.search(_whole(str(x)), message)]
    points += 3 if any(len(text) > 2 and not _number(text) for text in said) else 1 if said else 0
    common = value is None or value == "" or isinstance(value, bool)  # too many arguments have these
    points += (1 if common else 2) * any(_holds(frame, name, value) for frame in frames[-3:])
    return points


def _whole(text: str) -> str:
    return rf"(?<![\w.]){re.escape(text)}(?!\w)"


def _number(text: str) -> bool:
    return text in ("True", "False", "None") or bool(re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", text))


def _holds(frame: FrameType, name: str, value: Any) -> bool:
    found = frame.f_locals.get(name, ...)
    if isinstance(value, list):
        return isinstance(found, list | tuple) and list(found) == value
    return isinstance(value, _PLAIN) and type(found) is type(value) and found == value


def differing(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the dotted options of `config` that are not what they are in `defaults`."""
    usual = dict(leaves(defaults))
    return {k: v for k, v in leaves(config) if k not in usual or repr(usual[k]) != repr(v)}


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of all that nested mappings, and lists of mappings, hold."""
    items = (
        value.items()
        if isinstance(value, Mapping)
        else enumerate(value)
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value)
        else None
    )
    if not items:
        yield key, value
        return
    for name, item in items:
        yield from leaves(item, f"{key}.{name}" if key else str(name))
