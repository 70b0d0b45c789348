"""One run writes into a folder of checkpoints at a time."""

import errno
import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from grpo_lightning.errors import ConfigError

NAME = ".run.lock"


class RunLock:
    """A file with process id and host, locked as long as this process lives, however it ends.

    The lock is the kernel's: it goes with the process that has it and with no child of it, so that a killed
    run keeps nobody out. Network file systems pass it to other hosts; where one does not, a run on another
    host is not seen.

    Raises:
        ConfigError: another process has the lock.
        OSError: the file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._number = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = self._read()
                os.close(self._number)
                raise ConfigError(
                    f"{folder} is in use by another run ({holder}): wait for its end, or give this run a "
                    "folder of its own by trainer.default_root_dir and ModelCheckpoint's dirpath"
                ) from error
            rank_zero_warn(f"{folder} cannot be locked ({error.strerror}): let no other run write there")
        if before := self._read():
            print(f"{folder}: {before} ended without a word; this run goes on there")
        os.ftruncate(self._number, 0)
        own = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        os.pwrite(self._number, own.encode(), 0)

    def _read(self) -> str:
        return os.pread(self._number, 1000, 0).decode(errors="replace")

    def release(self) -> None:
        """Lets others write into the folder; the file stays, since another may be about to lock it."""
        with suppress(OSError):
            os.ftruncate(self._number, 0)
        os.close(self._number)
