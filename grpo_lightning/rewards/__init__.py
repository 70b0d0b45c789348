"""Reward functions, our own and yours. Cheap to import: nothing beyond Python until a call needs it."""

from grpo_lightning.rewards.code import CodeReward
from grpo_lightning.rewards.functions import FormatReward, exact_match, format_reward, length_penalty
from grpo_lightning.rewards.gym import ReasoningGymScore, reasoning_gym_score
from grpo_lightning.rewards.math_reward import math_answer
from grpo_lightning.rewards.suite import Rewards, Scores

__all__ = [
    "CodeReward",
    "FormatReward",
    "ReasoningGymScore",
    "Rewards",
    "Scores",
    "exact_match",
    "format_reward",
    "length_penalty",
    "math_answer",
    "reasoning_gym_score",
]
