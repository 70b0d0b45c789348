"""Which of an op's two forms runs: the torch twin, CPU path and oracle, or the Triton kernel."""

import warnings
from functools import cache
from importlib.util import find_spec

import torch

from grpo_lightning.errors import ConfigError, choices

BACKENDS = ("auto", "torch", "triton")


@cache
def _missing_triton() -> bool:
    missing = find_spec("triton") is None
    if missing:
        warnings.warn(
            "triton is not installed: ops run in plain torch, slower; pip install triton", stacklevel=3
        )
    return missing


def use_triton(device: torch.device, backend: str = "auto") -> bool:
    """Returns whether the kernel runs; `auto` takes it on CUDA where Triton is installed.

    Raises:
        ConfigError: `backend` is none of `BACKENDS`.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {choices(backend, BACKENDS)}")
    return backend == "triton" or (backend == "auto" and device.type == "cuda" and not _missing_triton())
