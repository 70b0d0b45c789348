"""`CodeReward`: runs the programs that a model has written against tests, in a sandbox."""

import json
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from grpo_lightning.errors import ConfigError, RewardError
from grpo_lightning.rewards.code_tests import asserts_passed, prints
from grpo_lightning.rewards.functions import text_of
from grpo_lightning.rewards.sandbox import Limits, SandboxError, why_not

_BLOCK = re.compile(r"^```(?:python|py|python3)[^\S\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


class CodeReward:
    """Returns the share of a row's tests that the program in the completion passes; None without tests.

    The program is the last block ```` ```python ```` of the completion; without one the score is 0. A test is

    - a text: statements of Python, such as `assert add(1, 2) == 3`, which pass if they end without an
      exception. They run in a sandbox of their own and call the program in its sandbox: it gets arguments and
      returns values, so nothing that it does to its interpreter makes a test pass. Values are compared as
      None, bool, numbers, texts, bytes and their lists, tuples, sets and dicts; other objects are equal to
      themselves only. Builtins cannot be replaced, and a test cannot give the program a function;
    - `{"input": text, "output": text}`: the program runs as a script; it has to end with status 0 and to
      print the output, blanks at the ends of lines and of the text aside.

    Programs have no network, see none of this machine's files but Python's own, and write to a small /tmp.
    Their tests share one process: what comes after a crash, or after `seconds`, has failed. Needs Linux 5.12
    on x86_64 or aarch64 and namespaces: as root, or where users may make user namespaces.

    Args:
        all_or_nothing: 1.0 where every test passes, else 0.0.
        seconds: of time for one program.
        memory_mb: of one program and its processes, in MiB.
        parallel: programs that run at the same time; null is the number of processors.
        allow_unsandboxed: where namespaces are not to be had, run programs without them, with limits on time
            and memory alone. They can then read and delete whatever this user can.

    Raises:
        ConfigError: namespaces are not to be had, or an option is out of range.
    """

    __name__ = "code_reward"

    def __init__(
        self,
        all_or_nothing: bool = False,
        seconds: float = 6.0,
        memory_mb: int = 512,
        parallel: int | None = None,
        allow_unsandboxed: bool = False,
    ) -> None:
        for name, value, least in (
            ("seconds", seconds, 0.1),
            ("memory_mb", memory_mb, 64),
            ("parallel", 1 if parallel is None else parallel, 1),
        ):
            if not least <= value <= 1e6:
                raise ConfigError(f"code_reward {name} is {value}; it must be at least {least}, at most 1e6")
        self.all_or_nothing = all_or_nothing
        self.limits = Limits(seconds=float(seconds), memory=memory_mb << 20)
        self.parallel = parallel or os.cpu_count() or 1
        reason = why_not()
        if reason is not None and (not allow_unsandboxed or sys.platform != "linux"):
            raise ConfigError(
                "CodeReward runs programs that a model has written, and this machine does not allow the "
                f"namespaces that keep them apart ({reason}). Run as root with CAP_SYS_ADMIN, allow user "
                "namespaces (sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns), "
                "or set allow_unsandboxed: true where nothing on this machine is worth protecting"
            )
        self.sandboxed = reason is None
        if reason is not None:
            warnings.warn(
                "CodeReward runs what the model writes WITHOUT a sandbox (allow_unsandboxed: true): it can "
                f"read and delete whatever this user can, and use the network. No namespaces: {reason}",
                stacklevel=2,
            )

    def __call__(self, completions: Sequence[Any], tests: Sequence[Any], **_: Any) -> list[float | None]:
        """Returns [S] scores.

        Raises:
            ConfigError: a row's tests are no tests.
            RewardError: a sandbox could not be set up.
        """
        programs = [program_of(text_of(completion)) for completion in completions]
        cases = [_checked(own) for own in tests]
        jobs = dict.fromkeys(zip(programs, cases, strict=True))  # equal programs run once
        pool = ThreadPoolExecutor(max_workers=self.parallel, thread_name_prefix="code-reward")
        try:
            scores = dict(zip(jobs, pool.map(lambda job: self._score(*job), jobs), strict=True))
        except SandboxError as error:
            raise RewardError(f"a sandbox of CodeReward could not be set up: {error}") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return [scores[job] for job in zip(programs, cases, strict=True)]

    def _score(self, program: str | None, cases: tuple[str, ...]) -> float | None:
        if not cases:
            return None
        if program is None:
            return 0.0
        tests = [json.loads(case) for case in cases]
        asserts = [test for test in tests if isinstance(test, str)]
        passed = asserts_passed(program, asserts, self.limits, self.sandboxed) if asserts else 0
        failed = len(asserts) - passed
        for test in tests:
            if isinstance(test, str) or (failed and self.all_or_nothing):
                continue
            right = prints(program, test["input"], test["output"], self.limits, self.sandboxed)
            passed, failed = passed + right, failed + (not right)
        return float(failed == 0) if self.all_or_nothing else passed / len(tests)


def program_of(text: str) -> str | None:
    """Returns the last block of Python in a text, None if there is none."""
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else None


def _checked(tests: Any) -> tuple[str, ...]:
    """Returns the tests of a row as JSON, so that equal ones are found.

    Raises:
        ConfigError: they are of another form.
    """
    listed = [] if tests is None else [tests] if isinstance(tests, str | Mapping) else list(tests)
    for test in listed:
        pair = isinstance(test, Mapping) and set(test) == {"input", "output"}
        if not isinstance(test, str) and not (pair and all(isinstance(v, str) for v in test.values())):
            raise ConfigError(
                f"CodeReward: a row of the column 'tests' has {test!r:.200}; a test is a text of Python "
                "statements, or {'input': text, 'output': text}"
            )
    return tuple(json.dumps(test if isinstance(test, str) else dict(test)) for test in listed)
