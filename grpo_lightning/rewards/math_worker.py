"""math-verify in a worker process, see `worker.py`. Past its CPU time the kernel ends it.

Even in the middle of a multiplication: no signal handler of Python runs there.
"""

import logging
import signal
import sys

from grpo_lightning.rewards.worker import Handler, Tell


def verifier(seconds: float) -> Handler:
    """Returns the handler of pairs of answers, which says for each whether they are the same.

    Args:
        seconds: of CPU time for one pair.
    """
    from math_verify import LatexExtractionConfig, parse, verify  # pyright: ignore[reportMissingImports]

    sys.stdout = sys.stderr
    logging.disable()
    kinds = [LatexExtractionConfig()]

    def handle(pair: tuple[str, str], tell: Tell) -> None:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        found, expected = (
            parse(f"${text}$", kinds, fallback_mode="no_fallback", parsing_timeout=None) for text in pair
        )
        equal = bool(found and expected) and verify(expected, found, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        tell(bool(equal))

    return handle
