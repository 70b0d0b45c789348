"""Losses as tables: surrogate x ratio level x aggregation, named by recipes. Torch only."""

from grpo_lightning.losses import surrogates as surrogates  # fills SURROGATES
from grpo_lightning.losses.adaptive import AdaptiveEntropy, AdaptiveKL, Coefficients
from grpo_lightning.losses.aggregations import AGGREGATIONS
from grpo_lightning.losses.config import LossConfig
from grpo_lightning.losses.corrections import CorrectionConfig
from grpo_lightning.losses.kl import KL_ESTIMATORS
from grpo_lightning.losses.policy_loss import LossOutput, policy_loss
from grpo_lightning.losses.ratios import RATIO_LEVELS
from grpo_lightning.losses.recipes import RECIPES, Recipe
from grpo_lightning.losses.surrogate_table import SURROGATES, register_surrogate

__all__ = [
    "AGGREGATIONS",
    "KL_ESTIMATORS",
    "RATIO_LEVELS",
    "RECIPES",
    "SURROGATES",
    "AdaptiveEntropy",
    "AdaptiveKL",
    "Coefficients",
    "CorrectionConfig",
    "LossConfig",
    "LossOutput",
    "Recipe",
    "policy_loss",
    "register_surrogate",
]
