"""Every rate at which a loaded model drops or perturbs something in training."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

RATE = re.compile(r".*(drop|jitter).*|p")
NOT_IN_A_DECODER = re.compile(r"(classifier|summary|mask_time|mask_feature).*")
"""rates of heads for other tasks, which configs carry along"""


def dropout_rates(model: nn.Module) -> Iterator[tuple[Any, str, float]]:
    """Yields (owner, name, rate) of each rate above 0: of dropout layers, of modules that drop out in their
    own forward (OPT, XGLM, Seed-OSS), and of configs that are read there (router jitter)."""
    seen: set[int] = set()
    for module in model.modules():
        owners = [module, *_configs(getattr(module, "config", None))]
        for owner in owners:
            if id(owner) in seen:
                continue
            seen.add(id(owner))
            for name, value in list(vars(owner).items()):
                named = name != "p" or isinstance(owner, nn.modules.dropout._DropoutNd)
                rate = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
                if rate and named and RATE.fullmatch(name) and not NOT_IN_A_DECODER.fullmatch(name):
                    yield owner, name, value


Rates = list[tuple[Any, str, float]]


def disable_dropout(model: nn.Module) -> Rates:
    """Sets every rate to 0; returns what they were."""
    rates = list(dropout_rates(model))
    _set(_off(rates))
    return rates


@contextmanager
def restored(rates: Rates) -> Iterator[None]:
    """Puts rates back inside: some models read theirs in evaluation too (PhiMoE routes by its jitter)."""
    _set(rates)
    try:
        yield
    finally:
        _set(_off(rates))


def _off(rates: Rates) -> Rates:
    return [(owner, name, type(rate)(0)) for owner, name, rate in rates]  # strict configs check types


def _set(rates: Iterable[tuple[Any, str, float]]) -> None:
    for owner, name, rate in rates:
        setattr(owner, name, rate)


def _configs(config: Any) -> list[Any]:
    """Returns a config and those nested in it."""
    if not hasattr(config, "to_dict"):
        return []
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [config, *(c for part in parts for c in _configs(part))]
