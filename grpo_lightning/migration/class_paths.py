"""Public names that have moved, with their new place."""

_ENGINES = ("EngineContext", "HFEngine", "ReplayEngine", "Request", "RolloutEngine", "VLLMEngine")
MOVED = {
    **{f"grpo_lightning.rollout.{name}": f"grpo_lightning.engines.{name}" for name in _ENGINES},
    "grpo_lightning.callbacks.AdapterCheckpointIO": "grpo_lightning.checkpoints.AdapterCheckpointIO",
}


def moved(text: str) -> str | None:
    """Returns a sentence with the new place of the first old path in `text`, or None."""
    return next((f"{old} is now {new}" for old, new in MOVED.items() if old in text), None)
