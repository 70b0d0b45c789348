"""Checkpoints: what they hold, how they are written whole or not at all, and how a run resumes from them."""

from typing import TYPE_CHECKING

from grpo_lightning.utils.lazy import lazy

if TYPE_CHECKING:
    from grpo_lightning.checkpoints.adapter_io import AdapterCheckpointIO

__all__ = ["AdapterCheckpointIO"]

__getattr__, __dir__ = lazy(__name__, {"AdapterCheckpointIO": "adapter_io"})
