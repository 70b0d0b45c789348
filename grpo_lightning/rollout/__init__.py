"""From prompts to micro-batches: sampling by an engine, rewards, advantages, packing and cutting."""

from typing import TYPE_CHECKING

from grpo_lightning.utils.lazy import lazy

if TYPE_CHECKING:
    from grpo_lightning.rollout.collector import Collector, Rollout

__all__ = ["Collector", "Rollout"]

__getattr__, __dir__ = lazy(__name__, {"Collector": "collector", "Rollout": "collector"})
