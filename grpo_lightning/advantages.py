"""Advantages: how much better a completion is than its group. `ADVANTAGES` is the table of ways to say so.

Computed once per rollout in float64 on whole groups, which never span ranks; `all_sum` adds over ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_lightning.errors import ConfigError, choices

EPS = 1e-4
"""added to every standard deviation (TRL's)"""


def _identity(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTable:
    """The rewards of one rollout, as the rows of `ADVANTAGES` see them."""

    by_function: Tensor  # [S, K] float64; NaN: the function does not apply to this completion
    weights: Tensor  # [K] float64
    group_ids: Tensor  # [S] int64 in [0, P)
    num_groups: int
    penalty: Tensor | None = None  # [S] float64, taken off the total
    lengths: Tensor | None = None  # [S] tokens sampled; what weighs completions by their length needs it
    all_sum: Callable[[Tensor], Tensor] = _identity  # adds over ranks

    @property
    def total(self) -> Tensor:
        """[S] float64: weighted sum over the functions that apply; NaN where none does."""
        applies = ~self.by_function.isnan()
        total = (self.by_function.nan_to_num() * self.weights).sum(1)
        total = total if self.penalty is None else total - self.penalty
        return total.masked_fill(~applies.any(1), torch.nan)

    @property
    def sampled(self) -> Tensor:
        """[S] float64: tokens of each completion."""
        if self.lengths is None:
            raise ValueError("this advantage weighs completions by their length: give `lengths`")
        return self.lengths.double()

    def group_sum(self, x: Tensor) -> Tensor:
        """[S] -> [P], skipping NaN."""
        return x.new_zeros(self.num_groups).index_add(0, self.group_ids, x.nan_to_num())

    def group_count(self, x: Tensor) -> Tensor:
        """[S] -> [P]: members that are not NaN."""
        return self.group_sum((~x.isnan()).to(x.dtype))

    def centred(self, x: Tensor) -> Tensor:
        """[S] -> [S]: less the group's mean over scorable members."""
        return x - (self.group_sum(x) / self.group_count(x).clamp(min=1))[self.group_ids]

    def group_std(self, x: Tensor) -> Tensor:
        """[S] -> [P], one degree of freedom less; 0 in groups with fewer than two scorable members."""
        squares = self.group_sum(self.centred(x) ** 2)
        return (squares / (self.group_count(x) - 1).clamp(min=1)).sqrt()

    def rollout_moments(self, x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """[S] -> mean, variance with one degree of freedom less, and weight of all ranks; NaN left out."""
        known = ~x.isnan()
        w = known.to(x.dtype) if weights is None else weights * known
        x = x.nan_to_num()
        total, count = self.all_sum(torch.stack([(w * x).sum(), w.sum()]))
        centre = total / count.clamp(min=1)
        squares = self.all_sum((w * (x - centre) ** 2).sum().reshape(1))[0]
        return centre, squares / (count - 1).clamp(min=1), count

    def constant_groups(self, x: Tensor) -> Tensor:
        """[S] -> [P] bool: fewer than two scorable members, or all of them equal."""
        far = x.new_full((self.num_groups,), torch.inf)
        high = (-far).scatter_reduce(0, self.group_ids, x.nan_to_num(-torch.inf), "amax")
        low = far.scatter_reduce(0, self.group_ids, x.nan_to_num(torch.inf), "amin")
        return high <= low

    def zero_variance_groups(self, name: str) -> set[int]:
        """Returns the groups whose rewards say nothing about their members, in the way `name` reads them."""
        silent = ADVANTAGES[name].constant(self)
        return {g for g in range(self.num_groups) if silent[g]}


def _constant_total(r: RewardTable) -> Tensor:
    return r.constant_groups(r.total)


def _constant_columns(r: RewardTable) -> Tensor:
    return torch.stack([r.constant_groups(column) for column in r.by_function.unbind(1)]).all(0)


@dataclass(frozen=True, slots=True)
class Advantage:
    """A row of `ADVANTAGES`."""

    compute: Callable[[RewardTable], Tensor]
    formula: str
    paper: str
    zero_variance_is_zero: bool = True
    constant: Callable[[RewardTable], Tensor] = _constant_total
    """[P] bool: groups without signal"""
    uses_total: bool = True
    """reads the sum of the rewards, so that a penalty on it acts"""


ADVANTAGES: dict[str, Advantage] = {}


def register_advantage(
    name: str, *, formula: str, paper: str = "", **flags: Any
) -> Callable[[Callable[[RewardTable], Tensor]], Callable[[RewardTable], Tensor]]:
    """Returns a decorator that adds `(RewardTable) -> [S] float64` to the table."""

    def add(compute: Callable[[RewardTable], Tensor]) -> Callable[[RewardTable], Tensor]:
        ADVANTAGES[name] = Advantage(compute, formula, paper, **flags)
        return compute

    return add


@register_advantage("group_norm", formula="(R - mean_group) / (std_group + eps)", paper="2402.03300")
def group_norm(r: RewardTable) -> Tensor:
    """Returns rewards whitened within their group (GRPO)."""
    return r.centred(r.total) / (r.group_std(r.total)[r.group_ids] + EPS)


@register_advantage("batch_norm", formula="(R - mean_group) / (std_rollout + eps)", paper="2508.08221")
def batch_norm(r: RewardTable) -> Tensor:
    """Returns rewards centred in their group and scaled by the spread of the whole rollout."""
    return r.centred(r.total) / (r.rollout_moments(r.total)[1].sqrt() + EPS)


@register_advantage("group_mean", formula="R - mean_group", paper="2503.20783")
def group_mean(r: RewardTable) -> Tensor:
    """Returns rewards centred in their group, not scaled (Dr. GRPO)."""
    return r.centred(r.total)


@register_advantage("leave_one_out", formula="R - mean of the others in the group", paper="2402.14740")
def leave_one_out(r: RewardTable) -> Tensor:
    """Returns rewards less the mean of the other members (RLOO)."""
    n = r.group_count(r.total)[r.group_ids]
    return r.centred(r.total) * n / (n - 1).clamp(min=1)


@register_advantage(
    "gdpo",
    formula="each reward normalised in the group, summed, normalised in the rollout",
    paper="2601.05242",
    constant=_constant_columns,
    uses_total=False,
)
def gdpo(r: RewardTable) -> Tensor:
    """Returns summed z-scores per function, whitened over the rollout; constant columns give 0."""
    total = torch.zeros_like(r.total)
    for k in range(r.by_function.shape[1]):
        x = r.by_function[:, k]
        z = r.centred(x) / (r.group_std(x)[r.group_ids] + EPS)
        z = z.masked_fill(r.constant_groups(x)[r.group_ids], 0.0)
        total = total + r.weights[k] * z.nan_to_num()
    total = total.masked_fill(r.total.isnan(), torch.nan)
    centre, variance, _ = r.rollout_moments(total)
    return (total - centre) / (variance.sqrt() + EPS)


@register_advantage(
    "maxrl", formula="(R - mean_group) / mean_group where that is positive, else 0", paper="2602.02710"
)
def maxrl(r: RewardTable) -> Tensor:
    """Returns rewards relative to the group's mean; meant for rewards >= 0."""
    centre = (r.group_sum(r.total) / r.group_count(r.total).clamp(min=1))[r.group_ids]
    return torch.where(centre > 0, r.centred(r.total) / centre.clamp(min=torch.finfo(centre.dtype).tiny), 0.0)


@register_advantage(
    "pass_at_k", formula="best of the group: (R_1 - R_2) / (std_group + eps); others 0", paper="2503.19595"
)
def pass_at_k(r: RewardTable) -> Tensor:
    """Returns the lead of the best completion over the second; 0 for a tie and for all others."""
    known = r.total.nan_to_num(-torch.inf)
    low = known.new_full((r.num_groups,), -torch.inf)
    best = low.scatter_reduce(0, r.group_ids, known, "amax")[r.group_ids]
    is_best = known == best
    second = low.scatter_reduce(0, r.group_ids, known.masked_fill(is_best, -torch.inf), "amax")[r.group_ids]
    alone = is_best & (r.group_sum(is_best.to(known.dtype))[r.group_ids] == 1) & second.isfinite()
    lead = (known - second) / (r.group_std(r.total)[r.group_ids] + EPS)
    return torch.where(alone, lead, 0.0)


@register_advantage(
    "reinforce_pp",
    formula="R - mean_group, whitened over the rollout's tokens",
    paper="2501.03262",
    zero_variance_is_zero=False,
)
def reinforce_pp(r: RewardTable) -> Tensor:
    """Returns centred rewards whitened with every completion weighing its tokens (REINFORCE++-baseline)."""
    c = r.centred(r.total)
    centre, variance, tokens = r.rollout_moments(c, r.sampled)
    return torch.where(tokens > 1, (c - centre) / (variance + 1e-8).sqrt(), 0.0)


@register_advantage("opo", formula="R - sum(L R) / sum(L) over the group", paper="2505.23585")
def opo(r: RewardTable) -> Tensor:
    """Returns rewards less the group's length-weighted mean; without any token, less the plain mean."""
    tokens = r.sampled * ~r.total.isnan()
    weight = r.group_sum(tokens)
    baseline = r.group_sum(tokens * r.total.nan_to_num()) / weight.clamp(min=1)
    return torch.where(weight[r.group_ids] > 0, r.total - baseline[r.group_ids], r.centred(r.total))


@register_advantage("gpg", formula="(R - mean_group) n_all / n_in_groups_with_variance", paper="2504.02546")
def gpg(r: RewardTable) -> Tensor:
    """Returns centred rewards, scaled up by how few completions are in groups with variance."""
    known = ~r.total.isnan()
    alive = known & ~r.constant_groups(r.total)[r.group_ids]
    everything, live = r.all_sum(torch.stack([known.sum(), alive.sum()]).double())
    return r.centred(r.total) * everything / live.clamp(min=1)


def compute_advantages(
    name: str, rewards: RewardTable, *, clip: tuple[float | None, float | None] | None = None
) -> Tensor:
    """Returns advantages [S] float32, finite whatever comes in.

    Unscorable completions get 0. Groups without variance get 0 by assignment: subtracting
    a rounded mean leaves a residue that the division by `eps` would blow up.

    Args:
        name: a row of `ADVANTAGES`.
        rewards: the rewards of whole groups.
        clip: lowest and highest advantage, either may be None.

    Raises:
        ConfigError: `name` is not in the table.
    """
    if name not in ADVANTAGES:
        raise ConfigError(f"rollout.advantage is {choices(name, ADVANTAGES)}")
    row = ADVANTAGES[name]
    total = rewards.total
    out = row.compute(rewards).masked_fill(total.isnan(), 0.0)
    if row.zero_variance_is_zero:
        out = out.masked_fill(row.constant(rewards)[rewards.group_ids], 0.0)
    if clip is not None:
        out = out.clamp(*clip)
    return out.float()
