"""SIGTERM while the real vLLM decodes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fits import same_bits
from stops import wait_for

pytestmark = pytest.mark.vllm
SCRIPT = Path(__file__).with_name("stop_run.py")


def launch(cwd, *args, **environment):
    cwd.mkdir(exist_ok=True)
    with (cwd / "log").open("w") as log:
        env = {**os.environ, **environment}
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *args],
            cwd=cwd,
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_amid_decoding_loses_nothing(folder, tmp_path, signum):
    whole = launch(tmp_path / "whole", folder)
    assert whole.wait(600) == 0, (tmp_path / "whole" / "log").read_text()[-3000:]
    run = launch(tmp_path / "run", folder, AT="3")
    wait_for(tmp_path / "run" / "here", 600)
    time.sleep(0.3)
    sent = time.monotonic()
    run.send_signal(signum)
    code = run.wait(60)
    text = (tmp_path / "run" / "log").read_text()
    assert code == (143 if signum == signal.SIGTERM else 130), text[-3000:]
    assert time.monotonic() - sent < 40
    assert "stopped after optimizer step 2" in text
    with pytest.raises(ProcessLookupError):  # no orphan
        os.killpg(run.pid, 0)
    stopped = str(tmp_path / "run" / "ckpt" / "stopped.ckpt")
    again = launch(tmp_path / "again", folder, stopped)
    assert again.wait(600) == 0, (tmp_path / "again" / "log").read_text()[-3000:]
    results = [torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("whole", "again")]
    assert same_bits(*results)
