"""What a checkpoint keeps of a rollout, as plain types, which `weights_only=True` can load."""

from dataclasses import asdict
from typing import Any

from grpo_lightning.engines.process_guard import restore_random_state
from grpo_lightning.errors import ConfigError
from grpo_lightning.packing.batch import Normalizers, RolloutBatch
from grpo_lightning.packing.geometry import SequenceLayout
from grpo_lightning.types import Truncation


def batch_state(batch: RolloutBatch) -> dict[str, Any]:
    """Returns a batch as a dict of tensors, tuples and numbers."""
    fields = {name: getattr(batch, name) for name in batch.__slots__}
    kept = None if batch.truncation is None else tuple(batch.truncation)
    layout = batch.sequence_layout
    positions = [len(own) if isinstance(own, range) else list(own) for own in layout.loss_positions]
    plain = (layout.prompt_lengths, positions, layout.host_groups)
    return {
        **fields,
        "normalizers": asdict(batch.normalizers),
        "truncation": kept,
        "sequence_layout": plain,
    }


def restore_batch(state: dict[str, Any]) -> RolloutBatch:
    """Returns the batch that `batch_state` described."""
    kept = None if state["truncation"] is None else Truncation(*state["truncation"])
    prompts, positions, groups = state["sequence_layout"]
    trained = tuple(range(own) if isinstance(own, int) else tuple(own) for own in positions)
    layout = SequenceLayout(prompts, trained, groups)
    normalizers = Normalizers(**state["normalizers"])
    return RolloutBatch(
        **{**state, "normalizers": normalizers, "truncation": kept, "sequence_layout": layout}
    )


def restore(state: dict[str, Any], rank: int, world_size: int) -> list[RolloutBatch]:
    """Puts this rank's random states back; returns the unused rest of its rollout.

    Raises:
        ConfigError: there is a rest, and it was dealt to another number of ranks.
    """
    saved = state["parts"]
    if any(p is not None for p in saved) and len(saved) != world_size:
        raise ConfigError(
            f"--ckpt_path was saved in the middle of a rollout by {len(saved)} ranks, now there are "
            f"{world_size}; resume with as many, or from the end of a rollout"
        )
    if any(not {"sequence_layout", "normalizers"} <= batch.keys() for own in saved for batch in own or ()):
        raise ConfigError(
            "--ckpt_path was saved in the middle of a rollout by an older grpo-lightning, which packed it "
            "differently; resume from a checkpoint of the end of a rollout"
        )
    restore_random_state(state["random"][rank % len(state["random"])])
    return [restore_batch(p) for p in saved[rank % len(saved)] or []]
