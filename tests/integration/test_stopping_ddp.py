"""Two ranks: whoever gets the signal or fails, all leave, soon, and one checkpoint is whole."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from models import save_tiny
from stops import adapter, config, wait_for

MINUTE = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def launch(folder, *args, **environment):
    """Starts the command as a person does; Lightning starts the second rank with the same arguments."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    line = [sys.executable, "-m", "grpo_lightning", "fit", "--config", "config.yaml", *args]
    with (folder / ".out").open("w") as out:
        return subprocess.Popen(
            line, cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )


def ended(run, folder):
    """Returns the exit code, once no process of the run is left, and what they said."""
    code = run.wait(4 * MINUTE)
    deadline = time.monotonic() + MINUTE
    while group_lives(run.pid):
        assert time.monotonic() < deadline, "a rank was left behind"
        time.sleep(0.1)
    return code, (folder / ".out").read_text()


def group_lives(pid):
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def two(model, folder, **changes):
    more = {"trainer__devices": 2, "trainer__strategy": "ddp", **changes}
    return config(model, folder, **more)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    two(model, folder)
    code, text = ended(launch(folder), folder)
    assert code == 0, text
    return adapter(folder)


@pytest.mark.parametrize(("to", "waits"), [("0", "0"), ("1", "1"), ("1", "0"), ("both", "1")])
def test_a_signal_to_any_rank_stops_all_with_one_checkpoint(model, whole, tmp_path, to, waits):
    """`waits` is the rank that hangs in the third rollout; the other one waits for it in a collective."""
    two(model, tmp_path, rollout__reward_funcs=[f"{tmp_path / 'mine.py'}:sleeps"])
    run = launch(tmp_path, AT="3", RANK_AT=waits)
    hanging = int(wait_for(tmp_path / "here", 4 * MINUTE))
    time.sleep(1)
    pids = {waits: hanging, "0": run.pid}
    if "1" not in pids:
        children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True)
        pids["1"] = int(children.stdout.split()[0])
    sent = time.monotonic()
    for rank in "01" if to == "both" else to:
        os.kill(pids[rank], signal.SIGTERM)
    code, text = ended(run, tmp_path)
    assert time.monotonic() - sent < MINUTE
    assert code == 143, text
    assert text.count("saved ") == 1
    assert [p.name for p in (tmp_path / "ckpt").glob("*.ckpt")] == ["stopped.ckpt"]
    assert torch.load(tmp_path / "ckpt" / "stopped.ckpt", weights_only=True)["global_step"] == 2
    if to == "1":
        code, text = ended(launch(tmp_path, "--ckpt_path", "last"), tmp_path)
        assert code == 0, text
        assert adapter(tmp_path) == whole


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("where", ["reward", "callback"])
def test_one_rank_that_fails_takes_all_with_it(model, tmp_path, rank, where):
    """In a rollout they agree; elsewhere the others wait in a collective for one that is gone."""
    changes = {"rollout__reward_funcs": [f"{tmp_path / 'mine.py'}:fails"]}
    if where == "callback":
        changes = {"trainer__callbacks": [{"class_path": "mine.Fails"}]}
    two(model, tmp_path, **changes)
    run = launch(tmp_path, AT="2", RANK_AT=rank)
    wait_for(tmp_path / "here", 4 * MINUTE)
    failed = time.monotonic()
    code, text = ended(run, tmp_path)
    assert time.monotonic() - failed < MINUTE
    assert code != 0
    assert ("no such answer" if where == "reward" else "a callback failed") in text
    assert not (tmp_path / "ckpt").exists()
