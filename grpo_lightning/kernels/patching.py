"""Which modules of a model are exchanged for faster ones, and how: one row of `PATCH_RULES` each.

An exchanged module becomes an instance of a subclass of its own class. Names, weights and hooks stay, and the
stock forward is one call away for whatever the fast one does not cover. Modules are recognised by structure,
never by the name of an architecture, and where structure does not say what a forward computes, both are run
on a few numbers first.
"""

from collections.abc import Callable
from copy import copy, deepcopy
from functools import cache
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from grpo_lightning.kernels.lora import SharedInputGroup, fused, is_lora, sharing, why_not_fused
from grpo_lightning.kernels.rotary_attention import is_rotary_attention, one_kernel_rotary
from grpo_lightning.ops.swiglu import swiglu


class PatchRule(NamedTuple):
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
    """Returns a norm as torch's own kernel, which rounds once; compiled layers have one already."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or x.dtype != self.weight.dtype or torch.compiler.is_compiling():
            return stock.forward(self, x, *args, **kwargs)
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, _epsilon(self) or 0.0)

    return type(f"Kernel{stock.__name__}", (stock,), {"forward": forward})


def _other_results(
    become: Callable[[type], type], run: Callable[[Any, Any], list[Any]]
) -> Callable[[Any, bool], str | None]:
    """Returns what says whether a module's stock forward computes something else than the exchanged one.

    Args:
        become: of a row.
        run: what a module and a forward of it give for a few numbers: tensors, and what is to be equal.
    """

    def stays(module: Any, autocast: bool) -> str | None:
        stock: type[Any] = type(module)
        fast: type[Any] = become(stock)
        training = [m for m in module.modules() if m.training]
        module.eval()
        try:
            with torch.no_grad():
                want, got = run(module, stock.forward), run(module, fast.forward)
        except Exception as error:  # whatever a forward of any model says to what it was not made for
            return f"its forward takes something else: {type(error).__name__}"
        finally:
            for m in training:
                m.training = True
        tolerance = 4 * torch.finfo(_computes_in(module)).eps
        same = len(want) == len(got) and all(map(_same, want, got, [tolerance] * len(want)))
        return None if same else "its forward is another one"

    return stays


def _same(want: Any, got: Any, tolerance: float) -> bool:
    """Returns whether two things are equal, tensors [..., W] by the norms of their rows."""
    if not isinstance(want, Tensor) or not isinstance(got, Tensor) or want.shape != got.shape:
        return type(want) is type(got) and not isinstance(want, Tensor) and want == got
    exact = want.double()
    return bool(((got.double() - exact).norm(dim=-1) <= tolerance * exact.norm(dim=-1)).all())


def _of_rows(width: Callable[[Any], int]) -> Callable[[Any, Any], list[Any]]:
    """Returns what runs a module that takes x [N, width]."""
    return lambda module, forward: [forward(module, _probe(width(module), module))]


def _of_packed_rows(module: Any, forward: Any) -> list[Any]:
    """Returns what an attention module calls its attention function with, and what it makes of the result."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = "grpo_lightning_seen"
    ALL_ATTENTION_FUNCTIONS.register(name, _seen)
    alone = copy(module)  # what follows is its own: the model's config and mode stay as they are
    alone.config = deepcopy(module.config)
    alone.config._attn_implementation = name
    alone.training = True  # its children are not: dropout that the exchanged forward leaves out shows
    x = _probe(module.q_proj.in_features, module)[None]
    cos, sin = (_probe(module.head_dim, module, seed)[None] for seed in (1, 2))
    seen: list[Any] = []
    result = forward(alone, x, position_embeddings=(cos, sin), attention_mask=None, layout=seen)
    return [*seen, *result]


def _seen(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, layout: Any, **settings: Any
) -> tuple[Tensor, None]:
    """An attention function that notes what it is given in `layout`; every token sees itself alone."""
    layout += [query, key, value, mask, {name: x for name, x in settings.items() if x is not None}]
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None


def _probe(width: int, module: Any, seed: int = 0) -> Tensor:
    """Returns rows [8, width] small enough for an epsilon to show, and large enough for a clamp to."""
    numbers = torch.randn(8, width, generator=torch.Generator().manual_seed(seed))
    scales = torch.tensor([1e-3, 0.1, 1.0, 10.0]).repeat(2)
    return (numbers * scales[:, None]).to(next(module.parameters()).device, _computes_in(module))


def _computes_in(module: Any) -> torch.dtype:
    """Returns the type a module's frozen part computes in, else that of its weights."""
    given = [getattr(m, "compute_dtype", None) for m in module.modules()]
    numbers = [p for p in module.parameters() if p.is_floating_point()]
    frozen_first = sorted(numbers, key=lambda p: p.requires_grad)
    types = [t for t in given if t is not None] + [p.dtype for p in frozen_first]
    return (types or [torch.float32])[0]


PATCH_RULES = (  # in this order, each over what the rows above have made
    PatchRule("lora", _itself(is_lora), why_not_fused, fused),
    PatchRule("qkv", _adapted("q_proj", "k_proj", "v_proj"), why_not_fused, sharing, SharedInputGroup),
    PatchRule("swiglu", _adapted("gate_proj", "up_proj"), why_not_fused, sharing, SharedInputGroup),
    PatchRule(
        "swiglu",
        _itself(_is_swiglu),
        _other_results(swiglu_mlp, _of_rows(lambda mlp: mlp.gate_proj.in_features)),
        swiglu_mlp,
    ),
    PatchRule(
        "norm",
        _itself(_is_rms_norm),
        _other_results(one_kernel_norm, _of_rows(lambda norm: len(norm.weight))),
        one_kernel_norm,
    ),
    # transformers calls a function for rotary embeddings, and nothing of it is patched in place: what is
    # exchanged is the attention module around the call.
    PatchRule(
        "rotary",
        _itself(is_rotary_attention),
        _other_results(one_kernel_rotary, _of_packed_rows),
        one_kernel_rotary,
    ),
)


class ModulePatcher:
    """The modules of a model that are exchanged, and how they come back.

    Args:
        model: a transformers model, wrapped by peft or not.
        chosen: of `KernelConfig.chosen`.
        autocast: whether training runs under autocast, which the LoRA op does not cover.
    """

    def __init__(self, model: nn.Module, chosen: dict[str, bool], autocast: bool) -> None:
        self._stock: dict[nn.Module, type] = {}
        self._fast: dict[nn.Module, type] = {}
        reasons: dict[str, list[str | None]] = {s.flag: [] for s in PATCH_RULES if chosen[s.flag]}
        for swap in PATCH_RULES:
            for module in list(model.modules()) if chosen[swap.flag] else []:
                reasons[swap.flag] += self._plan(swap, swap.find(module), autocast)
        for flag, found in reasons.items():
            self._say_what_stays(flag, found)
        self.swap()

    def _plan(self, swap: PatchRule, together: list[nn.Module], autocast: bool) -> list[str | None]:
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
