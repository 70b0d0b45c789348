"""GRPO for language models as PyTorch Lightning components. Importing it imports nothing heavy."""

from typing import TYPE_CHECKING

from grpo_lightning.utils.lazy import lazy

if TYPE_CHECKING:
    from grpo_lightning.callbacks.rollout import RolloutCallback
    from grpo_lightning.data.datamodule import PromptDataModule
    from grpo_lightning.modules.grpo import GRPOModule
    from grpo_lightning.packing.batch import RolloutBatch
    from grpo_lightning.types import SamplingParams

__version__ = "0.1.0.dev0"
__all__ = ["GRPOModule", "PromptDataModule", "RolloutBatch", "RolloutCallback", "SamplingParams"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "GRPOModule": "modules.grpo",
        "PromptDataModule": "data.datamodule",
        "RolloutBatch": "packing.batch",
        "RolloutCallback": "callbacks.rollout",
        "SamplingParams": "types",
    },
)
