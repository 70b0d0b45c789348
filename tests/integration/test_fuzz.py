"""A short form of the fuzz; the long ones are `tests/fuzz.py options --cases 500` and `data --cases 200`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(("what", "cases"), [("options", 40), ("data", 30)])
def test_no_traceback_no_hang_no_partial_file(what, cases):
    command = [sys.executable, str(TESTS / "fuzz.py"), what, "--cases", str(cases), "--seed", "7"]
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert f"{cases} cases of {what}" in done.stdout
    assert "faults: none" in done.stdout
    assert re.search(r"exit codes .*2: \d\d", done.stdout)  # most are refused, so they did run
