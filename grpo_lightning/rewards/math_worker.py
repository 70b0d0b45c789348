"""The process behind `math_verifier.py`: reads pairs of answers, writes 1 or 0 for each.

A script, not a module of the package, so that it starts without anything else. Past its CPU time the kernel
ends it, even in the middle of a multiplication; what it may allocate is bounded too, for the sake of
10**10**10.
"""

import json
import logging
import resource
import signal
import sys


def main() -> None:
    """Serves until its input ends."""
    from math_verify import LatexExtractionConfig, parse, verify  # pyright: ignore[reportMissingImports]

    answers, sys.stdout = sys.stdout, sys.stderr
    logging.disable()
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    seconds, kinds = float(sys.argv[1]), [LatexExtractionConfig()]
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        found, expected = (
            parse(f"${text}$", kinds, fallback_mode="no_fallback", parsing_timeout=None)
            for text in json.loads(line)
        )
        equal = bool(found and expected) and verify(expected, found, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(int(equal), file=answers, flush=True)


if __name__ == "__main__":
    main()
