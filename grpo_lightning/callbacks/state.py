"""Half-used rollouts as plain types, which `weights_only=True` can load."""

from dataclasses import asdict
from typing import Any

from grpo_lightning.batch import LossTotals, RolloutBatch
from grpo_lightning.samples import Truncation


def batch_state(batch: RolloutBatch) -> dict[str, Any]:
    """Returns a batch as a dict of tensors, tuples and numbers."""
    fields = {name: getattr(batch, name) for name in batch.__slots__}
    kept = None if batch.truncation is None else tuple(batch.truncation)
    return {**fields, "totals": asdict(batch.totals), "truncation": kept}


def restore_batch(state: dict[str, Any]) -> RolloutBatch:
    """Returns the batch that `batch_state` described."""
    kept = None if state["truncation"] is None else Truncation(*state["truncation"])
    return RolloutBatch(**{**state, "totals": LossTotals(**state["totals"]), "truncation": kept})
