"""Reward functions that hang, and what they do to the process."""

import asyncio
import contextlib
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import numpy as np
import pytest
import torch

from grpo_lightning.errors import ConfigError, RewardError
from grpo_lightning.rewards import Rewards


def score(functions, completions=("one", "two"), seconds=0.5, **options):
    n = len(completions)
    return Rewards(functions, timeout_s=seconds, **options).score(
        prompts=["the prompt"] * n, completions=list(completions), completion_ids=[[1]] * n, columns={}
    )


def in_thread(function):
    """Calls it as `rollout.overlap_rewards` does: in a thread that is not the main one."""
    caught = []

    def run():
        try:
            function()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    if caught:
        raise caught[0]


def sleeps(completions, **_):
    time.sleep(1000)


def spins(completions, **_):
    """Nothing stops it in another thread; the tests that follow shall have the processor again."""
    end = time.monotonic() + 12
    while time.monotonic() < end:
        pass


def waits_for_a_lock(completions, **_):
    threading.Event().wait()


def swallows_everything(completions, **_):
    began = time.monotonic()
    while time.monotonic() - began < 1.7:
        with contextlib.suppress(BaseException):
            time.sleep(0.01)
    spins(completions)


def translates(completions, **_):
    try:
        time.sleep(1000)
    except BaseException as error:
        raise ValueError("something of mine") from error


async def async_sleeps(completions, **_):
    await asyncio.sleep(1000)


async def async_spins(completions, **_):
    spins(completions)


async def does_not_let_itself_be_cancelled(completions, **_):
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(1000)


async def quick(completions, **_):
    await asyncio.sleep(0)
    return [0.0] * len(completions)


SYNC = [sleeps, spins, waits_for_a_lock, swallows_everything, translates]
ASYNC = [async_sleeps, async_spins, does_not_let_itself_be_cancelled]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("grpo_lightning.rewards.calls._SLACK_S", 0.5)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("where", ["main", "thread"])
@pytest.mark.parametrize("function", [*SYNC, *ASYNC], ids=lambda f: f.__name__)
def test_a_function_that_hangs_is_named_with_its_limit_and_the_sample(function, where):
    began = time.monotonic()
    run = in_thread if where == "thread" else lambda call: call()
    with pytest.raises(RewardError) as caught:
        run(lambda: score([function]))
    assert time.monotonic() - began < 10
    for part in (repr(function.__name__), "0.5 s", "rollout.reward_timeout_s", "the prompt", "'one'"):
        assert part in str(caught.value)


def test_a_function_left_behind_leaves_traced_threads_alone():
    """With an exception pending in a thread that sleeps, Python 3.11 does not leave a traced function."""
    code = textwrap.dedent("""
        import sys, threading, time
        from grpo_lightning.rewards import Rewards
        from grpo_lightning.errors import RewardError

        def sleeps(completions):
            time.sleep(1000)

        def call():
            try:
                Rewards([sleeps], timeout_s=0.5).score(
                    prompts=["p"], completions=["c"], completion_ids=[[1]], columns={}
                )
            except RewardError:
                print("named")

        trace = lambda *_: trace
        threading.settrace(trace)
        sys.settrace(trace)
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        print("went on", thread.is_alive())
    """)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "named\nwent on False\n"


@pytest.mark.usefixtures("impatient")
def test_the_async_function_that_hangs_is_named_and_not_its_neighbours():
    with pytest.raises(RewardError, match=r"function 'async_sleeps' did not"):
        score([quick, async_sleeps])


def test_signals_are_as_before_and_a_function_may_use_its_own():
    """math-verify's own time limit works in the main thread alone."""
    before = {s: signal.getsignal(s) for s in (signal.SIGALRM, signal.SIGURG)}

    def uses_alarm(completions, **_):
        def late(*_):
            raise TimeoutError

        signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            time.sleep(1000)
        except TimeoutError:
            return [1.0] * len(completions)

    assert score([uses_alarm], seconds=20).totals == [1.0, 1.0]
    with pytest.raises(RewardError):
        score([sleeps])
    assert {s: signal.getsignal(s) for s in before} == before


@pytest.mark.parametrize("where", ["main", "thread"])
def test_a_function_within_its_time_is_left_alone(where):
    def slow(completions, **_):
        time.sleep(0.3)
        return [threading.active_count() * 0.0 + 1.0] * len(completions)

    call = lambda: [score([slow, quick], seconds=30) for _ in range(3)]  # noqa: E731
    threads = threading.active_count()
    call() if where == "main" else in_thread(call)
    time.sleep(0.1)
    assert threading.active_count() <= threads


def test_async_functions_of_a_running_loop_have_a_limit_too():
    async def notebook_cell():
        score([async_sleeps])

    with pytest.raises(RewardError, match="'async_sleeps' did not return"):
        asyncio.run(notebook_cell())


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_limits_that_cannot_be(seconds):
    with pytest.raises(ConfigError, match=r"rollout\.reward_timeout_s is .* null for no limit"):
        Rewards(quick, timeout_s=seconds)


