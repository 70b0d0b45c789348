"""Random states, and what keeps an engine in the trainer's process from changing the process."""

import gc
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from grpo_lightning.rewards.state_guard import put_back_environment

ENGINES_OWN = ("VLLM_",)
"""environment variables by which an engine talks to itself; everything else is put back"""


@contextmanager
def process_kept() -> Iterator[None]:
    """Restores afterwards what training depends on, whatever happens inside.

    These are: the random states of python, numpy, torch and CUDA, the precision of matrix products, thread
    counts, the environment, what the garbage collector watches, and the limit of compile workers.
    """
    states = random_state()
    precision, threads, set_threads = (
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        torch.set_num_threads,
    )
    environment, frozen, workers = dict(os.environ), gc.get_freeze_count(), _compile_workers()
    try:
        yield
    finally:
        put_back_environment(environment, ENGINES_OWN)
        torch.set_num_threads = set_threads  # an engine on the CPU replaces the function
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)
        if gc.get_freeze_count() > frozen:
            gc.unfreeze()  # or nothing that exists by now would ever be collected
        if workers is not None:
            setattr(sys.modules["torch._inductor.config"], "compile_threads", workers)  # noqa: B010
        restore_random_state(states)


@contextmanager
def random_kept() -> Iterator[None]:
    """Restores afterwards the random states alone; cheap enough for every step of decoding."""
    state = random_state()
    try:
        yield
    finally:
        restore_random_state(state)


def random_state() -> dict[str, Any]:
    """Returns the states of python, numpy, torch and every CUDA device of this process."""
    state: dict[str, Any] = np.random.get_state(legacy=False)  # pyright: ignore[reportAssignmentType]
    inner = {**state["state"], "key": torch.from_numpy(state["state"]["key"].astype(np.int64))}
    return {
        "python": random.getstate(),
        "numpy": {**state, "state": inner},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    inner = {**state["numpy"]["state"], "key": state["numpy"]["state"]["key"].numpy().astype(np.uint32)}
    np.random.set_state({**state["numpy"], "state": inner})
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def _compile_workers() -> int | None:
    config: Any = sys.modules.get("torch._inductor.config")
    return None if config is None else config.compile_threads
