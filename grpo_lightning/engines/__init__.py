"""Rollout engines: token ids go in, token ids and their log-probabilities come out."""

from typing import TYPE_CHECKING

from grpo_lightning.utils.lazy import lazy

if TYPE_CHECKING:
    from grpo_lightning.engines.base import AdaptedModule, EngineContext, Request, RolloutEngine, WeightSource
    from grpo_lightning.engines.hf import HFEngine
    from grpo_lightning.engines.replay import ReplayEngine
    from grpo_lightning.engines.vllm.engine import VLLMEngine
    from grpo_lightning.engines.weight_sync import PolicyWeights

__all__ = [
    "AdaptedModule",
    "EngineContext",
    "HFEngine",
    "PolicyWeights",
    "ReplayEngine",
    "Request",
    "RolloutEngine",
    "VLLMEngine",
    "WeightSource",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "AdaptedModule": "base",
        "EngineContext": "base",
        "HFEngine": "hf",
        "PolicyWeights": "weight_sync",
        "ReplayEngine": "replay",
        "Request": "base",
        "RolloutEngine": "base",
        "VLLMEngine": "vllm.engine",
        "WeightSource": "base",
    },
)
