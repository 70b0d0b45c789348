"""Where a signal raises, where it waits, and what becomes of code that would end the process."""

import asyncio
import os
import shlex
import signal
import sys
import time

import pytest

from grpo_lightning.errors import DataError, GRPOError
from grpo_lightning.rollout.background import Background
from grpo_lightning.utils import signals as stopping
from grpo_lightning.utils.signals import Stopped, at_once, check, defer, deferred, exits_named


@pytest.fixture
def training():
    """Signals are ours, and there is something to lose."""
    stopping.listen()
    defer()
    yield
    stopping.ignore()


def send(signum=signal.SIGTERM):
    os.kill(os.getpid(), signum)
    time.sleep(0.01)


def test_a_signal_outside_of_all_blocks_waits(training):
    send()
    check()
    assert stopping.received() == signal.SIGTERM
    with pytest.raises(Stopped), at_once():
        raise AssertionError("it was left on entry")


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)]
)
def test_user_code_is_left_at_once(training, signum, code):
    with pytest.raises(Stopped) as stop, at_once():
        send(signum)
    assert stop.value.code == code


def test_an_engine_goes_on_to_its_next_check(training):
    done = []

    def decode():
        send()
        done.append("chunk")
        check()
        done.append("another")

    with pytest.raises(Stopped), at_once(), deferred():
        decode()
    assert done == ["chunk"]


def test_an_engine_that_decodes_amid_a_step_is_not_left(training):
    with deferred():
        send()
        check()
        assert stopping.received() == signal.SIGTERM  # it is known, and left to the end of the step


def test_handlers_come_back():
    before = [signal.getsignal(s) for s in stopping.EXIT_CODES]
    stopping.listen()
    stopping.listen()
    stopping.ignore()
    assert signal.getsignal(signal.SIGTERM) != before[0]
    stopping.ignore()
    assert [signal.getsignal(s) for s in stopping.EXIT_CODES] == before


def test_the_handler_that_was_there_is_called_too():
    called = []
    signal.signal(signal.SIGUSR1, lambda *_: called.append(1))
    try:
        stopping.listen()
        defer()
        send(signal.SIGUSR1)
        stopping.ignore()
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert called == [1]


@pytest.mark.parametrize("raised", [SystemExit(0), KeyboardInterrupt(), asyncio.CancelledError()])
def test_what_ends_a_process_becomes_an_error_with_its_place(training, raised):
    expected = rf"rows raised {type(raised).__name__}.*test_signals\.py:\d+"
    with pytest.raises(DataError, match=expected), exits_named("rows", DataError):
        raise raised


@pytest.mark.parametrize("raised", [ValueError("no"), Stopped(signal.SIGTERM)])
def test_what_does_not_end_it_passes(training, raised):
    with pytest.raises(type(raised)), exits_named("rows", GRPOError):
        raise raised


def test_a_real_ctrl_c_without_our_handlers_passes():
    with pytest.raises(KeyboardInterrupt), exits_named("rows", GRPOError):
        raise KeyboardInterrupt


def test_the_command_that_resumes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/grpo-lightning"])
    monkeypatch.setattr(stopping._signals, "command", None)
    assert stopping.resume_hint("a/b.ckpt") == "trainer.fit(..., ckpt_path='a/b.ckpt')"
    stopping.set_command(
        ["fit", "--config", "my run.yaml", "--ckpt_path", "last", "--ckpt_path=auto", "--x", "1"]
    )
    asked = shlex.split(stopping.resume_hint("a b.ckpt"))
    assert asked == [
        "grpo-lightning",
        "fit",
        "--config",
        "my run.yaml",
        "--x",
        "1",
        "--ckpt_path",
        "a b.ckpt",
    ]


def test_background_calls_come_in_order_and_keep_what_they_raise():
    pool = Background("calls")
    seen = []
    futures = [pool.submit(lambda i=i: seen.append(i)) for i in range(5)]
    bad = pool.submit(lambda: sys.exit(3))
    after = pool.submit(lambda: "still here")
    with pytest.raises(SystemExit):
        bad.result(5)
    assert after.result(5) == "still here"
    assert [f.result(5) for f in futures] == [None] * 5
    assert seen == list(range(5))
    pool.close()
