"""Which modules of a model are exchanged for faster ones, and how: one row of `SWAPS` each.

An exchanged module becomes an instance of a subclass of its own class. Names, weights and hooks stay, and the
stock forward is one call away for whatever the fast one does not cover. Modules are recognised by structure,
never by the name of an architecture, and where structure does not say what a forward computes, both are run
on a few numbers first.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from grpo_lightning.lora_layers import Siblings, fused, is_lora, sharing, why_not_fused
from grpo_lightning.ops.rms_norm import rms_norm
from grpo_lightning.ops.swiglu import swiglu


class Swap(NamedTuple):
    """One kind of modules that a flag of `KernelConfig` exchanges."""

    flag: str
    find: Callable[[Any], list[Any]]
    """given any module: the modules that are exchanged together on its account"""
    stays: Callable[[Any, bool], str | None]
    """why one of them stays as it is, given whether training runs under autocast"""
    become: Callable[[type], type]
    tie: Callable[[list[Any]], Any] | None = None
    """makes the `siblings` that modules exchanged together have in common; then they are two at least"""


def _itself(test: Callable[[Any], bool]) -> Callable[[Any], list[Any]]:
    return lambda module: [module] if test(module) else []


def _adapted(*names: str) -> Callable[[Any], list[Any]]:
    def find(module: Any) -> list[Any]:
        found = [c for n, c in module.named_children() if n in names and is_lora(c)]
        return found if len(found) > 1 else []

    return find


def _is_swiglu(module: Any) -> bool:
    names = {name for name, _ in module.named_children()}
    return {"gate_proj", "up_proj", "down_proj"} <= names and hasattr(module, "act_fn")


def _is_rms_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    alone = isinstance(weight, Tensor) and weight.ndim == 1 and len(list(module.parameters())) == 1
    return type(module).__name__.endswith("RMSNorm") and alone and isinstance(_epsilon(module), float)


def _epsilon(norm: Any) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


@cache
def swiglu_mlp(stock: type[Any]) -> type:
    """Returns an MLP with silu(gate) up as one kernel; compiled layers have one already."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or torch.compiler.is_compiling():
            return stock.forward(self, x, *args, **kwargs)
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

    return type(f"Swiglu{stock.__name__}", (stock,), {"forward": forward})


@cache
def one_kernel_norm(stock: type[Any]) -> type:
    """Returns a norm as one kernel; compiled layers have one already."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or x.dtype != self.weight.dtype or torch.compiler.is_compiling():
            return stock.forward(self, x, *args, **kwargs)
        return rms_norm(x, self.weight, _epsilon(self) or 0.0)

    return type(f"Kernel{stock.__name__}", (stock,), {"forward": forward})


def _other_results(become: Callable[[type], type], width: Callable[[Any], int]) -> Callable[..., str | None]:
    """Returns what says whether a module's stock forward computes something else than the exchanged one."""

    def stays(module: Any, autocast: bool) -> str | None:
        stock: type[Any] = type(module)
        takes = list(inspect.signature(stock.forward).parameters.values())[2:]
        if any(
            p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in takes
        ):
            return "its forward takes more than x"
        x = _probe(width(module), _computes_in(module), next(module.parameters()).device)
        training = [m for m in module.modules() if m.training]
        module.eval()
        with torch.no_grad():
            want = stock.forward(module, x).double()
            gap = (become(stock).forward(module, x).double() - want).norm(dim=1) / want.norm(dim=1)  # pyright: ignore[reportAttributeAccessIssue]
        for m in training:
            m.training = True
        return None if gap.max().item() <= 4 * torch.finfo(x.dtype).eps else "its forward is another one"

    return stays


def _probe(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns rows small enough for an epsilon to show, and large enough for a clamp to."""
    numbers = torch.randn(8, width, generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([1e-3, 0.1, 1.0, 10.0]).repeat(2)
    return (numbers * scales[:, None]).to(device, dtype)


def _computes_in(module: Any) -> torch.dtype:
    """Returns the type a module's frozen part computes in, else that of its weights."""
    given = [getattr(m, "compute_dtype", None) for m in module.modules()]
    numbers = [p for p in module.parameters() if p.is_floating_point()]
    frozen_first = sorted(numbers, key=lambda p: p.requires_grad)
    types = [t for t in given if t is not None] + [p.dtype for p in frozen_first]
    return (types or [torch.float32])[0]


# Rotary embeddings are no row: transformers calls a function of its module for them, and nothing of it is
# patched in place. Compiled layers fuse it.
SWAPS = (  # in this order, each over what the rows above have made
    Swap("lora", _itself(is_lora), why_not_fused, fused),
    Swap("qkv", _adapted("q_proj", "k_proj", "v_proj"), why_not_fused, sharing, Siblings),
    Swap("swiglu", _adapted("gate_proj", "up_proj"), why_not_fused, sharing, Siblings),
    Swap(
        "swiglu",
        _itself(_is_swiglu),
        _other_results(swiglu_mlp, lambda mlp: mlp.gate_proj.in_features),
        swiglu_mlp,
    ),
    Swap(
        "norm",
        _itself(_is_rms_norm),
        _other_results(one_kernel_norm, lambda norm: len(norm.weight)),
        one_kernel_norm,
    ),
)


class Exchange:
    """The modules of a model that are exchanged, and how they come back.

    Args:
        model: a transformers model, wrapped by peft or not.
        chosen: of `KernelConfig.chosen`.
        autocast: whether training runs under autocast, which the LoRA op does not cover.
    """

    def __init__(self, model: nn.Module, chosen: dict[str, bool], autocast: bool) -> None:
        self._stock: dict[nn.Module, type] = {}
        self._fast: dict[nn.Module, type] = {}
        reasons: dict[str, list[str | None]] = {s.flag: [] for s in SWAPS if chosen[s.flag]}
        for swap in SWAPS:
            for module in list(model.modules()) if chosen[swap.flag] else []:
                reasons[swap.flag] += self._plan(swap, swap.find(module), autocast)
        for flag, found in reasons.items():
            self._say_what_stays(flag, found)
        self.swap()

    def _plan(self, swap: Swap, together: list[nn.Module], autocast: bool) -> list[str | None]:
        """Notes what `together` becomes; returns for each of them why it stays, or None."""
        reasons = [swap.stays(m, autocast) for m in together]
        fits = [m for m, reason in zip(together, reasons, strict=True) if reason is None]
        if swap.tie is not None and len(fits) > 1:
            siblings = swap.tie(fits)
            for m in fits:
                m.siblings = siblings
        elif swap.tie is not None:
            fits = []
        for m in fits:
            self._stock.setdefault(m, type(m))
            self._fast[m] = swap.become(self._fast.get(m, type(m)))
        return reasons

    def _say_what_stays(self, flag: str, found: list[str | None]) -> None:
        reasons = sorted({r for r in found if r})
        if reasons or not found:
            stay = sum(r is not None for r in found)
            rank_zero_warn(
                f"model.kernels.{flag}: {stay} of {len(found)} modules run their own forward "
                f"({', '.join(reasons) or 'there are none to exchange'})"
            )

    def swap(self) -> None:
        """Exchanges what has been found."""
        for module, fast in self._fast.items():
            module.__class__ = fast

    def undo(self) -> None:
        """Makes every module what it was loaded as, until the next `swap`."""
        for module, stock in self._stock.items():
            module.__class__ = stock

    def forget(self) -> None:
        """Undoes the exchange for good."""
        self.undo()
        for module in self._stock:
            module.__dict__.pop("siblings", None)
        self._stock, self._fast = {}, {}
