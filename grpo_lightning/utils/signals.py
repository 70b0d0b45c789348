"""Signals that end a run: noted at once, acted on where nothing is lost.

Inside `at_once()` a signal raises `Stopped` immediately: where user code runs, and before training starts.
Inside `deferred()` it is only noted, and the next `check()` between two chunks of work raises it. Outside of
both it waits for the end of the optimizer step.
"""

import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

from grpo_lightning.errors import GRPOError

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}
"""what each signal that stops a run makes of it; SLURM announces the end of a job with SIGUSR1"""


class Stopped(SystemExit):
    """A signal has ended the run; `code` is the exit code of the process.

    Args:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(EXIT_CODES[signal.Signals(signum)])
        self.signum = signum


class _Signals:
    """The one listener of the process; signals belong to processes."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.raises = False
        self.leavable = 0  # how many blocks around this place a signal may leave
        self.listening = 0
        self.before: dict[int, Any] = {}
        self.command: list[str] | None = None

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None and signum == signal.SIGINT:
            os.write(2, b"\nleaving at once\n")
            os._exit(EXIT_CODES[signal.SIGINT])  # no handler, lock or save may keep a person waiting
        if self.received is None:
            again = "; Ctrl-C again leaves at once" if signum == signal.SIGINT else ""
            # No print: a handler may interrupt one.
            os.write(2, f"\n{signal.Signals(signum).name}: stopping{again}\n".encode())
            self.received = signum
        before = self.before.get(signum)
        if callable(before) and before is not signal.default_int_handler:
            before(signum, frame)
        if self.raises:
            raise Stopped(self.received)


_signals = _Signals()


def listen() -> None:
    """Takes the signals over, in `at_once` mode, if this is the main thread; each call needs its `ignore`."""
    if threading.current_thread() is not threading.main_thread():
        return
    _signals.listening += 1
    if _signals.listening > 1:
        return
    _signals.received, _signals.raises, _signals.leavable = None, True, 1
    for signum in EXIT_CODES:
        _signals.before[signum] = signal.signal(signum, _signals.handle)


def ignore() -> None:
    """Gives the signals back to whoever had them before the first `listen`."""
    if threading.current_thread() is not threading.main_thread() or not _signals.listening:
        return
    _signals.listening -= 1
    if _signals.listening:
        return
    _signals.raises, _signals.leavable = False, 0
    for signum, before in _signals.before.items():
        signal.signal(signum, before if before is not None else signal.SIG_DFL)
    _signals.before.clear()


def listening() -> bool:
    """Whether a real Ctrl-C comes as `Stopped`, so that a KeyboardInterrupt is user code's own."""
    return _signals.listening > 0


def received() -> int | None:
    """Returns the signal that has asked the run to stop, if one has."""
    return _signals.received


def receive(signum: int) -> None:
    """Notes a signal that another rank has had."""
    _signals.received = _signals.received or signum


def check() -> None:
    """Raises `Stopped` if a signal has come and a block of `at_once` is around; cheap enough for a token."""
    if _signals.received is not None and _signals.leavable:
        raise Stopped(_signals.received)


@contextmanager
def _mode(raises: bool) -> Iterator[None]:
    before, _signals.raises = _signals.raises, raises
    _signals.leavable += raises
    try:
        if raises:
            check()
        yield
    finally:
        _signals.leavable -= raises
        _signals.raises = before


def at_once() -> AbstractContextManager[None]:
    """Returns a block that a signal leaves immediately; one that has come already leaves it on entry."""
    return _mode(True)


def deferred() -> AbstractContextManager[None]:
    """Returns a block that a signal does not interrupt."""
    return _mode(False)


def defer() -> None:
    """From here on a signal waits for the next `check`, or a block of `at_once`."""
    _signals.raises, _signals.leavable = False, 0


def set_command(argv: list[str]) -> None:
    """Notes the command line of the run, so that the one that resumes it can be printed."""
    _signals.command = argv


def resume_hint(path: object) -> str:
    """Returns how to go on from a checkpoint: a shell command, or an argument in a Python program."""
    if _signals.command is None:
        return f"trainer.fit(..., ckpt_path={str(path)!r})"
    kept, skip = [], False
    for arg in _signals.command:
        if skip:
            skip = False
        elif arg == "--ckpt_path":
            skip = True
        elif not arg.startswith("--ckpt_path="):
            kept.append(arg)
    installed = os.path.basename(sys.argv[0]) == "grpo-lightning"
    own = "grpo-lightning" if installed else f"{sys.executable} -m grpo_lightning"
    return f"{own} {shlex.join([*kept, '--ckpt_path', str(path)])}"


@contextmanager
def exits_named(what: str, kind: type[GRPOError]) -> Iterator[None]:
    """Turns what would end the process with success, or as if by Ctrl-C, into an error that names the place.

    Args:
        what: whose code runs.
        kind: of the error that sys.exit, KeyboardInterrupt, CancelledError and the like become.
    """
    try:
        yield
    except (Exception, Stopped, GeneratorExit):
        raise
    except BaseException as error:
        # Lightning makes sys.exit(1) of a KeyboardInterrupt.
        own = error.__context__ if isinstance(error.__context__, KeyboardInterrupt) else error
        if isinstance(own, KeyboardInterrupt) and not listening():
            raise
        raised = f"{type(own).__name__}({', '.join(map(repr, own.args))})"
        raise kind(
            f"{what} raised {raised} at {_place(own)}; raise an exception, or return, instead"
        ) from error


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "an unknown place"
    code = trace.tb_frame.f_code
    return f"{code.co_filename}:{trace.tb_lineno} ({code.co_name})"
