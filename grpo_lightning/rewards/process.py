"""A process for work that may hang: it is killed with all its children, and another takes its place."""

import os
import pickle
import signal
import subprocess
import sys
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe

from grpo_lightning.utils.credentials import without_credentials

MEMORY = 16 << 30
"""bytes of private memory that a process may have; far above what a healthy reward takes"""
LONGEST_REPLY = 1 << 30
"""bytes"""


class ProcessEndedError(Exception):
    """The process ended instead of answering; the text says how."""


class Process:
    """A process that serves requests of this one, made anew whenever it has ended.

    Requests go as pickles, since columns may hold anything; answers come as JSON, since what runs there may
    be led astray by what a model wrote. The process ends with this one.

    Args:
        factory: `"module:name"` of what makes the handler of requests, see `worker.py`.
        setup: argument of the factory; pickled.
        memory: bytes of private memory.
    """

    def __init__(self, factory: str, setup: object, memory: int = MEMORY) -> None:
        self._factory, self._memory = factory, memory
        self._setup = pickle.dumps(setup)
        self._owner = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    @property
    def pid(self) -> int | None:
        """The id of the process, None while there is none."""
        return None if self._process is None else self._process.pid

    def send(self, request: object) -> Connection:
        """Sends a request, to a new process if need be; returns where its answers arrive.

        Raises:
            ProcessEndedError: the process has ended before it could read.
        """
        if self._connection is None:
            self._connection = self._start()
        try:
            self._connection.send_bytes(pickle.dumps(request))
        except OSError as error:
            raise ProcessEndedError(self.kill(patience=0.5)) from error
        return self._connection

    def receive(self, connection: Connection) -> bytes:
        """Returns an answer that has arrived.

        Raises:
            ProcessEndedError: the process has ended.
        """
        try:
            return connection.recv_bytes(LONGEST_REPLY)
        except (EOFError, OSError) as error:
            raise ProcessEndedError(self.kill(patience=0.5)) from error

    def kill(self, patience: float = 0.0) -> str:
        """Ends the process and its children; returns how it ended, for a message.

        Args:
            patience: seconds for one that is ending by itself, to learn how.
        """
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            connection.close()
        if process is None:
            return "it was not running"
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        return f"exit status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"

    def _start(self) -> Connection:
        mine, theirs = Pipe()
        fd = theirs.fileno()
        # The path: what this process can import, that one can. -P: and nothing beside its script.
        environment = {
            **without_credentials(os.environ),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        command = [sys.executable, "-P", "-m", "grpo_lightning.rewards.worker", str(fd), str(self._memory)]
        self._process = subprocess.Popen(
            [*command, self._factory],
            stdin=subprocess.DEVNULL,
            pass_fds=[fd],
            start_new_session=True,
            env=environment,
        )
        self._owner = os.getpid()
        theirs.close()
        self._connection = mine
        mine.send_bytes(self._setup)
        return mine

    def __del__(self) -> None:
        # A fork has the object, not the process; at the end of the interpreter the closed pipe is enough.
        if getattr(self, "_process", None) is not None and self._owner == os.getpid():
            self.kill()


def first_answer(process: Process, request: object, seconds: float) -> bytes:
    """Returns what the process answers to a request.

    Raises:
        ProcessEndedError: it has ended, or takes longer than `seconds` and was ended.
    """
    connection = process.send(request)
    if connection.poll(seconds):
        return process.receive(connection)
    raise ProcessEndedError(f"no answer within {seconds:g} s, {process.kill()}")
