"""Aggregations: the weight of each token, from the counts of an optimizer step. `loss = sum_n w_n l_n`."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from grpo_lightning.losses.completion_sums import Segments
from grpo_lightning.packing.batch import Normalizers


@dataclass(frozen=True, slots=True)
class Aggregation:
    """A row of `AGGREGATIONS`; `divisors(segments, normalizers) -> [S] float64`."""

    divisors: Callable[[Segments, Normalizers], Tensor]
    formula: str
    split_invariant: bool = True
    per_token: bool = False
    """whether a completion weighs more the longer it is"""

    def weights(self, segments: Segments, normalizers: Normalizers) -> Tensor:
        """Returns w [N] float64; every token of a completion weighs the same."""
        return segments.spread(self.per_completion(segments, normalizers))

    def per_completion(self, segments: Segments, normalizers: Normalizers) -> Tensor:
        """Returns the weight [S] float64 of each token of a completion."""
        return 1 / self.divisors(segments, normalizers).clamp(min=1)


def _constant(s: Segments, divisor: float) -> Tensor:
    return s.lengths.double().fill_(divisor)


AGGREGATIONS: dict[str, Aggregation] = {
    "sequence_mean": Aggregation(lambda s, t: s.lengths.double() * t.sequences, "1 / (L_s S_w)"),
    "token_mean": Aggregation(lambda s, t: _constant(s, t.tokens), "1 / N_w", per_token=True),
    "constant": Aggregation(
        lambda s, t: _constant(s, t.sequences * t.max_tokens), "1 / (S_w L_max)", per_token=True
    ),
    "sequence_sum": Aggregation(lambda s, t: _constant(s, t.sequences), "1 / S_w"),
    "prompt_mean": Aggregation(
        lambda s, t: s.group_tokens[s.groups].double() * t.groups, "1 / (N_group P_w)"
    ),
    "microbatch_token_mean": Aggregation(
        lambda s, t: (
            _constant(s, float(s.ids.numel())).clamp(min=1) * max(t.micro_batches - t.empty_micro_batches, 1)
        ),
        "1 / (N M), N of this micro-batch, M of them with tokens",
        split_invariant=False,
        per_token=True,
    ),
}
