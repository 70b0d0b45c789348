"""A loss variant of your own: a function of [N] vectors that asks by name for what it needs.

grpo-lightning fit --config configs/quickstart.yaml --model.loss.name examples/custom_loss.py:tanh_clip
"""

import torch


def tanh_clip(ratio, advantages, config):
    """Returns -A (1 + tanh((ratio - 1) / c) c): PPO's trust region with soft walls."""
    width = config.params.get("width", 0.2)
    return -advantages * (1 + width * torch.tanh((ratio - 1) / width))
