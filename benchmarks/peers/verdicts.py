"""Where a peer and we differ on purpose, and what becomes of a comparison that does or does not agree.

A reason names the cells it explains: a difference in any other cell fails, and so does a cell that has a
reason and does not differ. What the reasons say about us is in docs/losses.md under `where`; an empty `where`
means that the page written by conformance.py is where it is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from peers import cells as c

FROM_TRL = "What changes when you come from TRL"


@dataclass(frozen=True)
class Reason:
    """A departure: which comparisons show it, and whether in the value, in the gradient or in both."""

    key: str
    text: str
    where: str
    holds: Callable[[Any, str], bool]
    """(what was compared, how it was split or which metric) -> whether it must differ"""
    shows: str = "value and gradient"  # or one of them, or "refusal"


@dataclass
class Row:
    """The outcome of one comparison: the largest differences over the seeds, and what they mean."""

    what: Any
    split: str
    value: float = 0.0
    grad: float = 0.0
    refused_by: str = ""
    reasons: list[str] = field(default_factory=list)
    verdict: str = ""

    @property
    def name(self) -> str:
        """What is printed where it fails."""
        return f"{self.what.name} [{self.split}]"

    @property
    def fails(self) -> bool:
        """Whether it must be looked at."""
        return self.verdict in ("undocumented", "stale reason")


def judge(row: Row, reasons: Iterable[Reason], tolerance: float, *, each: bool = True) -> Row:
    """Fills in the verdict; without `each`, a reason need not show in every cell that it names."""
    kind = [r for r in reasons if (r.shows == "refusal") == bool(row.refused_by)]
    mine = [r for r in kind if r.holds(row.what, row.split)]
    row.reasons = [r.key for r in mine]
    if row.refused_by:
        fine = row.refused_by == "TRL and us" or bool(mine)
        row.verdict = f"refused by {row.refused_by}" if fine else "undocumented"
        return row
    # `not <=` so that NaN differs.
    value, grad = not row.value <= tolerance, not row.grad <= tolerance
    if not mine:
        row.verdict = "undocumented" if value or grad else "equal"
    elif not (value or grad):
        row.verdict = "stale reason" if each else "equal"
        row.reasons = row.reasons if each else []
    elif value and not any("value" in r.shows for r in mine):
        row.verdict = "undocumented"
    else:
        row.verdict = "documented"
    return row


def _level(loss: str) -> Callable[[c.Cell, str], bool]:
    return lambda x, split: x.loss == loss and x.level == "sequence" and x.beta != 0


def _sapo_level(x: c.Cell, split: str) -> bool:
    uneven = x.beta != 0 or (x.mode is not None and x.mode.startswith("token"))
    return x.loss == "sapo" and x.level == "sequence" and uneven


def _cut(x: c.Cell, split: str) -> bool:
    """Whether TRL's numbers depend on how it cuts an optimizer step."""
    return split in ("halves", "other parts")


def _emptied(x: c.Cell, name: str) -> bool:
    """Whether TRL takes the mean over completions, and some have lost all their tokens."""
    per_completion = {
        "vespo/phi_seq_mean": True,
        "sampling/importance_sampling_ratio/mean": x.mode is not None and x.mode.startswith("sequence"),
        **{f"clip_ratio/{k}_mean": x.level == "sequence" for k in ("low", "high", "region")},
    }
    return x.extra.name == c.TRUNCATED and per_completion.get(name, False)


