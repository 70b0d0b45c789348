"""The phases of a rollout: each is a block of Lightning's profiler, and running out of memory names it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import lightning.pytorch as pl

from grpo_lightning.utils.out_of_memory import explained


@contextmanager
def profiled(trainer: pl.Trainer, name: str) -> Iterator[None]:
    """Runs a phase as the block `rollout/NAME` of the profiler; memory errors name it."""
    block: AbstractContextManager[Any] = trainer.profiler.profile(f"rollout/{name}")  # pyright: ignore
    with explained(trainer, name), block:
        yield
