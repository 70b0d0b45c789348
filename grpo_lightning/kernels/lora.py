"""peft's LoRA layers in one op each, or several that read the same x in one together.

The layers stay peft's: they keep names, weights and config, and whatever the op does not cover (adapters that
are switched off, merged, with dropout, several at a time) goes to peft's own forward.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from grpo_lightning.ops.lora_linear import Adapted, adjoining, lay_together, lora_linears


@cache
def _peft_layers() -> tuple[type, ...]:
    from peft.tuners import lora

    return tuple(c for c in (getattr(lora, n, None) for n in ("Linear", "Linear4bit")) if c is not None)


def is_lora(module: Any) -> bool:
    """Returns whether a module is one of peft's LoRA layers that the op knows."""
    return type(module).__module__.startswith("peft.") and type(module) in _peft_layers()


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


class _Adapter(NamedTuple):
    a: Tensor
    b: Tensor
    scaling: float
    base: Any  # nn.Module

    def applied(self, x: Tensor) -> Adapted:
        """Returns the layer as the op takes it; a base in 4 bit computes its product itself."""
        if type(self.base) is nn.Linear and self.base.weight.dtype == x.dtype:
            return Adapted(self.a, self.b, self.scaling, self.base.weight, self.base.bias)
        return Adapted(self.a, self.b, self.scaling, y=self.base(x))

    def same(self, other: "_Adapter") -> bool:
        """Returns whether both are the same objects."""
        return self.scaling == other.scaling and all(
            mine is theirs for mine, theirs in ((self.a, other.a), (self.b, other.b), (self.base, other.base))
        )


def _adapter(layer: Any, x: Tensor) -> _Adapter | None:
    """Returns the adapter where the op covers what the layer is to do, else None."""
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
    return _Adapter(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], base)


@cache
def fused(stock: type[Any]) -> type:
    """Returns `stock` with a forward in one op."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = _adapter(self, x) if not args and not kwargs else None
        if adapter is None:
            return stock.forward(self, x, *args, **kwargs)
        return lora_linears(x, [adapter.applied(x)])[0]

    return type(f"Fused{stock.__name__}", (stock,), {"forward": forward})


@cache
def sharing(stock: type[Any]) -> type:
    """Returns `stock` with a forward that asks its `SharedInputGroup` first."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.siblings.take(self, x) if not args and not kwargs else None
        return stock.forward(self, x, *args, **kwargs) if y is None else y

    return type(f"Sharing{stock.__name__}", (stock,), {"forward": forward})


class SharedInputGroup:
    """Layers that are called one after another with the same x: the first call computes them all.

    Where the bases are plain, their weights move into one memory, so that their products are one.

    A result is handed out once, and only for what it was computed of: the same tensor object at the same
    version, the same adapter, the same grad mode. Where a layer was not asked for its result, the layers are
    no siblings, and each computes its own from then on.
    """

    def __init__(self, members: list[Any]) -> None:
        self.members = members
        self.apart = False
        _lay_bases_together([m.get_base_layer() for m in members])
        self._forget()

    def _forget(self) -> None:
        self._x: Tensor | None = None
        self._results: list[Tensor | None] = []
        self._adapters: list[_Adapter | None] = []
        self._states: list[tuple[Any, ...]] = []

    def take(self, member: Any, x: Tensor) -> Tensor | None:
        """Returns what `member` gives for `x`, or None if it is to compute that itself."""
        adapter = None if self.apart or _untracked(x) else _adapter(member, x)
        if adapter is None:
            return None
        place = next(i for i, m in enumerate(self.members) if m is member)
        if self._x is None:
            return self._compute(place, x)
        known, result = self._adapters[place], self._results[place]
        valid = self._x is x and known is not None and adapter.same(known)
        if result is None or not valid or self._states[place] != _state(x, adapter):
            self._forget()
            self.apart = True
            _say_apart()  # pyright: ignore[reportCallIssue]  # the decorator is untyped
            return None
        self._results[place] = None
        if all(r is None for r in self._results):
            self._forget()
        return result

    def _compute(self, place: int, x: Tensor) -> Tensor | None:
        """Returns the result of the member at `place`, and keeps those of the others."""
        adapters = [_adapter(m, x) for m in self.members]
        present = [a for a in adapters if a is not None]
        if len(present) < 2:
            return None
        found = iter(lora_linears(x, [a.applied(x) for a in present]))
        results: list[Tensor | None] = [None if a is None else next(found) for a in adapters]
        result, results[place] = results[place], None
        self._x, self._results, self._adapters = x, results, adapters
        self._states = [() if a is None else _state(x, a) for a in adapters]
        return result


def _lay_bases_together(bases: list[Any]) -> None:
    """Moves weights, and biases, into one memory each, if these are plain, frozen and nobody else's."""
    kinds = [
        [b for m in bases if type(m) is nn.Linear and (b := getattr(m, name)) is not None]
        for name in ("weight", "bias")
    ]
    weights, biases = kinds
    if len(weights) < len(bases) or len(biases) not in (0, len(bases)):
        return
    for group in filter(None, kinds):
        alike = len({(t.dtype, t.device, t.shape[1:], type(t.data)) for t in group}) == 1
        if not alike or any(t.requires_grad for t in group):
            return
    for group in filter(None, kinds):
        if adjoining(group) is None:
            lay_together(group)


def _untracked(x: Tensor) -> bool:
    """Returns whether a write to `x` leaves no trace."""
    return not torch.compiler.is_compiling() and x.is_inference()


def _state(x: Tensor, adapter: _Adapter) -> tuple[Any, ...]:
    """Returns what changes when a tensor is written to, or the graph is to be another."""
    if torch.compiler.is_compiling():  # one graph holds all calls, and a write to x is a tensor of its own
        return ()
    watched = (x, adapter.a, adapter.b, adapter.base.weight)
    return (torch.is_grad_enabled(), *((t._version, t.requires_grad) for t in watched))


@torch.compiler.disable
def _say_apart() -> None:
    rank_zero_warn(
        "model.kernels: projections that should read the same tensor do not (another tensor, or it or an "
        "adapter changed in between); they compute one by one"
    )
