"""Aggregations: the weight of each token, from the counts of the whole window. `loss = sum_n w_n l_n`."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from grpo_lightning.batch import LossTotals
from grpo_lightning.losses.segments import Segments


@dataclass(frozen=True, slots=True)
class Aggregation:
    """A row of `AGGREGATIONS`; `weights(segments, totals) -> [N] float32`."""

    weights: Callable[[Segments, LossTotals], Tensor]
    formula: str
    split_invariant: bool = True


def _per_sequence(x: Tensor, s: Segments) -> Tensor:
    return s.spread(x.float())


AGGREGATIONS: dict[str, Aggregation] = {
    "sequence_mean": Aggregation(
        lambda s, t: _per_sequence(1.0 / (s.lengths.clamp(min=1) * max(t.sequences, 1)), s), "1 / (L_s S_w)"
    ),
    "token_mean": Aggregation(
        lambda s, t: _per_sequence(s.lengths.new_ones(s.lengths.shape) / max(t.tokens, 1), s), "1 / N_w"
    ),
    "constant": Aggregation(
        lambda s, t: _per_sequence(
            s.lengths.new_ones(s.lengths.shape) / (max(t.sequences, 1) * t.max_tokens), s
        ),
        "1 / (S_w L_max)",
    ),
    "sequence_sum": Aggregation(
        lambda s, t: _per_sequence(s.lengths.new_ones(s.lengths.shape) / max(t.sequences, 1), s), "1 / S_w"
    ),
    "prompt_mean": Aggregation(
        lambda s, t: _per_sequence(1.0 / (s.group_tokens.clamp(min=1)[s.groups] * max(t.groups, 1)), s),
        "1 / (N_group P_w)",
    ),
    "microbatch_token_mean": Aggregation(
        lambda s, t: _per_sequence(
            s.lengths.new_ones(s.lengths.shape) / (s.lengths.sum().clamp(min=1) * t.micro_batches), s
        ),
        "1 / (N K W), N of this micro-batch",
        split_invariant=False,
    ),
}
