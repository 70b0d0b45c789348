"""Sums that become metrics: they add up over micro-batches and ranks before anything is divided."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["mean", "std", "share", "ratio", "ratio_error", "sum", "min", "max"]


class Stat(NamedTuple):
    """One measured quantity, in a form that adds up: see `_FINISH` for what becomes of it."""

    kind: Kind
    value: Tensor
    weight: Tensor


def mean(total: Tensor | float, count: Tensor | float) -> Stat:
    """Returns the part of a mean that is known here: a sum and how many things it is a sum of."""
    return Stat("mean", _number(total), _number(count))


def mean_of(values: Iterable[float]) -> Stat:
    """Returns the mean over `values`, as a part."""
    known = list(values)
    return mean(float(sum(known)), float(len(known)))


def std_stat(values: Tensor) -> Stat:
    """Returns the standard deviation over `values`, as a part; one degree of freedom less."""
    x = values.detach().double()
    return Stat("std", torch.stack([x.sum(), (x * x).sum()]), _number(float(x.numel())))


def effective_share(weights: Tensor, counts: Tensor | None = None) -> Stat:
    """Returns the effective sample size of `weights` as a share, (sum c)^2 / (N sum c^2), as a part.

    Args:
        weights: [N] c.
        counts: [N], how many each stands for; None is 1.
    """
    c = weights.detach().double()
    n = torch.ones_like(c) if counts is None else counts.double()
    return Stat("share", torch.stack([(n * c).sum(), (n * c * c).sum()]), n.sum())


def ratio(totals: Tensor, counts: Tensor, weights: Tensor | None = None) -> tuple[Stat, Stat]:
    """Returns the mean per counted thing and its standard error, as parts.

    The estimate is sum(w y) / sum(w n) over independent units of which each has a total y and a count n; the
    error is that of a ratio of sums, linearised.

    Args:
        totals: [S] y.
        counts: [S] n.
        weights: [S] w, how many units each stands for; None is 1.
    """
    w = torch.ones_like(totals, dtype=torch.float64) if weights is None else weights.double()
    y, n = w * totals.double(), w * counts.double()
    sums = torch.stack([y.sum(), n.sum(), (y * y).sum(), (y * n).sum(), (n * n).sum()])
    units = (counts > 0).sum()
    return Stat("ratio", sums, units), Stat("ratio_error", sums, units)


def _ratio_error(v: Tensor, n: Tensor) -> Tensor:
    k = v[0] / v[1]
    return (v[2] - 2 * k * v[3] + k**2 * v[4]).clamp(min=0).mul(n / (n - 1)).sqrt() / v[1]


def reduced(kind: Literal["sum", "min", "max"], value: Tensor | float) -> Stat:
    """Returns a sum, minimum or maximum, as a part."""
    return Stat(kind, _number(value), _number(1.0))


def _number(x: Tensor | float) -> Tensor:
    """Returns `x` as it is, or in fp64: under bf16-true a plain float would become a bf16 tensor."""
    return x.detach() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)


_FOLD: dict[Kind, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": torch.add,
    "std": torch.add,
    "share": torch.add,
    "ratio": torch.add,
    "ratio_error": torch.add,
    "sum": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
}

_FINISH: dict[Kind, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda v, n: v / n,
    "std": lambda v, n: ((v[1] - v[0] ** 2 / n).clamp(min=0) / (n - 1)).sqrt(),
    "share": lambda v, n: v[0] ** 2 / (n * v[1]),
    "ratio": lambda v, n: v[0] / v[1],
    "ratio_error": _ratio_error,
    "sum": lambda v, n: v,
    "min": lambda v, n: v,
    "max": lambda v, n: v,
}


def combine(parts: Iterable[Mapping[str, Stat]]) -> dict[str, Stat]:
    """Returns one table from the tables of several micro-batches."""
    out: dict[str, Stat] = {}
    for part in parts:
        for name, stat in part.items():
            seen = out.get(name)
            out[name] = (
                stat
                if seen is None
                else Stat(stat.kind, _FOLD[stat.kind](seen.value, stat.value), seen.weight + stat.weight)
            )
    return out


def values(stats: Mapping[str, Stat]) -> dict[str, float]:
    """Returns what is logged: host floats, without the means of nothing and without NaN."""
    table = {name: float(_FINISH[s.kind](s.value.double(), s.weight.double())) for name, s in stats.items()}
    return {name: x for name, x in table.items() if math.isfinite(x)}
