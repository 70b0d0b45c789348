"""What the reward functions of a run said of some completions."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any


@dataclass(frozen=True, slots=True)
class Scores:
    """Rewards of S completions from K functions; NaN stands for «does not apply»."""

    names: list[str]
    """[K]"""
    values: list[list[float]]
    """[S][K]"""
    weights: list[float]
    """[K]"""
    totals: list[float]
    """[S] weighted sum over the functions that apply; NaN where none does"""
    metrics: dict[str, float]
    """mean of the values that functions gave to `log_metric`, by name"""
    extra: dict[str, list[Any]]
    """[S] values that functions gave to `log_extra`, by column"""
    logged_by: dict[str, str]
    """the function that logged a metric or a column"""

    @classmethod
    def join(cls, parts: "list[Scores]") -> "Scores":
        """Returns the scores of several calls as of one; metrics weigh every call the same."""
        logged = {
            name: [p.metrics[name] for p in parts if name in p.metrics] for p in parts for name in p.metrics
        }
        columns = dict.fromkeys(name for p in parts for name in p.extra)
        return cls(
            parts[0].names,
            [row for p in parts for row in p.values],
            parts[0].weights,
            [total for p in parts for total in p.totals],
            {name: math.fsum(values) / len(values) for name, values in logged.items()},
            {c: [v for p in parts for v in p.extra.get(c, [None] * len(p.values))] for c in columns},
            {name: owner for p in parts for name, owner in p.logged_by.items()},
        )


@dataclass(slots=True)
class RewardLog:
    """Receives what functions log during one call of the suite."""

    size: int
    metrics: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    extra: dict[str, list[Any]] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)

    def receivers(self, owner: str) -> dict[str, Callable[[], Any]]:
        """Returns what makes `log_extra` and `log_metric` for a function."""
        return {
            "log_extra": lambda: partial(self._add_extra, owner),
            "log_metric": lambda: partial(self._add_metric, owner),
        }

    def _add_metric(self, owner: str, name: str, value: Any) -> None:
        self.owners[name] = owner
        self.metrics[name].append(float(value))

    def _add_extra(self, owner: str, column: str, values: Iterable[Any]) -> None:
        self.owners[column] = owner
        listed = list(values)
        if len(listed) != self.size:
            raise ValueError(f"log_extra({column!r}, …) got {len(listed)} values for {self.size} completions")
        self.extra[column] = listed
