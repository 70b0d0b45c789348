"""Linear layers with LoRA adapters over the same x as one op: q, k and v; gate and up; or one alone.

    y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T
The products x A_i^T are one, with the A_i over one another, and so are dA and their part of dx, which is
added up in one buffer. The adapters' fp32 masters are rounded to the type of `x` for the products, whose
results for A and B are fp32. The backward needs x, h = x A^T and the rounded adapters, nothing as wide as y.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from grpo_lightning.ops.products import wide_product


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
    rounded = (torch.cat(a) if len(a) > 1 else a[0]).to(x.dtype)
    h = x @ rounded.T
    narrow = [m.to(x.dtype) for m in b]
    out = []
    thin = h.split([m.shape[0] for m in a], 1)
    for part, m, s, weight, bias, y in zip(thin, narrow, scalings, weights, biases, given, strict=True):
        into = linear(x, weight, bias) if y is None else y
        # torch 2.11 compiles a forward that writes in place into one without a gradient, and says nothing.
        if y is None and not torch.compiler.is_compiling():
            out.append(into.addmm_(part, m.T, alpha=s))
        else:
            out.append(torch.addmm(into, part, m.T, alpha=s))
    return tuple(out), [h, rounded, *narrow, *weights]


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
        dx, gradients = None, []
        for i, (dy, part, dpart) in enumerate(zip(dys, h.split(ranks, 1), dh.split(ranks, 1), strict=True)):
            if dy is None:
                dpart.zero_()
                gradients.append(None)
                continue
            dpart.addmm_(dy, narrow[i], beta=0, alpha=ctx.scalings[i])
            gradients.append(wide_product(dy.T, part).mul_(ctx.scalings[i]).to(ctx.masters[i][1]))
            if weights[i] is not None and ctx.needs_input_grad[0]:
                dx = dy @ weights[i] if dx is None else dx.addmm_(dy, weights[i])
        if ctx.needs_input_grad[0]:
            dx = dh @ a if dx is None else dx.addmm_(dh, a)
        da = wide_product(dh.T, x).split(ranks)
        out: list[Tensor | None] = [dx, None]
        for i, dy in enumerate(dys):
            given = dy if ctx.needs_input_grad[2 + 5 * i + 4] else None
            out += [None if dy is None else da[i].to(ctx.masters[i][1]), gradients[i], None, None, given]
        return tuple(out)
