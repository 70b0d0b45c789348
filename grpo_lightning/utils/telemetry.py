"""Telemetry never ends a run: what fails while logs are written is said once, by name, and training goes on.

Options that cannot work are another matter: a logger class that cannot be built is an error before the run.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger


class BestEffort:
    """Work that may fail without ending the run: the first failure is said, all are counted.

    Args:
        what: names the work in the warning.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.failures = 0

    @contextmanager
    def attempt(self, doing: str, consequence: str) -> Iterator[None]:
        """Lets the block fail; only its own error ends there, not an interrupt.

        Args:
            doing: completes "<what> failed to".
            consequence: what is lost.
        """
        try:
            yield
        except Exception as error:  # whatever a logger of somebody else's raises
            self.failures += 1
            if self.failures == 1:
                said = " ".join(f"{type(error).__name__}: {error}".split())
                warnings.warn(
                    f"{self.what} failed to {doing} ({said}): training goes on, {consequence}; further "
                    "failures are not reported",
                    stacklevel=2,
                )


def guard_loggers(trainer: pl.Trainer) -> None:
    """Makes every logger of the Trainer a guarded one; it stays an instance of its class.

    Called before Lightning first asks a logger for its experiment, which is when W&B and others connect. A
    logger whose experiment fails is off for the rest of the run; one that fails to write is tried again:
    disks and networks recover.
    """
    for logger in trainer.loggers:
        if "_effort" not in vars(logger):
            made = _guarded(type(logger))
            vars(logger).update(_effort=BestEffort(type(logger).__name__), _is_off=False)
            logger.__class__ = made


def _guarded(cls: type) -> type:
    writes = [
        n for n in dir(cls) if n.startswith("log_") or n in ("save", "finalize", "after_save_checkpoint")
    ]
    members: dict[str, Any] = {n: _write(cls, n) for n in writes if callable(getattr(cls, n))}
    if isinstance(experiment := getattr(cls, "experiment", None), property) and experiment.fget:
        members["experiment"] = property(_experiment(experiment.fget))
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, **members})


def _write(cls: type, name: str) -> Callable[..., Any]:
    write = getattr(cls, name)

    @wraps(write)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._is_off:
            return None
        with self._effort.attempt(name, "what it had to write is missing from its logs"):
            return write(self, *args, **kwargs)

    return call


def _experiment(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def get(self: Any) -> Any:
        if not self._is_off:
            with self._effort.attempt("start", "without this logger"):
                return make(self)
            self._is_off = True
        return DummyLogger().experiment

    return get
