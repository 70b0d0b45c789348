"""`CodeReward` on machines that do not allow namespaces."""

import subprocess
import sys

import pytest

from grpo_lightning.errors import ConfigError
from grpo_lightning.rewards import CodeReward, sandbox


def completion(program):
    return f"```python\n{program}\n```"


@pytest.fixture
def no_namespaces(monkeypatch):
    """A machine on which setting up fails as it does without the privilege."""
    broken = sandbox.start

    def start_that_fails(source, arguments, limits, *, sandboxed=True, **how):
        if sandboxed:
            how["stdout"] = subprocess.PIPE
            return subprocess.Popen(
                [sys.executable, "-c", "import os; os.write(2, b'unshare: Operation not permitted')"],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
        return broken(source, arguments, limits, sandboxed=False, **how)

    sandbox.why_not.cache_clear()
    monkeypatch.setattr(sandbox, "start", start_that_fails)
    yield
    sandbox.why_not.cache_clear()


@pytest.mark.usefixtures("no_namespaces")
def test_without_namespaces_it_is_refused():
    with pytest.raises(
        ConfigError, match=r"does not allow .*unshare: Operation not permitted.*allow_unsandboxed"
    ):
        CodeReward()


@pytest.mark.usefixtures("no_namespaces")
def test_unsandboxed_warns_runs_and_keeps_time_and_memory():
    with pytest.warns(UserWarning, match="WITHOUT a sandbox"):
        reward = CodeReward(allow_unsandboxed=True, seconds=2.0, parallel=1)
    programs = [
        "def f(): return 1",
        "def f():\n    while True: pass",
        "def f(): return len(bytearray(10 << 30))",
    ]
    tests = [["assert f() > 0"]] * 3
    assert reward([completion(p) for p in programs], tests) == [1.0, 0.0, 0.0]
    script = completion("import os\nopen('here', 'w').write('x')\nprint(os.listdir('.'), len(os.environ))")
    assert reward([script], [[{"input": "", "output": "['here'] 4"}]]) == [1.0]
