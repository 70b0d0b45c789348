"""Numbers among the options: one rule for all sections, nan and infinity refused and bounds kept."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from numbers import Real
from typing import Any

from grpo_lightning.errors import ConfigError

Bound = tuple[str, bool, str]
"""a key, whether its value is allowed, and what is"""


def check_numbers(
    where: str, options: Any, bounds: Iterable[Bound] = (), *, may_be_infinite: Collection[str] = ()
) -> None:
    """Refuses numbers that cannot work.

    Args:
        where: name of the section, e.g. `model.loss`; stands before the keys.
        options: a dataclass or a mapping; lists and mappings in it are looked into.
        bounds: checked in order, after all numbers have been found finite.
        may_be_infinite: keys of limits, which infinity switches off.

    Raises:
        ConfigError: a number is nan or infinite, or a bound does not hold.
    """
    table = _table(options)
    for key, value in _numbers(table):
        limit = value == math.inf and key.partition(".")[0] in may_be_infinite
        if not math.isfinite(value) and not limit:
            raise ConfigError(f"{where}.{key} is {value}; it must be a finite number")
    for key, holds, allowed in bounds:
        if not holds:
            raise ConfigError(f"{where}.{key} is {table[key]}; it must be {allowed}")


def positive(options: Any, *keys: str) -> list[Bound]:
    """Returns the bounds of attributes that must be above 0, or null where that is the field's default."""
    return [(key, _unset(options, key) or (getattr(options, key) or 0) > 0, "> 0") for key in keys]


def not_negative(options: Any, *keys: str) -> list[Bound]:
    """Returns the bounds of attributes that must be 0 or above, or null where that is the field's default."""
    given = ((key, getattr(options, key)) for key in keys)
    return [(k, _unset(options, k) or (x is not None and x >= 0), ">= 0") for k, x in given]


def _unset(options: Any, key: str) -> bool:
    value = getattr(options, key)
    return value is None and any(f.name == key and f.default is None for f in fields(options))


def _table(options: Any) -> Mapping[str, Any]:
    if is_dataclass(options):
        return {f.name: getattr(options, f.name) for f in fields(options)}
    return options


def _numbers(table: Mapping[Any, Any]) -> Iterator[tuple[str, float]]:
    for key, value in table.items():
        if isinstance(value, Real):
            yield str(key), _float(value)
        elif isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", x) for inner, x in _numbers(value))
        elif isinstance(value, list | tuple):
            yield from ((f"{key}.{inner}", x) for inner, x in _numbers(dict(enumerate(value))))


def _float(value: Real) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer that no float holds
        return math.inf
