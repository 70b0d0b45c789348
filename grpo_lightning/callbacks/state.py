"""Random states and half-used rollouts as plain types, which `weights_only=True` can load."""

import random
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from grpo_lightning.batch import LossTotals, RolloutBatch
from grpo_lightning.samples import Truncation


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


def batch_state(batch: RolloutBatch) -> dict[str, Any]:
    """Returns a batch as a dict of tensors, tuples and numbers."""
    fields = {name: getattr(batch, name) for name in batch.__slots__}
    kept = None if batch.truncation is None else tuple(batch.truncation)
    return {**fields, "totals": asdict(batch.totals), "truncation": kept}


def restore_batch(state: dict[str, Any]) -> RolloutBatch:
    """Returns the batch that `batch_state` described."""
    kept = None if state["truncation"] is None else Truncation(*state["truncation"])
    return RolloutBatch(**{**state, "totals": LossTotals(**state["totals"]), "truncation": kept})
