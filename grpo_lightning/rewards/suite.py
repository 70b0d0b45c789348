"""The reward functions of a run as one object: calls them by TRL's contract and adds up what they return."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from grpo_lightning.errors import ConfigError, choices, hinted
from grpo_lightning.rewards.arguments import GIVEN, HIDDEN, NamedReward, copies_of, name_of, unique
from grpo_lightning.rewards.calls import call_all
from grpo_lightning.rewards.resolve import RewardSpec, resolve
from grpo_lightning.rewards.reward_workers import RewardWorkers
from grpo_lightning.rewards.scores import RewardLog, Scores
from grpo_lightning.rewards.time_limit import check_time_limit
from grpo_lightning.rewards.validation import Samples, as_floats, check_total
from grpo_lightning.utils.ranges import check_numbers

__all__ = ["TIMEOUT_S", "Rewards", "Scores"]

TIMEOUT_S = 900.0
"""seconds that one reward function may take for one call: far above any healthy one, and half of the 30
minutes after which torch.distributed gives up on a rank that waits, so that a hang is reported by its name"""


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
        timeout_s: seconds that one function may take for one call; None is no limit.
        workers: processes in which the functions run; 0 is this one.

    Raises:
        ConfigError: a function cannot be resolved, there is none, or the weights, the time limit or the
            number of workers do not fit.
    """

    def __init__(
        self,
        reward_funcs: RewardSpec | Sequence[RewardSpec],
        weights: Sequence[float] | None = None,
        timeout_s: float | None = TIMEOUT_S,
        workers: int = 0,
    ) -> None:
        if callable(reward_funcs) or isinstance(reward_funcs, str | Mapping):
            reward_funcs = [reward_funcs]
        if not reward_funcs:
            raise ConfigError("rollout.reward_funcs is empty; give at least one reward function")
        functions = [resolve(spec) for spec in reward_funcs]
        self.names = unique([name_of(function) for function in functions])
        self.weights = _checked_weights(weights, self.names)
        self._rewards = [
            NamedReward.of(name, function) for name, function in zip(self.names, functions, strict=True)
        ]
        check_time_limit(timeout_s)
        if workers < 0:
            raise ConfigError(f"rollout.reward_workers is {workers}; it must be at least 0 (no processes)")
        self._timeout_s = timeout_s
        self._workers = RewardWorkers(reward_funcs, self.weights, workers, timeout_s) if workers else None

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raises ConfigError if a function requires a parameter that is not ours nor one of these columns."""
        columns = sorted(set(columns) - HIDDEN)
        for reward in self._rewards:
            missing = sorted(reward.required - {*columns, *GIVEN})
            if missing:
                raise ConfigError(
                    f"reward function {reward.name!r} requires {choices(missing[0], [*columns, *GIVEN])}; "
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
        group_size: int | None = None,
        starting: Callable[[Sequence[str]], None] = lambda names: None,
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
            trainer_state: handed on as a copy.
            group_size: completions of a prompt, neighbours; with workers each gets whole groups. None: one
                worker gets all.
            starting: told the names of the functions that run next.

        Raises:
            ConfigError: a function requires a parameter that is not there.
            RewardError: a function raises, returns what is not a list of rewards, or does not return in time;
                shows the sample.
        """
        for name, values in {"prompts": prompts, "completion_ids": completion_ids, **columns}.items():
            if len(values) != len(completions):
                raise ValueError(f"{name} has {len(values)} entries for {len(completions)} completions")
        if not completions:  # a rank without a prompt in this batch knows no columns either
            return Scores(list(self.names), [], list(self.weights), [], {}, {}, {})
        self.check_columns(columns)
        if self._workers is not None:
            calls = [
                {
                    "prompts": prompts[a:b],
                    "completions": completions[a:b],
                    "completion_ids": completion_ids[a:b],
                    "columns": {name: values[a:b] for name, values in columns.items()},
                    "trainer_state": trainer_state,
                }
                for a, b in _shares(len(completions), group_size or len(completions), self._workers.count)
            ]
            return Scores.join(self._workers.score(calls))
        log = RewardLog(size=len(completions))
        samples = Samples(prompts, completions, columns)
        copies = copies_of(prompts, completions, completion_ids, columns, trainer_state)
        returned = call_all(self._rewards, copies, log, samples, self._timeout_s, starting)
        by_function = [as_floats(n, r, samples) for n, r in zip(self.names, returned, strict=True)]
        values = [[own[s] for own in by_function] for s in range(len(completions))]
        totals = [_weighted_sum(row, self.weights) for row in values]
        for s, (row, total) in enumerate(zip(values, totals, strict=True)):
            check_total(self.names, row, total, s, samples)
        _warn_of_unscored(totals)
        metrics = {name: math.fsum(logged) / len(logged) for name, logged in log.metrics.items()}
        return Scores(list(self.names), values, list(self.weights), totals, metrics, log.extra, log.owners)

    def close(self) -> None:
        """Ends the worker processes; a later call starts them anew."""
        if self._workers is not None:
            self._workers.close()


def _shares(size: int, group_size: int, count: int) -> list[tuple[int, int]]:
    """Returns start and end of at most `count` even runs of whole groups."""
    groups = size // group_size
    edges = sorted({groups * i // count * group_size for i in range(count)} | {size})
    return list(pairwise(edges))


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
