"""Sums over the completions of a packed micro-batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_lightning.metrics.reduce import Stat, mean
from grpo_lightning.packing.batch import RolloutBatch


@dataclass(frozen=True, slots=True)
class Segments:
    """Which completion each of N tokens belongs to, and which group each of S completions."""

    ids: Tensor  # [N] int64, sorted
    lengths: Tensor  # [S] int64, 0 is legal
    groups: Tensor  # [S] int64
    group_tokens: Tensor  # [P] int64, of the optimizer step
    weights: Tensor | None = None  # [S], how many completions each stands for in metrics

    @classmethod
    def of(cls, batch: RolloutBatch) -> "Segments":
        """Returns the segments of a micro-batch."""
        lengths = torch.tensor(batch.lengths, dtype=torch.int64, device=batch.sequence_ids.device)
        return cls(batch.sequence_ids, lengths, batch.group_ids, batch.group_tokens, batch.sample_weights)

    def sum(self, x: Tensor) -> Tensor:
        """[N] -> [S]. A reduction over runs: a repeat gives the same bits on every device."""
        if self.lengths.numel() == 0:
            return x.new_zeros(0) + x.sum()
        return torch.segment_reduce(x, "sum", lengths=self.lengths, initial=0.0, unsafe=True)

    def mean(self, x: Tensor) -> Tensor:
        """[N] -> [S]; 0 for an empty completion."""
        return self.sum(x) / self.lengths.clamp(min=1)

    def token_mean(self, x: Tensor, among: Tensor | None = None) -> Stat:
        """[N] -> the mean over all sampled tokens, or over those of them `among` [N] bool."""
        return _weighted(x, among, None if self.weights is None else self.spread(self.weights))

    def completion_mean(self, y: Tensor, among: Tensor | None = None) -> Stat:
        """[S] -> the mean over all completions, or over those of them `among` [S] bool."""
        return _weighted(y, among, self.weights)

    def spread(self, y: Tensor) -> Tensor:
        """[S] -> [N]: each token gets its completion's value."""
        return y[self.ids]

    def group_sum(self, y: Tensor) -> Tensor:
        """[S] -> [P]."""
        if y.numel() == 0:
            return y.new_zeros(self.group_tokens.shape) + y.sum()
        counts = torch.bincount(self.groups, minlength=self.group_tokens.numel())
        return torch.segment_reduce(y, "sum", lengths=counts, initial=0.0, unsafe=True)

    def discounted_rest(self, x: Tensor, gamma: float) -> Tensor:
        """[N] -> [N]: sum over m >= n of the same completion of gamma^(m - n) x_m, in log2 N steps."""
        out, step = x, 1
        longest = int(self.lengths.max()) if self.lengths.numel() else 0
        while step < longest:
            same = self.ids[step:] == self.ids[:-step]
            ahead = torch.zeros_like(out)
            ahead[:-step] = torch.where(same, out[step:], 0.0)
            out, step = out + gamma**step * ahead, step * 2
        return out


def _weighted(x: Tensor, among: Tensor | None, weights: Tensor | None) -> Stat:
    """Returns the mean of x, each entry counted as often as its weight says; 1 where there are none."""
    if weights is None:
        x = x if among is None else x[among]
        return mean(x.sum(), x.numel())
    weights = weights.to(x.dtype if x.is_floating_point() else torch.float32)
    weights = weights if among is None else weights * among
    return mean((weights * x if among is None else weights * torch.where(among, x, 0)).sum(), weights.sum())
