"""Prepares a loaded model for speed; the one place where anything of it is exchanged.

peft's LoRA layers keep their names, weights and config, and compute in one op: a layer becomes an instance of
a subclass of its own class, so that saving, switching off and merging stay peft's. Decoder layers are
compiled. `Prepared.plain` runs the model as it was.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from grpo_lightning.batch import RolloutBatch
from grpo_lightning.errors import ConfigError, choices
from grpo_lightning.ops.lora_linear import lora_delta, lora_linear

CHOICES = ("auto", "on", "off")
AUTO = {"head": False, "attention": False, "lora": False, "compile": False, "loss": False}
"""what `auto` takes on CUDA: a kernel is listed True once benchmarks/results shows what it gains"""

TRITON = ("head", "loss")
"""what needs CUDA, or Triton's interpreter"""

WORTH_SHARING = 1.2
"""how many times the tokens there must be without sharing; below, a second call of attention costs more"""


@dataclass(frozen=True)
class KernelConfig:
    """Which fast paths run; each is `auto`, `on` or `off`, and off computes the same in plain torch.

    Args:
        head: the Triton kernel of the LM head's log-probabilities.
        attention: flash attention over segments, a prompt once per group (half types on CUDA).
        lora: a LoRA layer as one op, in the base's type with fp32 masters.
        compile: torch.compile of every decoder layer, once for all lengths.
        loss: the Triton kernel of the loss, its gradient and its statistics in one launch.
        shared_prompts: a prompt goes through the model once for its group. `auto` copies it before every
            completion where attention runs as segments and sharing saves less than a sixth of the tokens.
    """

    head: str | bool = "auto"
    attention: str | bool = "auto"
    lora: str | bool = "auto"
    compile: str | bool = "auto"
    loss: str | bool = "auto"
    shared_prompts: str | bool = "auto"

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            if isinstance(value, bool):  # what YAML makes of an unquoted on or off
                value = "on" if value else "off"
                object.__setattr__(self, key, value)
            if value not in CHOICES:
                raise ConfigError(f"model.kernels.{key} is {choices(value, CHOICES)}")

    def chosen(self, device: torch.device) -> dict[str, bool]:
        """Returns which kernels run on `device`."""
        given = asdict(self)
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        for key in TRITON:
            if given[key] == "on" and device.type != "cuda" and not interpreted:
                raise ConfigError(
                    f"model.kernels.{key} is 'on', but the model is on {device.type}; take auto or off"
                )
        return {
            key: on and device.type == "cuda" if given[key] == "auto" else given[key] == "on"
            for key, on in AUTO.items()
        }

    def shares(self, batch: RolloutBatch, segments: bool) -> bool:
        """Returns whether prompts stand once for their group in a forward of `batch`."""
        worth = not segments or batch.sharing >= WORTH_SHARING
        return worth if self.shared_prompts == "auto" else self.shared_prompts == "on"


class Prepared:
    """A model whose layers have been exchanged as `chosen` says.

    Args:
        model: a transformers model, wrapped by peft or not.
        decoder: its decoder, the layers of which are compiled.
        chosen: of `KernelConfig.chosen`; nothing is exchanged by default.
        autocast: whether training runs under autocast, which the fused op does not cover.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: nn.Module,
        chosen: dict[str, bool] | None = None,
        autocast: bool = False,
    ) -> None:
        self.chosen = chosen or dict.fromkeys(AUTO, False)
        layered = [m for m in model.modules() if self.chosen["lora"] and _is_fusible(m)]
        self._lora = [m for m in layered if why_not_fused(m, autocast) is None]
        self._say_what_stays(layered, decoder, autocast)
        layers: Any = getattr(decoder, "layers", [])
        self._compiled: list[nn.Module] = list(layers) if self.chosen["compile"] else []
        self._stock = [type(m) for m in self._lora]
        self._exchange()
        for layer in self._compiled:
            layer.compile(dynamic=True)

    def _say_what_stays(self, layered: list[nn.Module], decoder: nn.Module, autocast: bool) -> None:
        if self.chosen["lora"] and len(self._lora) < max(len(layered), 1):
            reasons = sorted({str(why_not_fused(m, autocast)) for m in layered} - {"None"})
            rank_zero_warn(
                f"model.kernels.lora: {len(layered) - len(self._lora)} of {len(layered)} LoRA layers run "
                f"peft's own forward ({', '.join(reasons) or 'there are none to exchange'})"
            )
        if self.chosen["compile"] and not getattr(decoder, "layers", None):
            rank_zero_warn(
                f"model.kernels.compile: {type(decoder).__name__} has no list of layers to compile"
            )

    def restore(self) -> None:
        """Undoes the exchange for good."""
        for module, stock in zip(self._lora, self._stock, strict=True):
            module.__class__ = stock
        for layer in self._compiled:
            layer._compiled_call_impl = None
        self._lora, self._stock, self._compiled = [], [], []
        self.chosen = dict.fromkeys(AUTO, False)

    def _exchange(self) -> None:
        for module, stock in zip(self._lora, self._stock, strict=True):
            module.__class__ = _fused(stock)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Runs everything as it was loaded."""
        chosen, self.chosen = self.chosen, dict.fromkeys(AUTO, False)
        for module, stock in zip(self._lora, self._stock, strict=True):
            module.__class__ = stock
        try:
            with self.eager():
                yield
        finally:
            self.chosen = chosen
            self._exchange()

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Runs layers uncompiled: decoding token by token would compile them again and again."""
        calls = [layer._compiled_call_impl for layer in self._compiled]
        for layer in self._compiled:
            layer._compiled_call_impl = None
        try:
            yield
        finally:
            for layer, call in zip(self._compiled, calls, strict=True):
                layer._compiled_call_impl = call


def _is_fusible(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.") and type(module) in _peft_layers()


@cache
def _peft_layers() -> tuple[type, ...]:
    from peft.tuners import lora

    return tuple(c for c in (getattr(lora, n, None) for n in ("Linear", "Linear4bit")) if c is not None)


@cache
def _fused(stock: type) -> type:
    """Returns `stock` with a forward in one op."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = _adapter(self, x) if not args and not kwargs else None
        if adapter is None:
            return stock.forward(self, x, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        a, b, scaling, layer = adapter
        if type(layer) is nn.Linear and layer.weight.dtype == x.dtype:
            return lora_linear(x, layer.weight, layer.bias, a, b, scaling)
        return lora_delta(layer(x), x, a, b, scaling)

    return type(f"Fused{stock.__name__}", (stock,), {"forward": forward})


def why_not_fused(layer: Any, autocast: bool) -> str | None:
    """Returns why the op never covers a LoRA layer of this run, or None if it does."""
    names = [n for n in layer.active_adapters if n in layer.lora_A]
    cases = {
        "autocast": autocast,
        "several adapters": len(names) != 1,
        "dropout": any(getattr(layer.lora_dropout[n], "p", 0) for n in names),
        "a variant of LoRA": any(n in layer.lora_variant or layer.lora_bias[n] for n in names),
        "a transposed weight": layer.fan_in_fan_out,
    }
    return next((reason for reason, holds in cases.items() if holds), None)


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
