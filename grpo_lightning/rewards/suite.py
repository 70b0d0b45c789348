"""The reward functions of a run as one object: calls them by TRL's contract and adds up what they return."""

import asyncio
import inspect
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from grpo_lightning.errors import ConfigError, choices, hinted
from grpo_lightning.ranges import check_numbers
from grpo_lightning.rewards.resolve import RewardFunction, RewardSpec, resolve
from grpo_lightning.rewards.returned import Samples, as_floats, check_total, failures_named

# What every function may ask for besides the dataset's columns.
_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
# Columns that never reach a function: they would stand for something else than their name says.
_HIDDEN = frozenset({"prompt", "completion", *_GIVEN})


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


@hinted
class Rewards:
    """The K reward functions of a run.

    A function is called once per rollout, with keywords only: `prompts`, `completions`, `completion_ids`,
    `trainer_state`, `log_extra(column, values)`, `log_metric(name, value)` and every column of the dataset,
    each a list with one entry per completion. With `**kwargs` it gets all of them, else those it names. It
    returns one float per completion, or None where it does not apply; it may be `async`. This is the contract
    of TRL 1.16.

    Args:
        reward_funcs: one or several of what `resolve` takes.
        weights: [K] factors of the sum; 1 each if missing.

    Raises:
        ConfigError: a function cannot be resolved, there is none, or the weights do not fit.
    """

    def __init__(
        self, reward_funcs: RewardSpec | Sequence[RewardSpec], weights: Sequence[float] | None = None
    ) -> None:
        if callable(reward_funcs) or isinstance(reward_funcs, str | Mapping):
            reward_funcs = [reward_funcs]
        if not reward_funcs:
            raise ConfigError("rollout.reward_funcs is empty; give at least one reward function")
        functions = [resolve(spec) for spec in reward_funcs]
        self.names = _unique([_name(function) for function in functions])
        self.weights = _checked_weights(weights, self.names)
        self._rewards = [
            _Reward.of(name, function) for name, function in zip(self.names, functions, strict=True)
        ]

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raises ConfigError if a function requires a parameter that is not ours nor one of these columns."""
        columns = sorted(set(columns) - _HIDDEN)
        for reward in self._rewards:
            missing = sorted(reward.required - {*columns, *_GIVEN})
            if missing:
                raise ConfigError(
                    f"reward function {reward.name!r} requires {choices(missing[0], [*columns, *_GIVEN])}; "
                    f"the dataset has the columns {columns}. Add the column, or give the parameter a default"
                )

    def score(
        self,
        *,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        trainer_state: Any = None,
    ) -> Scores:
        """Returns the rewards of S completions.

        Every function gets its own copies, so what it does to them reaches no one. The async functions run
        together on one event loop. Where the prompt is a message list, a function gets its completion as
        `[{"role": "assistant", "content": text}]`. No function is called without a completion.

        Args:
            prompts: [S] strings or message lists, each already repeated for its completions.
            completions: [S] texts.
            completion_ids: [S] token ids.
            columns: for each column of the dataset its [S] values.
            trainer_state: handed on as it is.

        Raises:
            ConfigError: a function requires a parameter that is not there.
            RewardError: a function raises, or returns what is not a list of rewards; shows the sample.
        """
        for name, values in {"prompts": prompts, "completion_ids": completion_ids, **columns}.items():
            if len(values) != len(completions):
                raise ValueError(f"{name} has {len(values)} entries for {len(completions)} completions")
        if not completions:  # a rank without a prompt in this batch knows no columns either
            return Scores(list(self.names), [], list(self.weights), [], {}, {}, {})
        self.check_columns(columns)
        log = _Log(size=len(completions))
        samples = Samples(prompts, completions, columns)
        copies: dict[str, Callable[[], Any]] = {
            **{name: partial(_copied, values) for name, values in columns.items() if name not in _HIDDEN},
            "prompts": partial(_copied, prompts),
            "completions": partial(_as_messages, prompts, completions),
            "completion_ids": lambda: [list(ids) for ids in completion_ids],
            "trainer_state": lambda: trainer_state,
        }
        returned = self._call(copies, log, samples)
        by_function = [as_floats(n, r, samples) for n, r in zip(self.names, returned, strict=True)]
        values = [[own[s] for own in by_function] for s in range(len(completions))]
        totals = [_weighted_sum(row, self.weights) for row in values]
        for s, (row, total) in enumerate(zip(values, totals, strict=True)):
            check_total(self.names, row, total, s, samples)
        _warn_of_unscored(totals)
        metrics = {name: math.fsum(logged) / len(logged) for name, logged in log.metrics.items()}
        return Scores(list(self.names), values, list(self.weights), totals, metrics, log.extra, log.owners)

    def _call(self, copies: Mapping[str, Callable[[], Any]], log: "_Log", samples: Samples) -> list[Any]:
        """Returns what each function returned. Calling an async one makes its coroutine; these run last."""
        results: list[Any] = []

        async def finish(k: int) -> None:
            with failures_named(self.names[k], samples):
                results[k] = await results[k]

        async def finish_all() -> None:
            await asyncio.gather(*(finish(k) for k, r in enumerate(results) if inspect.isawaitable(r)))

        try:
            for reward in self._rewards:
                arguments = reward.pick({**copies, **log.receivers(reward.name)})
                with failures_named(reward.name, samples):
                    results.append(reward.function(**arguments))
            if any(inspect.isawaitable(result) for result in results):
                _run(finish_all)
        finally:
            # Where another function has failed, coroutines are left that never start.
            for result in results:
                if inspect.iscoroutine(result):
                    result.close()
        return results


@dataclass(frozen=True, slots=True)
class _Reward:
    name: str
    function: RewardFunction
    accepted: frozenset[str] | None
    """parameters it names; None = takes everything"""
    required: frozenset[str]
    bound: frozenset[str]
    """parameters that a `partial` has set: they stay as set, even if a column has the name"""

    @classmethod
    def of(cls, name: str, function: RewardFunction) -> "_Reward":
        bound = frozenset(function.keywords) if isinstance(function, partial) else frozenset[str]()
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # some functions written in C have no signature
            return cls(name, function, None, frozenset(), bound)
        single = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        required = frozenset(p.name for p in single if p.default is p.empty)
        positional = [p.name for p in single if p.kind is p.POSITIONAL_ONLY and p.name in required]
        if positional:
            raise ConfigError(
                f"reward function {name!r} has the positional-only parameters {positional}; "
                "rewards are called with keywords, so remove the '/'"
            )
        everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return cls(name, function, None if everything else frozenset(p.name for p in single), required, bound)

    def pick(self, copies: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
        """Returns fresh copies of the arguments that the function takes."""
        names = [n for n in copies if (self.accepted is None or n in self.accepted) and n not in self.bound]
        return {name: copies[name]() for name in names}


@dataclass(slots=True)
class _Log:
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


def _copied(values: Sequence[Any]) -> list[Any]:
    # One by one: the completions of a group share one object, of which a common copy would still be shared.
    return [deepcopy(value) for value in values]


def _as_messages(prompts: Sequence[Any], completions: Sequence[str]) -> list[Any]:
    return [
        [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text
        for prompt, text in zip(prompts, completions, strict=True)
    ]


def _weighted_sum(row: Sequence[float], weights: Sequence[float]) -> float:
    applicable = [w * value for w, value in zip(weights, row, strict=True) if not math.isnan(value)]
    try:
        return math.fsum(applicable) if applicable else math.nan
    except (OverflowError, ValueError):  # beyond what a float holds; with both signs, infinities cancel
        return math.inf


def _warn_of_unscored(totals: Sequence[float]) -> None:
    # The text never changes, so that Python shows it once per run.
    if any(math.isnan(total) for total in totals):
        warnings.warn(
            "no reward function applies to some completions (all returned None): they teach nothing",
            stacklevel=3,
        )


def _run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs `main` on an event loop of its own; where one is running already (Jupyter), in a helper thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(main())
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(lambda: asyncio.run(main())).result()


def _name(function: Any) -> str:
    if isinstance(function, partial):
        return _name(function.func)
    return getattr(function, "__name__", None) or type(function).__name__


def _unique(names: Sequence[str]) -> list[str]:
    """Returns the names, a repeated one with a number: metrics are kept by name."""
    out: list[str] = []
    for name in names:
        candidate, n = name, 1
        while candidate in out:
            n += 1
            candidate = f"{name}_{n}"
        out.append(candidate)
    return out


def _checked_weights(weights: Sequence[float] | None, names: Sequence[str]) -> list[float]:
    if weights is None:
        return [1.0] * len(names)
    if len(weights) != len(names):
        raise ConfigError(
            f"rollout.reward_weights has {len(weights)} entries for {len(names)} reward functions "
            f"({', '.join(names)}); give one each, or leave it out for 1.0"
        )
    allowed = "other than 0 for at least one function: nothing would be rewarded"
    given = {"reward_weights": list(weights)}
    check_numbers("rollout", given, [("reward_weights", any(weights), allowed)])
    return [float(weight) for weight in weights]
