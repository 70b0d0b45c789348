"""Metrics of held-out rollouts: torchmetrics that ask `update` by name for what they need.

One call of `update` sees the S completions of one batch of one rank. Any of these may be a parameter:

    reward       [S] weighted sum of the reward functions; nan where none applies
    rewards      [S, F] of each reward function; nan where it does not apply
    passed       [S] 1 where the completion passes, 0 where not; nan where the deciding reward does not apply
    lengths      [S] tokens of each completion
    group_ids    [S] int64, the prompt of each completion, sorted

All others are float32. A rank without prompts in a pass calls no `update`: a state that is a list has to be
of float32 and one axis, since that is what torchmetrics takes an empty one for.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from grpo_lightning.errors import ConfigError, choices

INPUTS = ("reward", "rewards", "passed", "lengths", "group_ids")
"""what `update` may ask for"""


class ColumnMean(MeanMetric):
    """The mean of one of the inputs over all completions; nan is left out.

    Args:
        column: its name.
        index: of its second axis, if it has one.
    """

    def __init__(self, column: str, index: int | None = None) -> None:
        super().__init__(nan_strategy="ignore")
        self.column, self.index = column, index

    def update(self, **columns: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Adds the completions of a batch."""
        values = columns[self.column]
        super().update(values if self.index is None else values[:, self.index])


class PassAtK(Metric):
    """The probability that at least one of k completions of a prompt passes, a mean over prompts.

    Unbiased from n >= k completions of which c pass: 1 - C(n - c, k) / C(n, k) (2107.03374). A prompt with
    fewer completions that could be judged is left out.

    Args:
        k: at least 1, at most `rollout.validation.num_generations`.
    """

    total: Tensor
    prompts: Tensor

    def __init__(self, k: int) -> None:
        super().__init__()
        if k < 1:
            raise ConfigError(f"PassAtK.k is {k}; it must be at least 1")
        self.k = k
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("prompts", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, passed: Tensor, group_ids: Tensor) -> None:
        """Adds the prompts of a batch."""
        known = ~passed.isnan()
        zeros = passed.new_zeros(int(group_ids.max()) + 1 if len(group_ids) else 0, dtype=torch.float64)
        n = zeros.index_add(0, group_ids[known], torch.ones_like(passed[known], dtype=torch.float64))
        c = zeros.index_add(0, group_ids[known], passed[known].double())
        enough = n >= self.k
        n, failed = n[enough], (n - c)[enough]
        miss = torch.ones_like(n)
        for i in range(self.k):
            miss *= ((failed - i) / (n - i)).clamp(min=0)
        self.total += (1 - miss).sum().to(self.total.device)
        self.prompts += len(n)

    def compute(self) -> Tensor:
        """Returns the mean over prompts; nan where there is none."""
        return self.total / self.prompts


def check_metric(key: str, metric: Any, num_generations: int) -> None:
    """Raises ConfigError unless `metric` is one that a validation can update; before anything is sampled."""
    kind = type(metric).__name__
    if not isinstance(metric, Metric):
        raise ConfigError(f"{key} is a {kind}; it must be a torchmetrics.Metric that computes one number")
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for p in inspect.signature(metric.update).parameters.values():
        if p.kind in named and p.default is p.empty and p.name not in INPUTS:
            raise ConfigError(f"{key} ({kind}): its update asks for {choices(p.name, INPUTS)}")
    if isinstance(metric, PassAtK) and metric.k > num_generations:
        raise ConfigError(
            f"{key}: PassAtK.k is {metric.k}, but rollout.validation.num_generations is {num_generations}; "
            "raise it, or lower k"
        )


def inputs(
    scores: Any, lengths: list[int], group_sizes: list[int], judge: int, threshold: float
) -> dict[str, Tensor]:
    """Returns what `update` may ask for, of one batch with completions.

    Args:
        scores: `rewards.suite.Scores` of S completions.
        lengths: [S] tokens of each.
        group_sizes: [P] completions of each prompt.
        judge: which reward function decides whether a completion passes.
        threshold: what it has to reach.
    """
    rewards = torch.tensor(scores.values, dtype=torch.float64).reshape(len(lengths), -1)
    decides = rewards[:, judge]
    return {
        "reward": torch.tensor(scores.totals, dtype=torch.float32),
        "rewards": rewards.float(),
        "passed": torch.where(decides.isnan(), decides, (decides >= threshold).double()).float(),
        "lengths": torch.tensor(lengths, dtype=torch.float32),
        "group_ids": torch.arange(len(group_sizes)).repeat_interleave(torch.tensor(group_sizes)),
    }
