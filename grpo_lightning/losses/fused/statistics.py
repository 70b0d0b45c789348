"""What the loss kernel counts, and the statistics that are made of it: those of the torch twin, by name."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_lightning.losses import LossConfig
from grpo_lightning.losses.corrections import LEVELS, MODES
from grpo_lightning.metrics.reduce import Stat, mean, reduced


class Sums(NamedTuple):
    """Columns of a completion: sums over its tokens, `*_mean` over its length, and two extremes."""

    loss: Any
    policy: Any  # without the entropy bonus
    kl: Any
    entropy: Any
    low: Any
    high: Any
    clipped: Any
    mark: Any  # what the surrogate reports
    low_mean: Any
    high_mean: Any
    clipped_mean: Any
    mark_mean: Any
    off_policy: Any  # share of its tokens that the off-policy mask leaves out
    least_low: Any  # low_mean, or inf if there are no tokens
    most_high: Any


class Weighed(NamedTuple):
    """Columns of a completion about the engine's log-probabilities and the correction."""

    unknown: Any
    known: Any
    gap: Any
    error: Any
    c: Any
    c_squared: Any
    c_mean: Any
    dropped: Any
    dropped_whole: Any  # 1 if all of it is
    least_c: Any
    most_c: Any
    most_gap: Any


class Counts(NamedTuple):
    tokens: Any  # N
    completions: Any  # S
    present: Any  # completions with a token

    @classmethod
    def of(cls, lengths: Tensor, weights: Tensor | None) -> "Counts":
        """Returns the counts of completions [S] of which each stands for `weights` [S] of them."""
        if weights is None:
            return cls(int(lengths.sum()), len(lengths), int((lengths > 0).sum()))
        on = lengths.to(weights.device, non_blocking=True)
        return cls((weights * on).sum(), weights.sum(), (weights * (on > 0)).sum())


class Reported(NamedTuple):
    """The statistic of a surrogate."""

    name: str
    per_completion: bool


def statistics(
    columns: Tensor,
    counts: Counts,
    config: LossConfig,
    reported: Reported | None,
    has: set[str],
    weights: Tensor | None = None,
) -> dict[str, Stat]:
    """Returns the statistics of a micro-batch from `columns` [S, K], of `Sums` and then of `Weighed`.

    A maximum over nothing is -inf here, where the twin leaves it out; neither is logged.

    Args:
        columns: what the kernel wrote.
        counts: of the micro-batch; there is a token.
        config: resolved.
        reported: what the surrogate reports, if anything.
        has: which of kl, entropy, bonus and sampler there are.
        weights: [S], how many completions each stands for in means; the loss is of those that are there.
    """
    first = len(Sums._fields)
    own = columns.sum(0, dtype=torch.float64)
    total = own if weights is None else (columns * weights[:, None]).sum(0, dtype=torch.float64)
    parts = [total, columns.amin(0), columns.amax(0)]
    sums, least, most = (Sums(*x[:first].unbind()) for x in parts)
    token = config.ratio_level == "token"
    stats = {
        f"clip_ratio/{name}_mean": mean(each, counts.tokens) if token else mean(whole, counts.present)
        for name, each, whole in (
            ("low", sums.low, sums.low_mean),
            ("high", sums.high, sums.high_mean),
            ("region", sums.clipped, sums.clipped_mean),
        )
    }
    stats["clip_ratio/low_min"] = reduced("min", least.least_low)
    stats["clip_ratio/high_max"] = reduced("max", most.most_high)
    stats["loss"] = reduced("sum", own[Sums._fields.index("loss")])
    if reported is not None:
        per_completion = mean(sums.mark_mean, counts.present)
        stats[reported.name] = per_completion if reported.per_completion else mean(sums.mark, counts.tokens)
    optional = {
        "kl": ("kl", lambda: mean(sums.kl, counts.tokens)),
        "entropy": ("entropy", lambda: mean(sums.entropy, counts.tokens)),
        "policy_loss": ("bonus", lambda: reduced("sum", own[Sums._fields.index("policy")])),
        "off_policy/dropped_sequence_frac": (
            "off_policy",
            lambda: mean(sums.off_policy, counts.completions),
        ),
    }
    stats |= {name: make() for name, (what, make) in optional.items() if what in has}
    if "sampler" in has:
        stats |= _of_correction([x[first:] for x in parts], counts, config)
    return stats


def _of_correction(parts: list[Tensor], counts: Counts, config: LossConfig) -> dict[str, Stat]:
    """Returns those about the sampler from sums, minima and maxima of the columns of `Weighed`."""
    sums, least, most = (Weighed(*x.unbind()) for x in parts)
    n = counts.tokens
    stats = {
        "sampling/missing_logprob_frac": mean(sums.unknown, n),
        "sampling/sampling_logp_difference/mean": mean(sums.gap, sums.known),
        "sampling/sampling_logp_difference/max": reduced("max", most.most_gap),
        "sampling/prob_error": mean(sums.error, n),
        "sampling/ess": Stat("share", torch.stack([sums.c, sums.c_squared]), mean(0.0, n).weight),
        "sampling/dropped_token_frac": mean(sums.dropped, n),
        "sampling/dropped_sequence_frac": mean(sums.dropped_whole, counts.present),
    }
    correction = config.correction
    if correction.active:
        by_token = LEVELS[correction.level].per_token or MODES[str(correction.mode)].per_token
        name = "sampling/importance_sampling_ratio"
        stats[f"{name}/mean"] = mean(sums.c, n) if by_token else mean(sums.c_mean, counts.present)
        stats[f"{name}/min"] = reduced("min", least.least_c)
        stats[f"{name}/max"] = reduced("max", most.most_c)
    return stats
