"""Runs Python that nobody trusts, in namespaces of its own; Linux only. See `sandbox_init.py` for how."""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from grpo_lightning.rewards.system_calls import numbers, seccomp_filter

_SETUP_S = 60.0
"""seconds that making a sandbox may take on a busy machine"""
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
_PROBE = "import os; print(os.getppid(), sorted(os.listdir('/dev')))"
_PROBED = b"1 ['null', 'random', 'urandom', 'zero']\n"


class SandboxError(Exception):
    """A sandbox could not be set up; the text says why."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use; sizes in bytes.

    `memory` holds for each process and for all of them, `disk` for each file and for /tmp.
    """

    seconds: float = 6.0
    memory: int = 512 << 20
    disk: int = 32 << 20
    output: int = 1 << 20
    processes: int = 16
    files: int = 64


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended."""

    status: int
    """exit status; 128 + n after signal n, 124 when time, 123 when memory was over"""
    output: bytes
    """at most `Limits.output`; a program that writes more is ended"""


def start(
    source: str,
    arguments: Sequence[str],
    limits: Limits,
    *,
    sandboxed: bool = True,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    descriptors: Sequence[int] = (),
    folder: str = "/",
) -> "subprocess.Popen[bytes]":
    """Starts `python -I -S -c source arguments` in a sandbox; returns the process that it ends with.

    Without the sandbox, it has limits alone, and the folder that it runs in is left to it.

    Args:
        source: of Python.
        arguments: that it finds in `sys.argv[1:]`.
        limits: of the program.
        sandboxed: in namespaces of its own.
        stdin: a descriptor.
        stdout: a descriptor, or `subprocess.PIPE`.
        descriptors: others that it gets, under their numbers.
        folder: where it runs if it is not sandboxed; else its /tmp.
    """
    python = os.path.realpath(sys.executable)
    spec = {
        "command": [python, "-I", "-S", "-B", "-c", source, *arguments],
        # Not all of its prefix: in a home, that may hold more than Python.
        "readable": [python, f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64", *_LIBRARIES],
        "sandboxed": sandboxed,
        "filter": seccomp_filter() if sandboxed else [],
        "calls": numbers("mount_setattr", "pivot_root") if sandboxed else {},
        "descriptors": list(descriptors),
        "folder": folder,
        "seconds": limits.seconds,
        "memory": limits.memory,
        "disk": limits.disk,
        "processes": limits.processes,
        "files": limits.files,
    }
    init = Path(__file__).with_name("sandbox_init.py")
    return subprocess.Popen(
        [python, "-I", "-S", str(init), json.dumps(spec)],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        pass_fds=descriptors,
        env={"LANG": "C.UTF-8"},
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[bytes]", limits: Limits, output: int | None) -> Outcome:
    """Waits for a program; ends it where it writes too much or the sandbox itself hangs.

    Args:
        process: from `start`.
        limits: as given to it.
        output: descriptor that is read until it ends, and stays open.

    Raises:
        SandboxError: the sandbox could not be set up.
    """
    with process:
        try:
            written = b"" if output is None else _read(output, limits)
            complaint = process.stderr.read(4000) if process.stderr and written is not None else b""
        finally:
            process.kill()  # the namespace ends with it
    if complaint:
        raise SandboxError(complaint.decode(errors="replace"))
    return Outcome(process.returncode, written or b"")


def _read(descriptor: int, limits: Limits) -> bytes | None:
    """Returns what is written until the end, None if that is too much or takes too long."""
    out = bytearray()
    until = time.monotonic() + limits.seconds + _SETUP_S
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while poll.poll(max(0.0, until - time.monotonic()) * 1000):
        chunk = os.read(descriptor, 1 << 16)
        if not chunk:
            return bytes(out)
        out += chunk
        if len(out) > limits.output:
            return None
    return None


@contextmanager
def handed_over(text: str) -> Iterator[int]:
    """Gives a descriptor from which a program can read `text`; nobody can write to it."""
    import fcntl

    descriptor = os.memfd_create("given", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(text.encode(errors="replace"))
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


@cache
def why_not() -> str | None:
    """Returns why this machine has no sandboxes, None if it has: found out by making one."""
    if sys.platform != "linux":
        return f"namespaces are Linux's, and this is {sys.platform}"
    limits = Limits(seconds=30.0)
    try:
        process = start(_PROBE, [], limits, stdout=subprocess.PIPE)
        assert process.stdout is not None
        outcome = finish(process, limits, process.stdout.fileno())
    except SandboxError as error:
        return str(error)
    except KeyError as error:
        return f"the system calls of {error.args[0]} are not known here"
    return None if outcome == Outcome(0, _PROBED) else f"a program that lists /dev ended with {outcome}"