TRL_REASONS = (
    Reason(
        "cispo-level",
        "`cispo` takes `sequence_token` in place of TRL's `sequence`. Its weight carries no gradient, so "
        "the two agree, except where the ratio corrects the KL term: here it passes its gradient to its "
        "own token, in TRL to every token of the completion.",
        "Surrogates",
        _level("cispo"),
        "gradient",
    ),
    Reason(
        "sapo-level",
        "`sapo` takes `sequence_token` in place of TRL's `sequence`. The value is the same, and so is the "
        "gradient while what multiplies the ratio is equal inside a completion; per-token sampler weights "
        "and the bias-corrected KL are not.",
        "Surrogates",
        _sapo_level,
        "gradient",
    ),
    Reason(
        "vespo-level",
        "`vespo` has the level `token` only: its weight is that of the whole completion whatever the "
        "level, and TRL's option changes nothing but the ratio that corrects the KL term (TRL warns). "
        "Compared with `token` here.",
        "Surrogates",
        _level("vespo"),
    ),
    Reason(
        "bnpo-split",
        "`bnpo` is a mean over the tokens of a micro-batch, here and in TRL: cut in other places, it is "
        "another loss. It is the only recipe here whose gradient depends on the cut.",
        "Aggregations",
        lambda x, split: x.loss == "bnpo" and split == "other parts",
    ),
    Reason(
        "step-count",
        "A rollout that feeds several optimizer steps: TRL divides each step by the rollout's tokens over "
        "the number of steps, we by the tokens of that step.",
        FROM_TRL,
        lambda x, split: x.loss in ("dapo", "cispo", "vespo") and split == "two steps",
    ),
    Reason(
        "entropy-mean",
        "The entropy bonus is a mean over the tokens of the optimizer step here, the mean over "
        "micro-batches of their means in TRL.",
        FROM_TRL,
        lambda x, split: c.BONUS in x.extra.name and _cut(x, split),
    ),
    Reason(
        "top-entropy-cut",
        "`top_entropy_quantile` selects once per optimizer step here, once per micro-batch in TRL.",
        FROM_TRL,
        lambda x, split: x.extra.name.startswith(c.TOP) and _cut(x, split),
    ),
    Reason(
        "top-entropy-old",
        "`top_entropy_quantile` looks at the entropies of the old policy here, at the current ones in TRL:"
        " the selection agrees until the first update.",
        FROM_TRL,
        lambda x, split: x.extra.name == c.MOVED,
    ),
    Reason(
        "log-ratio-clamp",
        "Log-ratios are clamped to ±20 here before anything is computed from them; TRL's are not. In "
        "`cispo`, `sapo` and `vespo` it shows through the bias-corrected KL alone.",
        FROM_TRL,
        lambda x, split: x.extra.name == c.FAR_RATIO,
    ),
    Reason(
        "reference-clamp",
        "The log-ratio to the reference is clamped to ±20 too.",
        FROM_TRL,
        lambda x, split: x.extra.name == c.FAR_REFERENCE,
    ),
    Reason(
        "off-policy-missing",
        "`off_policy_mask_threshold` on a completion whose log-probs the engine did not report: TRL counts"
        " such a token as not moved, we take the old policy's log-prob in place of the engine's, because "
        "the policy has moved there too.",
        FROM_TRL,
        lambda x, split: x.extra.name == c.UNREPORTED,
    ),
    Reason(
        "low-delta",
        "A `delta` of at most 1 + epsilon_high is an error here: it would also cut what positive advantages "
        "gain.",
        FROM_TRL,
        lambda x, split: x.extra.name == c.LOW_DELTA,
        "refusal",
    ),
    Reason(
        "low-cap",
        "`cispo` takes its cap from `cispo_weight_max`, at least 1. TRL takes it from `epsilon_high`, whose "
        "default of 0.2 caps every weight at 0.2.",
        FROM_TRL,
        lambda x, split: x.extra.name == c.LOW_CAP,
        "refusal",
    ),
)

METRIC_REASONS = (
    Reason(
        "metric-vespo-kl",
        "`kl` of `vespo` at TRL's level `sequence`: the bias correction's ratio, see above.",
        "Surrogates",
        lambda x, name: name == "kl" and _level("vespo")(x, name) and x.extra.name != "no old pass",
        "value",
    ),
    Reason(
        "metric-clamp",
        "`kl` beyond the clamps.",
        FROM_TRL,
        lambda x, name: name == "kl" and x.extra.name in (c.FAR_RATIO, c.FAR_REFERENCE),
        "value",
    ),
    Reason(
        "metric-emptied",
        "Means over completions leave out those without a trainable token; TRL counts a truncated and "
        "masked completion as not clipped, and its weights as 1.",
        FROM_TRL,
        _emptied,
        "value",
    ),
)

ADVANTAGE_REASONS = (
    Reason(
        "zero-variance",
        "Members of a group with equal rewards get exactly 0 here. TRL subtracts a mean rounded to float32"
        " and divides by 1e-4: up to 5e-3 is left where the mean is not exact.",
        FROM_TRL,
        lambda x, split: (
            x.table == "equal rewards" and x.row in ("group_norm", "gdpo") and x.width == "float32"
        ),
        "value",
    ),
)

LIGER_REASONS = (
    Reason(
        "liger-level",
        "Liger refuses `sequence` for `cispo`, `sapo` and `vespo`.",
        "Surrogates",
        lambda x, split: x.level == "sequence" and x.loss in ("cispo", "sapo", "vespo"),
        "refusal",
    ),
    Reason(
        "liger-luspo",
        "Liger's `luspo` weighs every position, padding included, by length / (completions × padded width)"
        " once anything in it is per token: the level `token`, a KL term, or sampler weights per token. "
        "Padding then has a value and a gradient, and the loss depends on the width. TRL 1.16 masks and "
        "sums, as we do.",
        "",
        lambda x, split: x.loss == "luspo" and (x.level == "token" or x.beta != 0 or x.ratio == "token"),
    ),
)
