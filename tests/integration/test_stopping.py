"""Signals and exits: how soon a run leaves, with which code, and what it leaves behind."""

import os
import shlex
import signal
import time

import pytest
import torch
from models import save_tiny
from stops import adapter, begun, config, fit

SOON = 20.0
"""seconds; it takes less than one, but other processes share this machine"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """What an uninterrupted run learns; rewards and engines of this module all give the same numbers."""
    folder = tmp_path_factory.mktemp("whole")
    config(model, folder)
    done = fit(folder)
    assert done.code == 0, done.err
    return adapter(folder)


def reward(folder, name):
    return [f"{folder / 'mine.py'}:{name}"]


WHERE = {
    "an engine that looks at nothing": lambda f: {"rollout__engine": {"class_path": "mine.Slow"}},
    "between two tokens": lambda f: {"rollout__engine": {"class_path": "mine.Long"}},
    "a reward that sleeps": lambda f: {"rollout__reward_funcs": reward(f, "sleeps")},
    "a reward that is busy": lambda f: {"rollout__reward_funcs": reward(f, "busy")},
    "an async reward": lambda f: {"rollout__reward_funcs": reward(f, "waits")},
    "overlapped, asleep": lambda f: {
        "rollout__reward_funcs": reward(f, "sleeps"),
        "rollout__overlap_rewards": True,
    },
    "overlapped, busy": lambda f: {
        "rollout__reward_funcs": reward(f, "busy"),
        "rollout__overlap_rewards": True,
    },
}
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
CASES = [(SIGNALS[i % 3], where, 3) for i, where in enumerate(WHERE)] + [
    (signal.SIGINT, "a reward that sleeps", 1),
    (signal.SIGTERM, "an engine that looks at nothing", 4),
]


@pytest.mark.parametrize(("signum", "where", "at"), CASES)
def test_a_signal_is_obeyed_at_once_and_nothing_is_lost(model, whole, tmp_path, signum, where, at):
    """Call 3 is in the third rollout; with overlapped rewards it is the third group's of the first."""
    config(model, tmp_path, **WHERE[where](tmp_path))
    at = 10 if "overlapped" in where else at
    run = begun(tmp_path, AT=str(at))
    sent = time.monotonic()
    os.kill(run.pid, signum)
    done = run.wait()
    assert time.monotonic() - sent < SOON
    assert done.code == (130 if signum == signal.SIGINT else 143), done.err
    assert "Traceback" not in done.err
    assert [p.name for p in (tmp_path / "ckpt").glob("*.ckpt")] == ["stopped.ckpt"]
    step = torch.load(tmp_path / "ckpt" / "stopped.ckpt", weights_only=True)["global_step"]
    assert step == (2 if "overlapped" in where else at - 1)
    assert f"stopped after optimizer step {step}" in done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("resume with: ")]
    arguments = shlex.split(line)[shlex.split(line).index("fit") + 3 :]
    assert arguments == ["--ckpt_path", str(tmp_path / "ckpt" / "stopped.ckpt")]
    again = fit(tmp_path, *arguments)
    assert again.code == 0, again.err
    assert adapter(tmp_path) == whole


@pytest.mark.parametrize("step", [2, 3])
def test_a_stop_before_the_first_step_of_a_resumed_run_counts_nothing_twice(model, tmp_path, step):
    """Step 3 ends an epoch, which Lightning counts as complete before a resumed run starts to train."""
    saver = {"dirpath": str(tmp_path / "ckpt"), "every_n_train_steps": 1, "save_last": True}
    changes: dict = {"rollout__engine": {"class_path": "mine.Slow"}}
    callbacks = config(model, tmp_path, **changes)["trainer"]["callbacks"]
    callbacks[0]["init_args"] = saver
    config(model, tmp_path, **changes, trainer__callbacks=callbacks)
    assert fit(tmp_path, "--trainer.max_steps", str(step)).code == 0
    saved = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)
    run = begun(tmp_path, "--ckpt_path", "last", AT="1")
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait().code == 143
    stopped = torch.load(tmp_path / "ckpt" / "stopped.ckpt", weights_only=True)
    assert stopped["loops"] == saved["loops"]
    assert fit(tmp_path, "--ckpt_path", str(tmp_path / "ckpt" / "stopped.ckpt")).code == 0
    end = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)
    assert (end["global_step"], end["epoch"]) == (4, 1)


def test_the_second_ctrl_c_leaves_at_once(model, tmp_path):
    """Even a reward that catches everything."""
    config(model, tmp_path, rollout__reward_funcs=reward(tmp_path, "stubborn"))
    run = begun(tmp_path, AT="2")
    os.kill(run.pid, signal.SIGINT)
    time.sleep(1)
    os.kill(run.pid, 0)
    sent = time.monotonic()
    os.kill(run.pid, signal.SIGINT)
    assert run.wait().code == 130
    assert time.monotonic() - sent < 5


