"""math-verify in a process of its own, which ends when it thinks for too long.

sympy can hang in C, where no signal handler of Python runs, and math-verify's own time limit works in the
main thread alone. So the kernel ends the process after some seconds of its own CPU time, and another takes
its place.
"""

import logging
import os
import re
from functools import cache
from importlib.util import find_spec
from threading import Lock

from grpo_lightning.errors import ConfigError
from grpo_lightning.rewards.process import Process, ProcessEndedError, first_answer

SECONDS = 3
"""CPU time for one pair of answers"""
WAIT_S = 300.0
"""time for an answer on a machine that is busy with other things, the start included"""
MEMORY = 4 << 30
"""bytes, for the sake of 10**10**10"""
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
        self.process = Process("grpo_lightning.rewards.math_worker:verifier", float(SECONDS), MEMORY)
        self._lock = Lock()  # rewards may run in several threads
        self._starts = False

    def ask(self, found: str, expected: str) -> bool:
        """Returns what math-verify says."""
        with self._lock:
            try:
                if not self._starts:
                    first_answer(self.process, ("1", "1"), WAIT_S)
                    self._starts = True
                return first_answer(self.process, (found, expected), WAIT_S) == b"true"
            except ProcessEndedError as ended:
                if not self._starts:
                    raise ConfigError(
                        f"math-verify is installed but does not start ({ended}, see above): "
                        'repair it with pip install "grpo-lightning[math]", or uninstall it'
                    ) from ended
        _log.warning(
            "math-verify was ended over %r, expected %r (at most %d s of CPU time): counts as wrong",
            *(found, expected, SECONDS),
        )
        return False
