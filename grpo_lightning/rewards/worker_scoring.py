"""What a process of `RewardWorkers` does: it scores as `Rewards` does, and says which functions it starts."""

from dataclasses import asdict
from typing import Any

from grpo_lightning.errors import ConfigError, RewardError
from grpo_lightning.rewards.reward_workers import ERRORS
from grpo_lightning.rewards.suite import Rewards
from grpo_lightning.rewards.worker import Handler, Tell


def scorer(setup: dict[str, Any]) -> Handler:
    """Returns the handler of a worker: it scores as `Rewards` does, and says which functions it starts."""
    made: list[Rewards] = []

    def handle(call: dict[str, Any], tell: Tell) -> None:
        try:
            if not made:  # here, so that a function that cannot be imported is an answer
                made.append(Rewards(setup["specs"], setup["weights"], timeout_s=None))
            scores = made[0].score(**call, starting=lambda names: tell({"starting": list(names)}))
        except (ConfigError, RewardError) as error:
            kind = next(name for name, kind in ERRORS.items() if isinstance(error, kind))
            tell({"error": kind, "text": str(error)})
        else:
            tell({"scores": asdict(scores)})

    return handle
