"""math-verify in a process of its own, which ends when it thinks for too long.

sympy can hang in C, where no signal handler of Python runs, and math-verify's own time limit works in the
main thread alone. So the kernel ends the process after some seconds of its own CPU time, and another takes
its place.
"""

import json
import logging
import os
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock

from grpo_lightning.errors import ConfigError

SECONDS = 3
"""CPU time for one pair of answers"""
LONGEST = 400
"""characters of an answer that is looked at"""
_WORD = re.compile(r"[A-Za-z]{3,}")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_log = logging.getLogger(__name__)


def equivalent(found: str, expected: str) -> bool:
    """Returns whether math-verify takes two answers for the same; False without it, or where it gave up.

    Prose is not shown to it: to sympy a word is a product of its letters, and an anagram the same product.

    Raises:
        ConfigError: math-verify is installed, and does not start.
    """
    for text in (found, expected):
        if not text.strip() or len(text) > LONGEST or _WORD.search(_COMMAND.sub(" ", text)):
            return False
    return find_spec("math_verify") is not None and _of_process(os.getpid()).ask(found, expected)


@cache
def _of_process(pid: int) -> "_Verifier":
    """Returns the verifier of this process; a fork has its own."""
    return _Verifier()


class _Verifier:
    """Keeps one process alive between calls."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = Lock()  # rewards may run in several threads

    def ask(self, found: str, expected: str) -> bool:
        """Returns what math-verify says."""
        with self._lock:
            process = self._process = self._process or _start()
            answer = _exchange(process, json.dumps([found, expected]))
            if answer:
                return answer == "1"
            process.wait()
            self._process = None
        _log.warning(
            "math-verify was ended over %r, expected %r (at most %d s of CPU time): counts as wrong",
            *(found, expected, SECONDS),
        )
        return False


def _start() -> "subprocess.Popen[str]":
    # -P: the folder of the script holds a gym.py. The path: what this process can import, that one can.
    command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py")), str(SECONDS)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise ConfigError(
            f"math-verify is installed but does not start (exit status {process.wait()}, see above): "
            'repair it with pip install "grpo-lightning[math]", or uninstall it'
        )
    return process


def _exchange(process: "subprocess.Popen[str]", line: str) -> str:
    """Returns the line that the process answers, empty if it has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
    except BrokenPipeError:
        return ""
    return process.stdout.readline().strip()