def test_no_limit():
    assert score([quick, lambda completions: [1.0, 1.0]], seconds=None).totals == [1.0, 1.0]


PROGRAM = """
import threading, time
from grpo_lightning.rewards import Rewards, time_limit
time_limit.GRACE_S = 1.0

def sleeps(completions):
    time.sleep(1000)

def holds_the_lock(completions):
    10 ** 10 ** 10

def call():
    given = dict(prompts=["p"], completions=["c"], completion_ids=[[1]], columns={{}})
    Rewards([{name}], timeout_s=0.5).score(**given)

{how}
"""


@pytest.mark.parametrize(
    ("name", "how", "status", "shown"),
    [
        ("sleeps", "call()", 1, "RewardError: reward function 'sleeps' did not return"),
        (
            "sleeps",
            "t = threading.Thread(target=call); t.start(); t.join(); print('went on')",
            0,
            "RewardError: reward function 'sleeps' did not return",
        ),
        ("holds_the_lock", "call()", 1, "in holds_the_lock"),
    ],
    ids=["main", "thread that is left behind", "a C function that holds the interpreter lock"],
)
def test_the_process_ends_whatever_hangs(name, how, status, shown):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM.format(name=name, how=how))],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == status
    assert shown in done.stderr


# --- what a function does to the process ---


def vandal():
    random.seed(1)
    random.random()
    np.random.seed(1)
    torch.manual_seed(1)
    os.environ.clear()
    os.environ["MINE"] = "1"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_grad_enabled(False)
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(True)
    torch.set_default_device("meta")
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    warnings.simplefilter("error")
    logging.disable()
    logging.getLogger().setLevel(1)
    sys.setrecursionlimit(5000)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.alarm(5)


def state():
    return {
        "python": random.getstate(),
        "numpy": [str(x) for x in np.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "cwd": os.getcwd(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "modes": torch._C._len_torch_function_stack(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "filters": list(warnings.filters),
        "disabled": logging.root.manager.disable,
        "level": logging.root.level,
        "recursion": sys.getrecursionlimit(),
        "stdout": id(sys.stdout),
        "sigterm": signal.getsignal(signal.SIGTERM),
        "alarm": signal.getitimer(signal.ITIMER_REAL),
    }


def vandal_function(completions, **_):
    vandal()
    return [0.0] * len(completions)


async def vandal_coroutine(completions, **_):
    await asyncio.sleep(0)
    return vandal_function(completions)


def vandal_that_fails(completions, **_):
    vandal()
    raise ValueError("no")


def test_a_default_device_that_was_the_default_leaves_no_mode():
    before = torch._C._len_torch_function_stack()
    score([lambda completions, **_: torch.set_default_device("cpu") or [0.0] * len(completions)])
    assert torch._C._len_torch_function_stack() == before


@pytest.mark.parametrize("where", ["main", "thread"])
@pytest.mark.parametrize("function", [vandal_function, vandal_coroutine, vandal_that_fails])
def test_nothing_that_a_function_does_to_the_process_stays(function, where):
    before = state()

    def call():
        try:
            score([function], seconds=20)
        except RewardError:
            assert function is vandal_that_fails

    call() if where == "main" else in_thread(call)
    after = state()
    assert {k for k in before if before[k] != after[k]} == set()


def test_what_a_function_does_not_touch_is_not_written():
    """So that warnings shown once are not shown again, and threads are not counted anew."""
    shown = []
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda *args, **_: shown.append(args[0])
        for _ in range(3):
            score([quick])
            warnings.warn("once", stacklevel=1)
    assert len(shown) == 1


def test_a_function_draws_from_a_stream_of_its_own():
    drawn = []

    def draws(completions, **_):
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
        return [0.0] * len(completions)

    for completions, moves in ((("a", "b"), 0), (("a", "c"), 0), (("a", "b"), 5)):
        for _ in range(moves):  # training draws in between
            random.random(), np.random.rand(), torch.rand(1)
        score([draws], completions)
    assert drawn[0] == drawn[2]
    assert all(a != b for a, b in zip(drawn[0], drawn[1], strict=True))


def test_a_trainer_state_is_a_copy():
    history = [{"reward": 1.0}]

    def clears(completions, trainer_state, **_):
        trainer_state.clear()
        return [0.0] * len(completions)

    given = {"prompts": ["p"], "completions": ["c"], "completion_ids": [[1]], "columns": {}}
    Rewards(clears).score(**given, trainer_state=history)
    assert history == [{"reward": 1.0}]


def test_the_guard_without_torch():
    code = (
        "import os, random, sys\n"
        "from grpo_lightning.rewards.state_guard import state_kept\n"
        "before = random.getstate(), dict(os.environ)\n"
        "with state_kept(3):\n"
        "    random.seed(9); os.environ.clear()\n"
        "assert before == (random.getstate(), dict(os.environ))\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
