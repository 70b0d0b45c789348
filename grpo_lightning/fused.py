"""Prepares a loaded model: peft's LoRA layers keep their names, weights and config, and compute in one op.

A layer becomes an instance of a subclass of its own class, so that everything else peft does with it (saving,
switching off, merging) stays peft's. What the op does not cover runs peft's own forward.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from grpo_lightning.ops.lora_linear import lora_delta, lora_linear


def fuse_lora(model: nn.Module) -> int:
    """Lets the LoRA layers of `model` that the op covers use it; returns how many there are."""
    count = 0
    for module in model.modules():
        if type(module) in _fusible():
            module.__class__ = _fused(type(module))
            count += 1
    return count


@cache
def _fusible() -> tuple[type, ...]:
    from peft.tuners import lora

    return tuple(c for c in (getattr(lora, n, None) for n in ("Linear", "Linear4bit")) if c is not None)


@cache
def _fused(base: type) -> type:
    """Returns `base` with a forward in one op."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = _adapter(self, x) if not args and not kwargs else None
        if adapter is None:
            return base.forward(self, x, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        a, b, scaling, layer = adapter
        if type(layer) is nn.Linear and layer.weight.dtype == x.dtype:
            return lora_linear(x, layer.weight, layer.bias, a, b, scaling)
        return lora_delta(layer(x), x, a, b, scaling)

    return type(f"Fused{base.__name__}", (base,), {"forward": forward})


def _adapter(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, float, nn.Module] | None:
    """Returns A, B, scaling and base layer where the op covers what the layer is to do, else None."""
    names = [n for n in layer.active_adapters if n in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(names) != 1 or torch.is_autocast_enabled(x.device.type):
        return None
    (name,) = names
    dropout = layer.lora_dropout[name]
    plain = isinstance(dropout, nn.Identity) or not (layer.training and dropout.p)
    base = layer.get_base_layer()
    trains = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
    if name in layer.lora_variant or layer.lora_bias[name] or layer.fan_in_fan_out or not plain or trains:
        return None
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], base
