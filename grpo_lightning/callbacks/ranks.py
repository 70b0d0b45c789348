"""Ranks that hear of each other's signals and failures, wherever they are; none is left behind."""

import os
import signal
import subprocess
import sys
import time
from threading import Event, Thread, current_thread, main_thread
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from grpo_lightning.utils.signals import EXIT_CODES, received

EVERY = 0.5
"""seconds between two looks"""
GRACE = 20.0
"""seconds that a rank has for leaving by itself once another has failed; it may wait for that one forever"""
PATIENCE = 30.0
"""seconds that rank 0 waits for the ranks it has started"""
STOP, FAILURE = "grpo_lightning/stop", "grpo_lightning/failure"


class RankWatch(Thread):
    """Looks every half second at a signal of this rank, to tell the others, and at theirs.

    Args:
        store: of the process group.
        rank: of this process.
    """

    def __init__(self, store: Any, rank: int) -> None:
        super().__init__(daemon=True, name="rank-watch")
        self._store, self._rank = store, rank
        self._closed = Event()
        self._told = False
        self._woken, self._waker, self._before = -1, -1, -1

    @classmethod
    def of(cls, trainer: pl.Trainer) -> "RankWatch | None":
        """Returns a watch that runs, or None where there is one rank."""
        if trainer.world_size == 1 or not dist.is_initialized():
            return None
        watch = cls(dist.distributed_c10d._get_default_store(), trainer.global_rank)
        watch._listen()
        watch.start()
        return watch

    def _listen(self) -> None:
        """Has signals' numbers written into a pipe: handlers do not run while a collective waits."""
        if current_thread() is main_thread():
            self._woken, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            self._before = signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)

    def run(self) -> None:
        """Looks until `close`."""
        while not self._closed.wait(EVERY):
            try:
                self._share_signal()
                if self._store.check([FAILURE]):
                    self._leave(f"rank {self._store.get(FAILURE).decode()} has failed")
            except RuntimeError:  # rank 0 keeps the store
                self._leave("rank 0 is gone")

    def tell_failure(self) -> None:
        """Tells the other ranks that this one has failed."""
        try:
            self._store.set(FAILURE, str(self._rank))
        except RuntimeError:
            return  # rank 0 is gone already, and they know

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        if self._waker >= 0:
            signal.set_wakeup_fd(self._before)
            self.join(4 * EVERY)
            if not self.is_alive():  # else it may be reading
                os.close(self._waker)
                os.close(self._woken)
            self._waker = -1

    def _share_signal(self) -> None:
        if self._told:
            return
        signum = received() or self._signalled()
        if signum is not None:
            self._store.set(STOP, str(signum))
            self._told = True
        elif self._store.check([STOP]):
            self._told = True
            signal.pthread_kill(main_thread().ident or 0, signal.SIGTERM)  # as if this rank had been told

    def _signalled(self) -> int | None:
        """Returns a signal that has come, whether or not its handler could run."""
        try:
            numbers = os.read(self._woken, 64) if self._waker >= 0 else b""
        except BlockingIOError:
            return None
        return next((n for n in numbers if n in EXIT_CODES), None)

    def _leave(self, why: str) -> None:
        """Ends the process unless its main thread does: what waits for a dead rank may wait forever."""
        if not self._closed.wait(GRACE):
            print(f"rank {self._rank}: {why}; leaving", file=sys.stderr, flush=True)
            os._exit(1)


def await_ranks(trainer: pl.Trainer) -> None:
    """Waits for the ranks that this process has started, and ends those that stay.

    Lightning's observer would kill this process with the first of them that ends, before it has said why.
    """
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return
    ranks: list[subprocess.Popen[bytes]] = list(launcher.procs)
    launcher.procs.clear()  # the observer's own list
    deadline = time.monotonic() + PATIENCE
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
