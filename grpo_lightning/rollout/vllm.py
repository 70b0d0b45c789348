"""`VLLMEngine`: the colocated vLLM engine's options and its check that vLLM is there."""

import importlib.util
from collections.abc import Sequence

from grpo_lightning.errors import ConfigError, EngineError
from grpo_lightning.policy import Policy
from grpo_lightning.rollout.engine import EngineContext, Request
from grpo_lightning.samples import Completion, SamplingParams


class VLLMEngine:
    """vLLM in the trainer's process. Not built yet: it can be configured, and starting it says so.

    Args:
        gpu_memory_utilization: share of the GPU's memory for weights and KV cache of the engine.
        max_model_len: longest prompt plus completion; null takes the data's and the sampling's limits.
        sleep: give the KV cache back while training.

    Raises:
        ConfigError: vLLM is not installed.
    """

    def __init__(
        self, gpu_memory_utilization: float = 0.35, max_model_len: int | None = None, sleep: bool = True
    ) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "rollout.engine is VLLMEngine, but vllm is not installed: "
                'pip install "grpo-lightning[vllm]", or use grpo_lightning.rollout.HFEngine'
            )
        self.gpu_memory_utilization, self.max_model_len, self.sleeps = (
            gpu_memory_utilization,
            max_model_len,
            sleep,
        )
        self.policy_version = -1

    def start(self, context: EngineContext) -> None:
        """Raises EngineError: there is no vLLM engine in this version."""
        raise EngineError(
            "this version of grpo-lightning cannot run vLLM yet; use grpo_lightning.rollout.HFEngine"
        )

    def sync(self, policy: Policy, version: int) -> None:
        """Never reached: `start` raises."""
        raise EngineError("VLLMEngine was not started")

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[list[Completion]]:
        """Never reached: `start` raises."""
        raise EngineError("VLLMEngine was not started")

    def sleep(self) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""
