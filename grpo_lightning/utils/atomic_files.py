"""Files and folders that appear whole or not at all: temporary names, renames, and `fsync` of the folder."""

import errno
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from grpo_lightning.errors import CheckpointError

STRAY = re.compile(r"^\..+\.tmp-(\d+)-[0-9a-f]+-(.+)$")
"""a name of `temporary`: process id and host"""


def temporary(path: Path) -> Path:
    """Returns a hidden name beside `path` that says which process it belongs to."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{time.time_ns():x}-{socket.gethostname()}")


def remove_strays(folder: Path) -> list[str]:
    """Removes what processes that are dead, or run elsewhere, left under temporary names; returns the names.

    Call it while no other run may write here.
    """
    found: list[str] = []
    for path in folder.iterdir():
        match = STRAY.match(path.name)
        if match is None or (match[2] == socket.gethostname() and _lives(int(match[1]))):
            continue
        remove(path)
        found.append(path.name)
    return found


def _lives(pid: int) -> bool:
    """Returns whether a process that is not this one exists."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that knows no such thing
            raise
    finally:
        os.close(number)


def sync_file(file: Path) -> None:
    """Brings a file's content to the disk."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


@contextmanager
def moved_away(path: Path) -> Iterator[None]:
    """Takes a name away, and removes what had it after the body; gives it back if the body fails."""
    if not os.path.lexists(path):
        yield
        return
    old = temporary(path)
    os.rename(path, old)
    sync_folder(path.parent)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # the first error says more
            os.rename(old, path)
        raise
    remove(old)


def remove(path: Path) -> None:
    """Removes a file, link or folder of a temporary name; what cannot be removed is in nobody's way."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def removed_after(*paths: Path) -> Iterator[None]:
    """Removes temporary names after the body, whichever of them are left."""
    try:
        yield
    finally:
        for path in paths:
            remove(path)


@contextmanager
def failures_named(file: Path, new: Path) -> Iterator[None]:
    """Makes a CheckpointError of an OSError: which file, how many bytes, how many are free.

    Args:
        file: what is to be replaced.
        new: the temporary name it is written under.
    """
    try:
        yield
    except OSError as error:
        written, free = 0, None
        with suppress(OSError):
            written = new.stat().st_size
        with suppress(OSError):
            free = shutil.disk_usage(file.parent).free
        room = "" if free is None else f", {free:,} bytes are free there"
        old = f"; the older {file.name} is as it was" if file.exists() else ""
        raise CheckpointError(
            f"{file} was not saved: {error.strerror or error} ({written:,} bytes were written{room}){old}"
        ) from error
