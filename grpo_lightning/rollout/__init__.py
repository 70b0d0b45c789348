"""Rollout engines and the collector that turns prompts into packed, scored completions."""

from typing import TYPE_CHECKING

from grpo_lightning.utils.lazy import lazy

if TYPE_CHECKING:
    from grpo_lightning.rollout.collect import Collector, Rollout
    from grpo_lightning.rollout.engine import EngineContext, Request, RolloutEngine
    from grpo_lightning.rollout.hf import HFEngine
    from grpo_lightning.rollout.recording import ReplayEngine
    from grpo_lightning.rollout.vllm import VLLMEngine

__all__ = [
    "Collector",
    "EngineContext",
    "HFEngine",
    "ReplayEngine",
    "Request",
    "Rollout",
    "RolloutEngine",
    "VLLMEngine",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "Collector": "collect",
        "Rollout": "collect",
        "EngineContext": "engine",
        "Request": "engine",
        "RolloutEngine": "engine",
        "HFEngine": "hf",
        "ReplayEngine": "recording",
        "VLLMEngine": "vllm",
    },
)
