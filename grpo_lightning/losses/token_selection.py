"""What a loss chooses once per optimizer step, over all ranks, from the numbers of the old policy.

A choice made per micro-batch would depend on how the work is split; these do not.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grpo_lightning.losses.completion_sums import Segments
from grpo_lightning.losses.config import LossConfig
from grpo_lightning.packing.batch import RolloutBatch

Gather = Callable[[Any], list[Any]]
"""returns the item of every rank, in rank order"""


ROUNDING = 1e-4
"""what counts as equal: the first tokens of a group share a context, and their numbers differ by rounding
alone, which depends on how a rollout is split"""


def choose_tokens(
    micro_batches: Sequence[RolloutBatch], config: LossConfig, *, seed: int, gather: Gather, rank: int = 0
) -> list[RolloutBatch]:
    """Returns the micro-batches of one optimizer step with the selections that `config` asks for.

    Args:
        micro_batches: on the host, in order, with `old_logprobs` and `old_entropies`.
        config: the recipe.
        seed: of the random selection of clip_cov.
        gather: over ranks.
        rank: of this process.
    """
    config = config.resolve()
    sizes = [len(p.target_ids) for p in micro_batches]
    fields: dict[str, Tensor] = {}
    normalizers = micro_batches[0].normalizers
    if config.surrogate_row.needs_old:
        fields["selected"] = _select(
            micro_batches, config, seed + max(p.newest_version for p in micro_batches), gather, rank
        )
    if config.top_entropy_quantile < 1:
        entropies = torch.cat([require(p.old_entropies) for p in micro_batches])
        everything = torch.cat(gather(entropies))
        keep = entropies >= quantile(everything, 1 - config.top_entropy_quantile) - ROUNDING
        normalizers = replace(normalizers, entropy_tokens=sum(gather(int(keep.sum()))))
        fields["entropy_keep"] = keep
    pieces = {name: torch.split(mask, sizes) for name, mask in fields.items()}
    return [
        replace(p, normalizers=normalizers, **{name: piece[i] for name, piece in pieces.items()})
        for i, p in enumerate(micro_batches)
    ]


def reference_gap(batch: RolloutBatch) -> Tensor:
    """Returns the sum over each completion [S] of old minus reference log-probability, in nats (k1)."""
    return Segments.of(batch).sum(require(batch.old_logprobs) - require(batch.ref_logprobs))


def require(x: Tensor | None) -> Tensor:
    """Returns `x`, which the pass without gradient has to have left."""
    if x is None:
        raise ValueError("the optimizer step's batch was not scored by the old policy")
    return x


def _select(
    micro_batches: Sequence[RolloutBatch], config: LossConfig, seed: int, gather: Gather, rank: int
) -> Tensor:
    """Returns the tokens [N] of this rank that clip_cov or kl_cov selects, by covariance of A and l_old."""
    advantages = torch.cat([p.advantages for p in micro_batches]).double()
    old = torch.cat([require(p.old_logprobs) for p in micro_batches]).double()
    sums = torch.stack([advantages.sum(), old.sum(), torch.tensor(float(len(old)), dtype=torch.float64)])
    counts = gather(sums)
    mean_a, mean_l, total = torch.stack(counts).sum(0)
    covariance = (advantages - mean_a / total.clamp(min=1)) * (old - mean_l / total.clamp(min=1))
    count = max(1, int(config.cov_frac * int(total)))
    if not config.surrogate_row.picks_at_random:
        return _largest((covariance / ROUNDING).round(), count, gather, rank)
    before = int(sum(float(c[2]) for c in counts[:rank]))
    order = -hashed(torch.arange(before, before + len(old)), seed)
    inside = (covariance > config.cov_low) & (covariance < config.cov_high)
    order = torch.where(inside, order, -torch.inf)
    return _largest(order, count, gather, rank)


def _largest(x: Tensor, k: int, gather: Gather, rank: int) -> Tensor:
    """Returns which of this rank's finite values are among the k largest of all ranks; of equal ones the
    first."""
    mine = x[torch.isfinite(x)]
    best = torch.cat(gather(mine.topk(min(k, len(mine))).values))
    if not len(best):
        return torch.zeros_like(x, dtype=torch.bool)
    edge = best.topk(min(k, len(best))).values[-1]
    above, equal = x > edge, x == edge
    counts = gather((int(above.sum()), int(equal.sum())))
    left = min(k, len(best)) - sum(a for a, _ in counts) - sum(n for _, n in counts[:rank])
    return above | (equal & (equal.cumsum(0) <= left))


def quantile(x: Tensor, q: float) -> Tensor:
    """Returns the quantile with linear interpolation; `torch.quantile` takes no more than 2^24 values."""
    if not len(x):
        return x.new_tensor(0.0)
    ordered = x.sort().values
    place = q * (len(x) - 1)
    low = int(place)
    high = min(low + 1, len(x) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def hashed(position: Tensor, seed: int) -> Tensor:
    """Returns a number in [0, 1) per position, a function of it and the seed alone (splitmix64 in int64)."""

    def shift(v: Tensor, bits: int) -> Tensor:
        return (v >> bits) & ((1 << (64 - bits)) - 1)

    x = position * -7046029254386353131 + (seed * 0x9E3779B97F4A7C15 + 1) % (1 << 63)
    x = (x ^ shift(x, 30)) * -4658895280553007687
    x = (x ^ shift(x, 27)) * -7723592293110705685
    return shift(x ^ shift(x, 31), 11).double() / (1 << 53)
