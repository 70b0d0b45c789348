"""Reward functions of your own, as `grpo-lightning` and TRL both call them.

    grpo-lightning fit --config configs/quickstart.yaml \\
        --rollout.reward_funcs "[examples/custom_reward.py:closeness, examples/custom_reward.py:brevity]" \\
        --rollout.reward_weights null --rollout.validation.pass_reward closeness
"""

import re


def closeness(completions, answer, **kwargs):
    """1 for the right number, less the further away; None where no number was written."""
    rewards = []
    for completion, gold in zip(completions, answer, strict=True):
        numbers = re.findall(r"-?\d+", completion[-1]["content"])
        rewards.append(1 / (1 + abs(int(numbers[-1]) - int(gold))) if numbers else None)
    return rewards


async def brevity(completion_ids, log_metric, **kwargs):
    """Up to 0.2 for short answers; async functions run side by side, e.g. calls to a judge."""
    log_metric("longest", max(len(ids) for ids in completion_ids))
    return [0.2 / len(ids) if ids else 0.0 for ids in completion_ids]
