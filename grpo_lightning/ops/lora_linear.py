"""Linear layers with LoRA adapters over the same x as one op: q, k and v; gate and up; or one alone.

    y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T
The products x A_i^T are one, with the A_i over one another, and so are dA and their part of dx, which is
added up in one buffer; so are the products with the W_i where these adjoin in memory (`lay_together`). The
adapters' fp32 masters are rounded to the type of `x` for the products, whose results for A and B are fp32.
The backward needs x, h = s x A^T and the rounded adapters, nothing as wide as y.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from grpo_lightning.ops.matmul import wide_product


class Adapted(NamedTuple):
    """A linear layer with its adapter; its base is a frozen `weight`, or has computed `y` itself (4 bit)."""

    a: Tensor  # [r, K], trains
    b: Tensor  # [O, r], trains
    scaling: float
    weight: Tensor | None = None  # [O, K], of the type of x
    bias: Tensor | None = None  # [O]
    y: Tensor | None = None  # [..., O]


def lora_linears(x: Tensor, layers: Sequence[Adapted]) -> list[Tensor]:
    """Returns what `layers` give for `x` [..., K], each [..., O], in the type of `x`."""
    flat = x.reshape(-1, x.shape[-1])
    given = [None if m.y is None else m.y.reshape(-1, m.y.shape[-1]) for m in layers]
    scalings = tuple(m.scaling for m in layers)
    tensors = [t for m, y in zip(layers, given, strict=True) for t in (m.a, m.b, m.weight, m.bias, y)]
    if torch.is_grad_enabled():
        out: Any = _LoraLinears.apply(flat, scalings, *tensors)
    else:
        out, _saved = _forward(flat, scalings, *tensors)
    return [y.view(*x.shape[:-1], -1) for y in out]


def _forward(
    x: Tensor, scalings: tuple[float, ...], *tensors: Any
) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """Returns the layers' results, and what their backward needs beside x."""
    a, b, weights, biases, given = (list(tensors[i::5]) for i in range(5))
    ranks = [m.shape[0] for m in a]
    rounded = (torch.cat(a) if len(a) > 1 else a[0]).to(x.dtype)
    narrow = [m.to(x.dtype) for m in b]
    h = _scaled(x, rounded, ranks, scalings)
    # What is small comes first: the large product adds to it on its way out, without another pass.
    base = adjoining(weights)
    if base is None:
        out = []
        for part, m, weight, bias, y in zip(h.split(ranks, 1), narrow, weights, biases, given, strict=True):
            if y is not None:  # its bias is in it
                out.append(torch.addmm(y, part, m.T))
            else:
                out.append(_plus(linear(part, m, bias), x, weight.T))
        return tuple(out), [h, rounded, *narrow, *weights]
    bias = adjoining(biases) if biases[0] is not None else None
    small = linear(h, torch.block_diag(*narrow) if len(narrow) > 1 else narrow[0], bias)
    whole = small.addmm_(x, base.T)
    return whole.split([m.shape[0] for m in b], 1), [h, rounded, *narrow, *weights]


def _plus(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Returns y + a @ b, in the memory of y."""
    # torch 2.11 compiles a forward that writes in place into one without a gradient, and says nothing.
    return torch.addmm(y, a, b) if torch.compiler.is_compiling() else y.addmm_(a, b)


def _scaled(x: Tensor, a: Tensor, ranks: list[int], scalings: tuple[float, ...]) -> Tensor:
    """Returns s_i x A_i^T, side by side."""
    if len(set(scalings)) == 1 and not torch.compiler.is_compiling():
        return x.new_empty(x.shape[0], a.shape[0]).addmm_(x, a.T, beta=0, alpha=scalings[0])
    return torch.cat([h * s for h, s in zip((x @ a.T).split(ranks, 1), scalings, strict=True)], 1)


def lay_together(tensors: Sequence[Tensor]) -> None:
    """Moves tensors, equal but for their first axis, into one memory, where `adjoining` finds them."""
    parts = torch.cat([t.detach() for t in tensors]).split([len(t) for t in tensors])
    for t, part in zip(tensors, parts, strict=True):
        t.data = part


def adjoining(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Returns one view of tensors that lie one after another in one memory, or None if they do not."""
    parts = [t for t in tensors if t is not None]
    if len(parts) < len(tensors) or torch.compiler.is_compiling():
        return None
    whole = all(t.is_contiguous() for t in parts) and _in_a_row(parts, [t.numel() for t in parts])
    first, rows = parts[0], sum(len(t) for t in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride()) if whole else None


def side_by_side(columns: Sequence[Tensor | None]) -> Tensor | None:
    """Returns [T, sum of O_i] of columns [T, O_i], which it copies unless they lie so; None if one is."""
    parts = [c for c in columns if c is not None]
    if len(parts) < len(columns):
        return None
    widths = [c.shape[1] for c in parts]
    first, width = parts[0], sum(widths)
    if any(c.stride() != (width, 1) for c in parts) or not _in_a_row(parts, widths):
        return torch.cat(parts, 1)
    return first.as_strided((first.shape[0], width), (width, 1))


def _in_a_row(parts: Sequence[Tensor], steps: Sequence[int]) -> bool:
    """Returns whether the parts lie in one memory, each its predecessor's step behind it."""
    storage, at = parts[0].untyped_storage().data_ptr(), parts[0].storage_offset()
    for part, step in zip(parts, steps, strict=True):
        if part.storage_offset() != at or part.untyped_storage().data_ptr() != storage:
            return False
        at += step
    return True


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: tuple[float, ...], *tensors: Any) -> tuple[Tensor, ...]:
        out, saved = _forward(x, scalings, *tensors)
        ctx.save_for_backward(x, *saved)
        ctx.scalings = scalings
        ctx.masters = [(a.shape[0], a.dtype) for a in tensors[::5]]
        ctx.set_materialize_grads(False)  # a layer that nobody asked costs nothing
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h, a, *rest = ctx.saved_tensors
        narrow, weights = rest[: len(dys)], rest[len(dys) :]
        ranks = [rank for rank, _ in ctx.masters]
        dh = torch.empty_like(h)
        gradients = []
        for i, (dy, part, dpart) in enumerate(zip(dys, h.split(ranks, 1), dh.split(ranks, 1), strict=True)):
            if dy is None:
                dpart.zero_()
                gradients.append(None)
                continue
            dpart.addmm_(dy, narrow[i], beta=0, alpha=ctx.scalings[i])
            gradients.append(wide_product(dy.T, part).to(ctx.masters[i][1]))
        dx = _through(dh @ a, dys, weights) if ctx.needs_input_grad[0] else None
        da = wide_product(dh.T, x).split(ranks)
        out: list[Tensor | None] = [dx, None]
        for i, dy in enumerate(dys):
            given = dy if ctx.needs_input_grad[2 + 5 * i + 4] else None
            out += [None if dy is None else da[i].to(ctx.masters[i][1]), gradients[i], None, None, given]
        return tuple(out)


def _through(dx: Tensor, dys: Sequence[Tensor | None], weights: Sequence[Tensor | None]) -> Tensor:
    """Adds dy_i W_i to dx for all layers with both, in one product where the weights adjoin."""
    base = adjoining(weights) if len(weights) > 1 else None
    dy = None if base is None else side_by_side(dys)
    if base is not None and dy is not None:
        return dx.addmm_(dy, base)
    for dy, weight in zip(dys, weights, strict=True):
        if dy is not None and weight is not None:
            dx.addmm_(dy, weight)
    return dx
