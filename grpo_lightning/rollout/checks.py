"""Numbers of a rollout that are not finite, each as an error that says whose they are; None if all are."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from grpo_lightning.advantages import RewardTable
from grpo_lightning.engines.base import Request, RolloutEngine, describe
from grpo_lightning.errors import EngineError, GRPOError, RewardError
from grpo_lightning.packing.loss_tokens import loss_positions
from grpo_lightning.rewards.validation import clipped
from grpo_lightning.types import Completion


def bad_logprobs(
    engine: RolloutEngine, requests: Sequence[Request], completions: Sequence[Sequence[Completion]]
) -> EngineError | None:
    """Names the first token that the engine drew from logits that are not finite, or a list too short."""
    for request, group in zip(requests, completions, strict=True):
        for i, c in enumerate(group):
            if c.logprobs is None:
                continue
            whose = f"completion {i} of prompt {request.uid} (rollout {request.rollout_index})"
            if len(c.logprobs) != len(c.token_ids):
                return EngineError(
                    f"{describe(engine)} reports {len(c.logprobs)} log-probabilities of the "
                    f"{len(c.token_ids)} tokens of {whose}; report one for each, or None for all"
                )
            at = next((t for t in loss_positions(c) if not math.isfinite(c.logprobs[t])), None)
            if at is not None:
                return EngineError(
                    f"{describe(engine)} reports {c.logprobs[at]} as the log-probability of token {at} of "
                    f"{whose}: its logits are not finite, so its tokens mean nothing; go on from an older "
                    "checkpoint (--ckpt_path), or change trainer.precision"
                )
    return None


def bad_advantages(
    advantages: Tensor, name: str, table: RewardTable, samples: Mapping[str, Sequence[Any]]
) -> RewardError | None:
    """Shows the first sample whose advantage is not finite.

    Args:
        advantages: [S].
        name: of the way they were made.
        table: the rewards that they were made of.
        samples: columns of S rows, for people to read.
    """
    if not len(bad := (~advantages.isfinite()).nonzero()):
        return None
    s = int(bad[0])
    group = table.total[table.group_ids == table.group_ids[s]].tolist()
    sample = {key: column[s] for key, column in samples.items() if key != "advantage"}
    return RewardError(
        f"rollout.advantage {name!r} makes {advantages[s]:g} of reward {table.total[s]:g}, in a group with "
        f"the rewards {clipped(repr(group))}: let reward functions return values of like size, or take "
        f"another advantage. The sample: {clipped(repr(sample))}"
    )


def bad_penalty(penalty: Tensor) -> GRPOError | None:
    """Names the completion with a KL penalty that is not finite, which would make it look unscored."""
    if not len(bad := (~penalty.isfinite()).nonzero()):
        return None
    s = int(bad[0])
    return GRPOError(
        f"the KL penalty of completion {s} is {penalty[s]:g} (model.loss.kl_in: reward), so log-"
        "probabilities of policy or reference are not finite; go on from an older checkpoint (--ckpt_path), "
        "or lower model.loss.kl_coef"
    )
