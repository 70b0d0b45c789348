"""Rollout engines: token ids go in, token ids and their log-probabilities come out."""

from typing import TYPE_CHECKING

from grpo_lightning.utils.lazy import lazy

if TYPE_CHECKING:
    from grpo_lightning.engines.base import EngineContext, Request, RolloutEngine, WeightSource
    from grpo_lightning.engines.hf import HFEngine
    from grpo_lightning.engines.replay import ReplayEngine
    from grpo_lightning.engines.vllm.engine import VLLMEngine

__all__ = [
    "EngineContext",
    "HFEngine",
    "ReplayEngine",
    "Request",
    "RolloutEngine",
    "VLLMEngine",
    "WeightSource",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "EngineContext": "base",
        "HFEngine": "hf",
        "ReplayEngine": "replay",
        "Request": "base",
        "RolloutEngine": "base",
        "VLLMEngine": "vllm.engine",
        "WeightSource": "base",
    },
)
