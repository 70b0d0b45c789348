"""Keeps what reward functions do to this process away from training.

Process-wide: with `rollout.overlap_rewards` a function runs beside decoding, which sees what it changes until
it returns; `rollout.reward_workers` gives functions a process of their own.
"""

import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple


class _Setting(NamedTuple):
    read: Callable[[Any], Any]
    write: Callable[[Any, Any], Any]


def _cwd(_: Any) -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def put_back_environment(before: Mapping[str, str], but: tuple[str, ...] = ()) -> None:
    """Makes the environment what it was, except for names that begin with one of `but`."""
    now = dict(os.environ)
    for key in now.keys() | before.keys():
        if now.get(key) == before.get(key) or key.startswith(but):
            continue
        if key in before:
            os.environ[key] = before[key]
        else:
            del os.environ[key]


def _signals(_: Any) -> dict[int, Any] | None:
    in_main = threading.current_thread() is threading.main_thread()  # handlers are set there alone
    return {s: signal.getsignal(s) for s in _HANDLED} if in_main else None


def _set_signals(_: Any, before: dict[int, Any] | None) -> None:
    for number, handler in (before or {}).items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def _alarm(_: Any) -> bool:
    return signal.getitimer(signal.ITIMER_REAL)[0] > 0


def _set_alarm(_: Any, before: bool) -> None:
    if not before:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _set_filters(_: Any, before: list[Any]) -> None:
    warnings.resetwarnings()
    warnings.filters[:] = before  # pyright: ignore[reportIndexIssue]


def _set_streams(m: Any, streams: tuple[Any, Any]) -> None:
    m.stdout, m.stderr = streams


def _determinism(m: Any) -> tuple[bool, bool]:
    return m.are_deterministic_algorithms_enabled(), m.is_deterministic_algorithms_warn_only_enabled()


def _set_device(m: Any, before: tuple[Any, int]) -> None:
    m.set_default_device(None)  # any other, the CPU too, leaves a mode that every call of torch goes through
    if m.get_default_device() != before[0]:
        m.set_default_device(before[0])


def _cudnn(name: str) -> _Setting:
    return _Setting(
        lambda m: getattr(m.backends.cudnn, name), lambda m, v: setattr(m.backends.cudnn, name, v)
    )


_HANDLED = [
    s
    for name in ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "ALRM", "CHLD", "PIPE", "PROF", "URG")
    if (s := getattr(signal, f"SIG{name}", None)) is not None
]
# module that has it -> what is put back where it differs; a module that nobody has imported has no state
_SETTINGS: dict[str, tuple[_Setting, ...]] = {
    "os": (
        _Setting(lambda _: os.environ.copy(), lambda _, before: put_back_environment(before)),
        _Setting(_cwd, lambda _, path: path and os.chdir(path)),
    ),
    "signal": (_Setting(_signals, _set_signals), _Setting(_alarm, _set_alarm)),
    "warnings": (_Setting(lambda m: list(m.filters), _set_filters),),
    "logging": (
        _Setting(lambda m: m.root.level, lambda m, v: m.root.setLevel(v)),
        _Setting(lambda m: m.root.manager.disable, lambda m, v: m.disable(v)),
    ),
    "sys": (
        _Setting(lambda m: m.getrecursionlimit(), lambda m, v: m.setrecursionlimit(v)),
        _Setting(lambda m: (m.stdout, m.stderr), _set_streams),
    ),
    "gc": (_Setting(lambda m: m.isenabled(), lambda m, v: m.enable() if v else m.disable()),),
    "torch": (
        _Setting(lambda m: m.get_default_dtype(), lambda m, v: m.set_default_dtype(v)),
        _Setting(lambda m: (m.get_default_device(), m._C._len_torch_function_stack()), _set_device),
        _Setting(lambda m: m.get_num_threads(), lambda m, v: m.set_num_threads(v)),
        _Setting(lambda m: m.is_grad_enabled(), lambda m, v: m.set_grad_enabled(v)),
        _Setting(lambda m: m.is_anomaly_enabled(), lambda m, v: m.autograd.set_detect_anomaly(v)),
        _Setting(lambda m: m.get_float32_matmul_precision(), lambda m, v: m.set_float32_matmul_precision(v)),
        _Setting(_determinism, lambda m, v: m.use_deterministic_algorithms(v[0], warn_only=v[1])),
        _cudnn("benchmark"),
        _cudnn("deterministic"),
        _cudnn("allow_tf32"),
    ),
}


@contextmanager
def state_kept(seed: int) -> Iterator[None]:
    """Puts back afterwards what a reward function may have changed of the process, and seeds it before.

    These are: the random states of python, numpy, torch and CUDA, environment, working folder, signal
    handlers and alarm, warning filters, log levels, standard streams, the garbage collector, and torch's
    defaults (dtype, device, threads, gradients, precision, determinism). Resource limits, the umask and
    patched functions are not.

    Args:
        seed: of the random numbers that the function draws: it has a stream of its own, so that neither it
            nor training depends on how much the other draws.
    """
    there = [(sys.modules.get(name), settings) for name, settings in _SETTINGS.items()]
    settings = [(m, s, s.read(m)) for m, own in there if m is not None for s in own]
    put_back = _fork_random(seed)
    try:
        yield
    finally:
        for module, setting, before in settings:
            if setting.read(module) != before:
                setting.write(module, before)
        for put in put_back:
            put()


def _fork_random(seed: int) -> list[Callable[[], None]]:
    """Seeds every generator of the process; returns what puts their states back."""
    python = random.getstate()
    random.seed(seed)
    put_back = [lambda: random.setstate(python)]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        own = numpy.random.get_state(legacy=False)
        numpy.random.seed(seed)
        put_back.append(lambda: numpy.random.set_state(own))
    torch = sys.modules.get("torch")
    if torch is not None:
        of_gpus = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
        for generator in (torch.default_generator, *of_gpus):
            put_back.append(partial(generator.set_state, generator.get_state()))
            generator.manual_seed(seed)
    return put_back
