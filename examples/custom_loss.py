"""A loss variant of your own: a function of [N] vectors that asks by name for what it needs.

grpo-lightning fit --config configs/quickstart.yaml --model.loss.name examples/custom_loss.py:tanh_clip
"""

from dataclasses import dataclass

import torch


@dataclass
class TanhOptions:
    """Keys of `model.loss.params`, e.g. --model.loss.params '{width: 0.3}'."""

    width: float = 0.2


def tanh_clip(ratio, advantages, options: TanhOptions):
    """Returns -A (1 + tanh((ratio - 1) / c) c): PPO's trust region with soft walls."""
    c = options.width
    return -advantages * (1 + c * torch.tanh((ratio - 1) / c))
