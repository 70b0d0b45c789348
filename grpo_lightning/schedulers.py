"""Learning-rate schedules that torch does not have as one class."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from grpo_lightning.errors import ConfigError
from grpo_lightning.utils.ranges import check_numbers


class WarmupCosine(LambdaLR):
    """Rises linearly for `warmup_steps` optimizer steps, then falls along a half cosine.

    Args:
        optimizer: whose rates are set.
        total_steps: optimizer steps of the run; the rate ends there.
        warmup_steps: optimizer steps of the rise.
        final_ratio: last rate as a share of the highest.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, final_ratio: float = 0.0
    ) -> None:
        given = {"total_steps": total_steps, "warmup_steps": warmup_steps, "final_ratio": final_ratio}
        check_numbers("WarmupCosine", given, [("final_ratio", final_ratio >= 0, ">= 0")])
        if not 0 <= warmup_steps < total_steps:
            raise ConfigError(
                f"WarmupCosine.warmup_steps is {warmup_steps}; it must be in [0, total_steps={total_steps})"
            )

        def ratio(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / (warmup_steps + 1)
            done = min((step - warmup_steps) / (total_steps - warmup_steps), 1.0)
            return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * done))

        # In the state, so that a resume sees what has changed.
        self.total_steps, self.warmup_steps, self.final_ratio = total_steps, warmup_steps, final_ratio
        super().__init__(optimizer, ratio)
