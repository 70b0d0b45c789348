"""Out of memory: one line with the options that take memory, and their present values."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from operator import attrgetter
from typing import Any

import torch
from lightning.pytorch.utilities.memory import is_cuda_out_of_memory, is_out_of_cpu_memory

from grpo_lightning.errors import EngineError, OutOfMemory

ENGINE = (
    r"out of memory|No available memory|cache blocks|[Ff]ree memory on device|"
    r"larger than .* KV cache|KV cache is needed"
)
"""what vLLM says when its share of the memory is too small; the rest of the sentence differs by version"""

MORE, LESS = "raise", "lower"
PHASES = {
    "start": "starting the engine",
    "sync": "copying weights to the engine",
    "generate": "sampling",
    "score": "scoring the rollout",
    "train": "training",
}
IN_TRAINING = ("score", "train")
KNOBS: dict[str, Mapping[str, str]] = {
    "trainer.accumulate_grad_batches": dict.fromkeys(IN_TRAINING, MORE),
    "rollout.micro_batches": dict.fromkeys(IN_TRAINING, "set to all"),
    "model.gradient_checkpointing": dict.fromkeys(IN_TRAINING, "set to true or offload"),
    "model.logprob_chunk_rows": dict.fromkeys(IN_TRAINING, LESS),
    "rollout.engine.batch_size": {"generate": LESS},
    "rollout.engine.max_num_seqs": {"start": LESS, "generate": LESS},
    "rollout.engine.gpu_memory_utilization": {
        "start": MORE,
        **dict.fromkeys(("sync", "generate", *IN_TRAINING), LESS),
    },
    "rollout.engine.kv_cache_memory_bytes": {
        "start": MORE,
        **dict.fromkeys(("sync", "generate", *IN_TRAINING), LESS),
    },
    "rollout.engine.max_model_len": {"start": LESS},
    "rollout.engine.sleep_mode": dict.fromkeys(IN_TRAINING, "set to weights"),
    "rollout.sampling.max_tokens": dict.fromkeys(PHASES, LESS),
    "data.prompts_per_rollout": dict.fromkeys(("generate", *IN_TRAINING), LESS),
}
"""by option: what to do with it, by phase; `auto` of vLLM's sleep is settled when it starts"""
KEYS = {"rollout.engine.sleep_mode": "rollout.engine.sleep"}
"""options whose attribute has another name"""


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether a device or the host had no memory left, or an engine no room for its cache."""
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or is_cuda_out_of_memory(error)
        or is_out_of_cpu_memory(error)
        or (isinstance(error, EngineError) and re.search(ENGINE, str(error)) is not None)
    )


@contextmanager
def explained(trainer: Any, phase: str) -> Iterator[None]:
    """Turns running out of memory into `OutOfMemory`; other errors pass.

    Args:
        trainer: whose options are named.
        phase: a key of `PHASES`; in others nothing is done.
    """
    try:
        yield
    except Exception as error:
        if phase not in PHASES or isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise OutOfMemory(
            f"out of memory while {PHASES[phase]} ({said[:300]}). {_weights(trainer)}. What takes memory: "
            + "; ".join(_knobs(trainer, phase))
        ) from error


def explains(phase: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns a decorator that runs a method of a module in `explained`."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            with explained(self.trainer, phase):
                return method(self, *args, **kwargs)

        return run

    return decorate


def _weights(trainer: Any) -> str:
    if getattr(trainer.lightning_module, "half_updated", False):
        return "Some weights had changed already: go on from the last checkpoint (--ckpt_path last)"
    return f"Weights are those after {trainer.global_step} optimizer steps"


def _knobs(trainer: Any, phase: str) -> Iterator[str]:
    rollout = next((c for c in trainer.callbacks if hasattr(c, "micro_batches_per_rollout")), None)
    sections = {
        "trainer": trainer,
        "model": trainer.lightning_module,
        "data": getattr(trainer, "datamodule", None),
        "rollout": rollout,
    }
    for key, verbs in KNOBS.items():
        section, _, path = key.partition(".")
        try:
            value = attrgetter(path)(sections[section])
        except AttributeError:  # another engine, or no such section
            continue
        if phase in verbs:
            yield f"{KEYS.get(key, key)} is {_plain(value)} ({verbs[phase]})"


def _plain(value: Any) -> str:
    """Returns a value as YAML writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
