"""Reward functions in processes that are killed where they hang."""

import os
import signal
import subprocess
import sys
import time

import pytest
import reward_cases
from reward_cases import lengths

from grpo_lightning.errors import ConfigError, RewardError
from grpo_lightning.rewards import Rewards, process
from grpo_lightning.utils.credentials import without_credentials


@pytest.fixture
def made(monkeypatch):
    """Makes suites with workers, and ends them."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    suites = []

    def make(functions, workers=1, **options):
        suites.append(Rewards(functions, workers=workers, **options))
        return suites[-1]

    yield make
    for suite in suites:
        suite.close()


def score(suite, completions, group_size=None):
    n = len(completions)
    return suite.score(
        prompts=["the prompt"] * n,
        completions=list(completions),
        completion_ids=[[1]] * n,
        columns={"answer": ["42"] * n},
        trainer_state={"global_step": 3},
        group_size=group_size,
    )


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return open(f"/proc/{pid}/stat").read().split()[2] == "Z"


def wait_until(condition, seconds=10):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


def test_scores_are_those_of_this_process_however_many_workers(made):
    functions = ["reward_cases.lengths", reward_cases.async_lengths, "reward_cases:some"]
    texts = ["a", "bb", "none", "dddd", "e", "ffffff"]
    here = score(Rewards(functions, [1.0, 2.0, 0.5]), texts)
    for workers in (1, 2, 3):
        there = score(made(functions, workers, weights=[1.0, 2.0, 0.5]), texts, group_size=2)
        assert there.totals == here.totals
        assert (there.names, there.weights) == (here.names, here.weights)
        assert str(there.values) == str(here.values)  # NaN is not equal to itself
        pids = there.extra["pid"]
        assert os.getpid() not in pids
        assert [len(set(pids[i : i + 2])) for i in (0, 2, 4)] == [1, 1, 1]  # groups stay together
        assert len(set(pids)) == workers
        assert there.metrics == {"calls": 1.0, "completions": 6 / workers}
    assert score(made(functions, 2), texts).metrics["completions"] == 6


def test_no_limit(made):
    assert score(made("reward_cases.lengths", timeout_s=None), ["a"]).totals == [1.0]


def test_fewer_groups_than_workers(made):
    assert score(made("reward_cases.lengths", 4), ["a", "bb"], group_size=1).totals == [1.0, 2.0]


@pytest.mark.parametrize("name", ["sleeps", "spins_without_letting_go"])
def test_a_worker_that_hangs_is_killed_named_and_replaced(made, name):
    suite = made([f"reward_cases.{name}", lengths], 2, timeout_s=1.0)
    assert score(suite, ["a", "bb"], group_size=1).totals == [1.0, 2.0]
    first = suite._workers.pids
    began = time.monotonic()
    with pytest.raises(RewardError) as caught:
        score(suite, ["a", "sleep" if name == "sleeps" else "spin"], group_size=1)
    assert time.monotonic() - began < 8
    for part in (f"'{name}' did not return within", "1 s", "rollout.reward_timeout_s", "the prompt"):
        assert part in str(caught.value)
    assert wait_until(lambda: any(gone(pid) for pid in first))
    assert score(suite, ["a", "bb"], group_size=1).totals == [1.0, 2.0]
    assert suite._workers.pids != first


def test_what_a_function_has_started_is_killed_with_it(made, tmp_path):
    suite = made("reward_cases.leaves_a_child", timeout_s=1.0)
    with pytest.raises(RewardError, match="did not return"):
        score(suite, [str(tmp_path / "pid")])
    assert wait_until(lambda: gone(int((tmp_path / "pid").read_text())))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("raises", ["'raises' raised KeyError: 'gold'", "the prompt"]),
        ("allocates", ["'allocates' raised MemoryError"]),
        ("dies", ["a reward worker ended: exit status 7", "'dies'", "the prompt"]),
    ],
)
def test_failures_come_back_with_name_and_sample(made, name, parts):
    suite = made(f"reward_cases.{name}")
    with pytest.raises(RewardError) as caught:
        score(suite, ["a"])
    for part in parts:
        assert part in str(caught.value)


def test_a_worker_has_the_environment_without_its_secrets(made, monkeypatch):
    monkeypatch.setenv("DATABASE", "postgres://me:word@host/db")
    names = ["PATH", "OMP_NUM_THREADS", "OPENAI_API_KEY", "DATABASE"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert score(made("reward_cases.environment"), names).totals == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "stays"),
    [
        ("HF_TOKEN", False),
        ("WANDB_API_KEY", False),
        ("AWS_SECRET_ACCESS_KEY", False),
        ("GITHUB_TOKEN", False),
        ("DB_PASSWORD", False),
        ("SSH_AUTH_SOCK", False),
        ("GOOGLE_APPLICATION_CREDENTIALS", False),
        ("TOKENIZERS_PARALLELISM", True),
        ("CUDA_VISIBLE_DEVICES", True),
        ("HF_HOME", True),
        ("KEYBOARD", True),
    ],
)
def test_what_looks_like_a_secret(name, stays):
    assert (name in without_credentials({name: "x"})) is stays


def test_words_of_a_function_do_not_disturb(made, capfd):
    assert score(made("reward_cases.prints"), ["a"]).totals == [0.0]
    assert "a word of the reward function" in capfd.readouterr().out


def test_workers_end_with_the_run(made):
    suite = made("reward_cases.lengths", 2)
    score(suite, ["a", "bb"], group_size=1)
    pids = suite._workers.pids
    suite.close()
    assert all(gone(pid) for pid in pids)


def test_workers_end_with_a_process_that_is_killed():
    code = (
        "import os, signal, sys\n"
        "from grpo_lightning.rewards import Rewards\n"
        "suite = Rewards('reward_cases.sleeps', workers=1)\n"
        "given = dict(prompts=['p'], completion_ids=[[1]], columns={})\n"
        "suite.score(completions=['a'], **given)\n"
        "print(suite._workers.pids[0], flush=True)\n"
        "suite.score(completions=['sleep'], **given)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    worker = int(child.stdout.readline())
    time.sleep(0.5)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert wait_until(lambda: gone(worker))


def test_functions_that_no_other_process_can_import_are_refused():
    def local(completions):
        return [0.0] * len(completions)

    with pytest.raises(ConfigError, match=r"rollout\.reward_workers: .*local.* move it to the top level"):
        Rewards(local, workers=1)
    with pytest.raises(ConfigError, match="reward_workers is -1"):
        Rewards(lengths, workers=-1)


def test_a_module_that_only_this_process_finds_is_named(made, tmp_path, monkeypatch):
    file = tmp_path / "late_rewards.py"
    file.write_text("def f(completions): return [0.0] * len(completions)")
    suite = made(f"{file}:f")
    file.unlink()
    with pytest.raises(ConfigError, match="late_rewards"):
        score(suite, ["a"])


def test_memory_is_bounded_far_above_what_a_reward_takes():
    assert process.MEMORY == 16 << 30
