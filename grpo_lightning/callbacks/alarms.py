"""The alarms of `Health`: what each looks at, from where on it speaks, and what to do then."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, quantiles, variance
from typing import Any, NamedTuple

FIRST, LATEST = 20, 100
"""values of a metric that are remembered: of the start of the run, and of now"""


class Curve:
    """The first and the latest values of a metric."""

    def __init__(self, first: Iterable[float] = (), latest: Iterable[float] = (), count: int = 0) -> None:
        self.first, self.latest, self.count = list(first), list(latest), count

    def add(self, value: float) -> None:
        """Appends a value."""
        if len(self.first) < FIRST:
            self.first.append(value)
        self.latest = [*self.latest[1 - LATEST :], value]
        self.count += 1

    def start(self, n: int) -> float:
        """Returns the mean of the first n."""
        return fmean(self.first[:n])

    def now(self, n: int) -> float:
        """Returns the mean of the latest n."""
        return fmean(self.latest[-n:])


class History:
    """The curves of a run, by the name of the metric."""

    def __init__(self) -> None:
        self.curves: dict[str, Curve] = {}

    def add(self, values: Mapping[str, Any]) -> None:
        """Appends those values that alarms look at."""
        for name in WATCHED & values.keys():
            self.curves.setdefault(name, Curve()).add(float(values[name]))

    def of(self, name: str, at_least: int = 1) -> Curve | None:
        """Returns a curve if it has as many values."""
        curve = self.curves.get(name)
        return curve if curve is not None and curve.count >= at_least else None

    def now(self, name: str, n: int = 1) -> float:
        """Returns the mean of the latest n values; NaN without any."""
        curve = self.of(name)
        return float("nan") if curve is None else curve.now(n)


class Alarm(NamedTuple):
    """Speaks while `statistic` is at `limit` or above it."""

    statistic: Callable[[History], float | None]
    """None: too little is known"""
    limit: float
    measures: str
    """what the statistic is, for the table of the docs"""
    says: Callable[[History, float], str]
    means: str
    remedy: str


def _no_signal(h: History) -> float | None:
    curve = h.of("health/signal")
    if curve is None:
        return None
    dead = 0
    for value in reversed(curve.latest):
        if value > 0:
            break
        dead += 1
    return float(dead)


def _why_no_signal(h: History, value: float) -> str:
    if h.now("rewards/unscorable_frac") == 1:
        why = "every reward function returned None"
    elif h.now("completions/clipped_ratio") == 1:
        why = f"every completion is cut at max_tokens, reward {h.now('reward'):.3g}"
    else:
        why = f"rewards are equal within every group, {h.now('reward'):.3g} on average"
    return f"no completion has had a learning signal for {value:.0f} rollouts: {why}"


def _mean_of(name: str, n: int) -> Callable[[History], float | None]:
    def statistic(h: History) -> float | None:
        return None if h.of(name, n) is None else h.now(name, n)

    return statistic


def _reward_rose(h: History) -> bool:
    """Whether reward is above its start by half of what it differs by within a group."""
    reward, spread = h.of("reward", FIRST), h.of("reward_std")
    if reward is None or spread is None:
        return False
    return reward.now(10) - reward.start(10) > 0.5 * spread.start(10)


def _entropy_fall(h: History) -> float | None:
    curve = h.of("entropy", FIRST)
    if curve is None or curve.start(5) < 0.01 or _reward_rose(h):
        return None
    return curve.start(5) / max(curve.now(5), 1e-9)


def _length_factor(h: History) -> float | None:
    curve = h.of("completions/mean_length", FIRST)
    if curve is None or _reward_rose(h):
        return None
    start, now = max(curve.start(10), 1.0), max(curve.now(10), 1.0)
    return max(start / now, now / start)


def _truncated(h: History) -> float | None:
    name = "completions/clipped_ratio"
    return None if _reward_rose(h) or not h.of(name, 5) else h.now(name, 5)


def _dropped(h: History) -> float | None:
    return max((h.now(name, 5) for name in DROPS if h.of(name, 5)), default=None)


def _spikes(h: History) -> float | None:
    """Not by the median: where few groups are live, as in a run that has learned, most norms are tiny."""
    curve = h.of("grad_norm", FIRST + 1)
    if curve is None:
        return None
    norms = curve.latest[-50:]
    usual = max(quantiles(x, n=5)[-1] for x in (norms, curve.first))
    return float(sum(x > 10 * usual for x in norms))


def _flat(h: History) -> float | None:
    """Standard errors by which the latest rewards are not above the first; None while there is no signal."""
    curve = h.of("reward", 100)
    if curve is None or h.now("frac_reward_zero_std", 20) > 0.9:
        return None
    first, latest = curve.first, curve.latest[-FIRST:]
    error = ((variance(first) + variance(latest)) / FIRST) ** 0.5
    return (fmean(first) - fmean(latest)) / error if error else None


DROPS = (
    "sampling/dropped_token_frac",
    "sampling/dropped_sequence_frac",
    "off_policy/dropped_sequence_frac",
)
LOOK = "look at the samples (callbacks.SampleTable)"

ALARMS: dict[str, Alarm] = {
    "no_signal": Alarm(
        _no_signal,
        5,
        "rollouts in a row without a completion that trains with an advantage",
        _why_no_signal,
        "the prompts are too hard or too easy for the model, or the reward does not fit them",
        f"{LOOK}, then change the data, the reward or rollout.sampling.max_tokens",
    ),
    "truncated": Alarm(
        _truncated,
        0.98,
        "`completions/clipped_ratio` over 5 rollouts, while `reward` has not risen",
        lambda h, x: f"{x:.0%} of the completions of 5 rollouts were cut at max_tokens",
        "answers do not fit, or the model does not end them",
        "raise rollout.sampling.max_tokens, or check the chat template and the end-of-sequence tokens",
    ),
    "entropy_collapse": Alarm(
        _entropy_fall,
        20.0,
        "`entropy` of the first 5 steps divided by that of the latest 5, while `reward` has not risen",
        lambda h, x: (
            f"entropy is {h.now('entropy', 5):.3g}, {x:.3g} times less than at the start, and reward "
            f"has not risen ({h.curves['reward'].start(10):.3g} -> {h.now('reward', 10):.3g})"
            if h.of("reward")
            else f"entropy is {h.now('entropy', 5):.3g}, {x:.3g} times less than at the start"
        ),
        "the policy repeats itself and no longer explores",
        "lower the learning rate, raise model.loss.clip_high, or set model.loss.entropy_coef",
    ),
    "kl_blow_up": Alarm(
        _mean_of("kl", 5),
        2.0,
        "`kl` over 5 steps, nats a token",
        lambda h, x: f"KL to the reference is {x:.3g} nats a token",
        "the policy has left the text that the reference writes",
        "lower the learning rate or raise model.loss.kl_coef, and go on from an earlier checkpoint",
    ),
    "first_ratio": Alarm(
        _mean_of("ratio/first_pass_max_error", 3),
        0.5,
        "`ratio/first_pass_max_error` over 3 first passes",
        lambda h, x: f"the largest |ratio - 1| of the first pass over a rollout is {x:.3g} and ought to be 0",
        "dropout is on, or the passes with and without gradient differ by more than rounding",
        "set model.disable_dropout, switch model.kernels off one by one, or take a wider trainer.precision",
    ),
    "dropped_tokens": Alarm(
        _dropped,
        0.5,
        "largest of " + ", ".join(f"`{name}`" for name in DROPS) + " over 5 steps",
        lambda h, x: f"{x:.0%} of what was sampled is dropped by the correction",
        "engine and trainer are far apart, or the policy moves too far on one rollout",
        "look at sampling/kl_engine_trainer, lower rollout.updates_per_rollout, or widen the bounds in "
        "model.loss.correction",
    ),
    "dropped_prompts": Alarm(
        _mean_of("health/dropped_prompts", 1),
        0.2,
        "share of the dataset's prompts that `data.overlong: drop` leaves out",
        lambda h, x: f"{x:.0%} of the prompts are left out, being longer than data.max_prompt_tokens",
        "the run learns from the short prompts alone",
        "raise data.max_prompt_tokens, or set data.overlong to left-truncate",
    ),
    "length_drift": Alarm(
        _length_factor,
        3.0,
        "factor between `completions/mean_length` of the first and the latest 10 rollouts, while `reward` "
        "has not risen",
        lambda h, x: (
            f"completions have {h.now('completions/mean_length', 10):.3g} tokens, at the start "
            f"{h.curves['completions/mean_length'].start(10):.3g}, and reward has not risen"
        ),
        "length is rewarded or punished by accident",
        f"{LOOK}; take a loss without a bias of length (dr_grpo, dapo), or a reward of length",
    ),
    "repetition": Alarm(
        _mean_of("health/repetition", 3),
        0.35,
        "share of a completion's pieces of 16 characters that it has had before, over 3 rollouts; "
        "completions of fewer than 64 characters are left out",
        lambda h, x: f"{x:.0%} of the text of completions repeats itself",
        "the policy has fallen into loops",
        "lower the learning rate, raise model.loss.kl_coef, or go on from an earlier checkpoint",
    ),
    "gradient_spikes": Alarm(
        _spikes,
        3,
        "how many of the latest 50 `grad_norm` are above 10 times what 4 of 5 are below, of these and of the "
        "first 20",
        lambda h, x: f"{x:.0f} of the latest 50 gradient norms are above 10 times the usual",
        "a few completions decide the step",
        "lower trainer.gradient_clip_val or the learning rate, or raise data.prompts_per_rollout",
    ),
    "flat_reward": Alarm(
        _flat,
        -1.0,
        "mean `reward` of the first 20 rollouts less that of the latest 20, in standard errors, from rollout "
        "100 on, unless 9 of 10 groups have no signal",
        lambda h, x: (
            f"reward was {h.curves['reward'].start(FIRST):.3g} over the first {FIRST} rollouts and is "
            f"{h.now('reward', FIRST):.3g} after {h.curves['reward'].count}"
        ),
        "the model does not learn what is rewarded",
        "raise the learning rate or rollout.num_generations, or check the reward on known answers",
    ),
}
"""by name; larger statistics are worse"""

WATCHED = {
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "rewards/unscorable_frac",
    "completions/clipped_ratio",
    "completions/mean_length",
    "entropy",
    "kl",
    "ratio/first_pass_max_error",
    "grad_norm",
    *DROPS,
    "health/signal",
    "health/repetition",
    "health/dropped_prompts",
}

PIECE, SHORTEST, LONGEST, EXAMINED = 16, 64, 4096, 32
"""characters of a piece and of a completion that is looked at; completions per rollout and rank"""


def repetition(completions: Sequence[str]) -> tuple[float, int]:
    """Returns the sum over completions of the share of their pieces that occur before, and their number.

    Characters stand for tokens, so that texts without spaces count too; runs of blanks count as one.
    """
    shares = []
    for text in completions[:EXAMINED]:
        text = re.sub(r"\s+", " ", text[-LONGEST:])
        if len(text) >= SHORTEST:
            pieces = [text[i : i + PIECE] for i in range(len(text) - PIECE + 1)]
            shares.append(1 - len(set(pieces)) / len(pieces))
    return sum(shares), len(shares)
