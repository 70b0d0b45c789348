"""A time limit on a call of somebody else's function in this process.

In the main thread the function is interrupted by a signal, so that it may use signals itself (math-verify's
own limit does). In another thread it runs in a daemon thread, which is left behind: nothing joins or stops
it, and the process can end. What never lets go of the interpreter lock stops every thread of Python; there
the process ends with a traceback.
"""

import faulthandler
import signal
import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import Any, TypeVar

from grpo_lightning.errors import ConfigError

T = TypeVar("T")

GRACE_S = 30.0
"""seconds after which a function that ignores its interruption ends the process"""
_SIGNAL = getattr(signal, "SIGURG", None)  # ignored by default: one that comes late does no harm


class TimeLimitError(Exception):
    """A function did not return in time."""


class _Interrupt(BaseException):
    """Raised inside the function; `except Exception` lets it pass."""


def check_time_limit(seconds: float | None) -> None:
    """Raises ConfigError unless `rollout.reward_timeout_s` is a number of seconds or null."""
    if seconds is not None and not 0 < seconds <= 1e6:
        raise ConfigError(
            f"rollout.reward_timeout_s is {seconds}; it must be above 0 and at most 1e6 seconds, "
            "or null for no limit"
        )


def limited(function: Callable[[], T], seconds: float | None, own_thread: bool = False) -> T:
    """Returns what `function` returns.

    Args:
        function: takes nothing; a `partial`.
        seconds: it may take; None is no limit.
        own_thread: run it in another thread although this is the main one, e.g. beside an event loop.

    Raises:
        TimeLimitError: it did not return in time.
    """
    in_main = threading.current_thread() is threading.main_thread() and _SIGNAL is not None
    if seconds is None and not own_thread:
        return function()
    if seconds is not None:
        faulthandler.dump_traceback_later(seconds + GRACE_S, file=2, exit=True)
    try:
        if in_main and not own_thread and seconds is not None:
            return _interrupted(function, seconds)
        return _left_behind(function, seconds)
    finally:
        if seconds is not None:
            faulthandler.cancel_dump_traceback_later()


def _interrupted(function: Callable[[], T], seconds: float) -> T:
    main, returned, late = threading.main_thread(), threading.Event(), False
    assert main.ident is not None
    assert _SIGNAL is not None

    def interrupt(*_: Any) -> None:
        if late:
            raise _Interrupt

    def watch() -> None:
        nonlocal late
        wait = seconds
        while not returned.wait(wait):  # again and again: a bare `except:` swallows the first
            late, wait = True, 1.0
            signal.pthread_kill(main.ident, _SIGNAL)  # pyright: ignore[reportArgumentType]

    before = signal.signal(_SIGNAL, interrupt)
    threading.Thread(target=watch, name="reward-time-limit", daemon=True).start()
    try:
        try:
            return function()
        finally:
            returned.set()
    except BaseException:
        if late:  # whatever the function made of the interruption
            raise TimeLimitError from None
        raise
    finally:
        late = False
        signal.signal(_SIGNAL, signal.SIG_DFL if before is None else before)


def _left_behind(function: Callable[[], T], seconds: float | None) -> T:
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # raised again in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=copy_context().run, args=(run,), name="rewards-call", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        # No PyThreadState_SetAsyncExc: while a blocked thread has an exception pending, Python 3.11 makes
        # every thread look for it at each loop and call, and for ever where one is traced (coverage, pdb).
        raise TimeLimitError
    if errors:
        raise errors[0]
    return results[0]
