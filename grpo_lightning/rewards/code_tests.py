"""Runs one program against its tests; every verdict comes from where the program cannot write."""

import json
import os
import subprocess
import tempfile
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

from grpo_lightning.rewards.sandbox import Limits, finish, handed_over, start

_CHILD = Path(__file__).with_name("code_child.py").read_text(encoding="utf-8")


def prints(program: str, given: str, expected: str, limits: Limits, sandboxed: bool) -> bool:
    """Returns whether the program as a script prints what is expected, and ends with status 0.

    Blanks at the ends of lines and of the whole text do not count.
    """
    with _folder(sandboxed) as folder, handed_over(program) as code, handed_over(given) as stdin:
        process = start(
            _CHILD,
            ["program", str(code)],
            limits,
            sandboxed=sandboxed,
            stdin=stdin,
            stdout=subprocess.PIPE,
            descriptors=[code],
            folder=folder,
        )
        assert process.stdout is not None
        outcome = finish(process, limits, process.stdout.fileno())
    return outcome.status == 0 and _lines(outcome.output.decode(errors="replace")) == _lines(expected)


def asserts_passed(program: str, tests: list[str], limits: Limits, sandboxed: bool) -> int:
    """Returns how many tests end without an exception.

    The program runs in one sandbox, the tests in another; between them are two pipes, and a third one leads
    from the tests to here.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(_folder(sandboxed))
        code = stack.enter_context(handed_over(program))
        listed = stack.enter_context(handed_over(json.dumps(tests)))
        verdicts, judge_says = os.pipe()
        stack.callback(os.close, verdicts)
        with ExitStack() as theirs:  # closed here as soon as they have them: only then do they see the end
            theirs.callback(os.close, judge_says)
            ends = [*os.pipe(), *os.pipe()]
            for end in ends:
                theirs.callback(os.close, end)
            program_hears, judge_asks, judge_hears, program_answers = ends
            served = [code, program_hears, program_answers]
            judged = [listed, judge_hears, judge_asks, judge_says]
            how = {"sandboxed": sandboxed, "folder": folder}
            server = start(_CHILD, ["serve", *map(str, served)], limits, descriptors=served, **how)
            stack.callback(_end, server, limits)
            longer = replace(limits, seconds=limits.seconds + 1)
            judge = start(_CHILD, ["judge", *map(str, judged)], longer, descriptors=judged, **how)
        outcome = finish(judge, longer, verdicts)
    return outcome.output[: len(tests)].count(b"1")


def _end(server: "subprocess.Popen[bytes]", limits: Limits) -> None:
    server.kill()
    finish(server, limits, None)  # says if its sandbox could not be set up


def _folder(sandboxed: bool) -> "nullcontext[str] | tempfile.TemporaryDirectory[str]":
    return nullcontext("/") if sandboxed else tempfile.TemporaryDirectory(prefix="code-reward-")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
