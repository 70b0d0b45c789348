"""Lightning callbacks: rollouts, and what a person sees of a run."""

from typing import TYPE_CHECKING

from grpo_lightning.utils.lazy import lazy

if TYPE_CHECKING:
    from grpo_lightning.callbacks.evaluation import ValidationConfig
    from grpo_lightning.callbacks.health import Health
    from grpo_lightning.callbacks.report import RunReport
    from grpo_lightning.callbacks.rollout import RolloutCallback
    from grpo_lightning.callbacks.sample_table import SampleTable
    from grpo_lightning.callbacks.validation_metrics import PassAtK

__all__ = ["Health", "PassAtK", "RolloutCallback", "RunReport", "SampleTable", "ValidationConfig"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "Health": "health",
        "PassAtK": "validation_metrics",
        "RolloutCallback": "rollout",
        "RunReport": "report",
        "SampleTable": "sample_table",
        "ValidationConfig": "evaluation",
    },
)