def test_a_stop_between_two_updates_of_a_rollout_and_amid_validation(model, tmp_path):
    """A signal during training is obeyed after the optimizer step, before anything else is sampled."""
    changes = {
        "rollout__updates_per_rollout": 2,
        "data__validation_split": 4,
        "trainer__val_check_interval": 1,
    }
    changes |= {"trainer__check_val_every_n_epoch": None}
    results = []
    for name, at in (("whole", 0), ("stopped", 4)):
        folder = tmp_path / name
        config(model, folder, **changes, rollout__engine={"class_path": "mine.Slow"})
        if at:
            run = begun(folder, AT=str(at))
            os.kill(run.pid, signal.SIGTERM)
            assert run.wait().code == 143
        done = fit(folder, *(["--ckpt_path", "last"] if at else []))
        assert done.code == 0, done.err
        results.append(adapter(folder))
    assert results[0] == results[1]


@pytest.mark.parametrize("name", ["exits", "interrupts", "cancels", "cancels_itself"])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_reward_that_ends_the_process_is_an_error_with_its_sample(model, tmp_path, name, overlap):
    changes = {"rollout__reward_funcs": reward(tmp_path, name), "rollout__overlap_rewards": overlap}
    config(model, tmp_path, **changes)
    done = fit(tmp_path, AT="3")
    assert done.code == 1, done.err
    assert f"reward function '{name}' raised" in done.err
    assert "completion:" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("name", ["Leaves", "Interrupts", "Constructed"])
def test_a_callback_that_ends_the_process_is_an_error_with_its_place(model, tmp_path, name):
    config(model, tmp_path, trainer__callbacks=[{"class_path": f"mine.{name}"}])
    done = fit(tmp_path, AT="2")
    assert done.code == 1, done.err
    assert "mine.py:" in done.err
    raised = "KeyboardInterrupt" if name == "Interrupts" else "SystemExit(0)"
    assert f"raised {raised}" in done.err


def test_a_dataset_function_that_ends_the_process(model, tmp_path):
    config(model, tmp_path, data__dataset="python:mine.rows")
    done = fit(tmp_path, AT="1")
    assert done.code == 2, done.err
    assert "error: data.dataset='python:mine.rows' raised SystemExit(0) at" in done.err
    assert not (tmp_path / "run").exists()


def test_an_engine_that_dies_leaves_a_checkpoint_of_the_boundary(model, whole, tmp_path):
    config(model, tmp_path, rollout__engine={"class_path": "mine.Dies"})
    done = fit(tmp_path, AT="3")
    assert done.code == 1, done.err
    assert "error: the engine is dead" in done.err
    assert f"saved {tmp_path / 'ckpt' / 'stopped.ckpt'}" in done.err
    assert (tmp_path / "closed").exists()
    assert fit(tmp_path, "--ckpt_path", "last").code == 0
    assert adapter(tmp_path) == whole


def test_kill_9_amid_a_rollout_resumes_from_the_last_checkpoint(model, whole, tmp_path):
    saver = {"dirpath": str(tmp_path / "ckpt"), "every_n_train_steps": 1, "save_last": True}
    callbacks = config(model, tmp_path, rollout__engine={"class_path": "mine.Slow"})["trainer"]["callbacks"]
    callbacks[0]["init_args"] = saver
    config(model, tmp_path, rollout__engine={"class_path": "mine.Slow"}, trainer__callbacks=callbacks)
    run = begun(tmp_path, AT="3")
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait().code == -9
    assert fit(tmp_path, "--ckpt_path", "last").code == 0
    assert adapter(tmp_path) == whole


def test_slurm_puts_the_job_into_the_queue_again_and_the_same_command_goes_on(model, whole, tmp_path):
    config(model, tmp_path, rollout__engine={"class_path": "mine.Slow"})
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    slurm = {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0"}
    slurm |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run = begun(tmp_path, AT="3", **slurm)
    os.kill(run.pid, signal.SIGUSR1)
    done = run.wait()
    assert done.code == 143, done.err
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert fit(tmp_path, **slurm).code == 0
    assert adapter(tmp_path) == whole


def test_a_reward_that_seeds_everything_changes_nothing(model, whole, tmp_path):
    """Nor does it after a stop: the run's seed is read once."""
    config(model, tmp_path, rollout__reward_funcs=reward(tmp_path, "seeds"))
    done = fit(tmp_path)
    assert done.code == 0, done.err
    assert adapter(tmp_path) == whole
