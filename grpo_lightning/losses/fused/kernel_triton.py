"""The fused loss kernel: one launch over completions gives loss, derivatives and statistics.

One program walks the tokens of one completion: first for what depends on the whole completion, then for the
loss and the derivative by each token, then, where the ratio or the surrogate is the completion's, once more
to hand every token its share. Which surrogate, level, estimator and correction run is compiled in; numbers
and lengths are not. `data`, `numbers` and `rules` are the records of `policy_loss_triton`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from grpo_lightning.losses.fused.rules_triton import clamp
from grpo_lightning.losses.fused.statistics import Sums, Weighed


class Token(NamedTuple):
    """A block of tokens of one completion; values stand for nothing where `here` is false."""

    n: Any  # place in [N]
    here: Any
    A: Any  # advantage
    logp: Any
    old: Any
    d: Any  # clamped log-ratio
    slope: Any  # d d / d logp: 1, or 0 where it is clamped
    gap: Any  # log-probability of the policy that sampled, less what the sampler said
    sampler: Any  # what the sampler said, or the old one where it said nothing


class Whole(NamedTuple):
    """What a completion's tokens have in common."""

    weight: Any  # of the aggregation
    near: Any  # 1, or 0 if the off-policy mask leaves out its tokens with A < 0
    length: Any  # at least 1
    moved: Any  # sum of d
    mismatch: Any  # sum of m
    reach: Any  # the surrogate's sum


@triton.jit
def _total(x, here):
    return tl.sum(tl.where(here, x, 0.0), 0)


@triton.jit
def _known(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _token(data, start, end, BYPASS: tl.constexpr, BLOCK: tl.constexpr):
    n = start + tl.arange(0, BLOCK)
    here = n < end
    logp = tl.load(data.logprobs + n, mask=here, other=0.0)
    then = logp
    if data.old is not None:
        then = tl.load(data.old + n, mask=here, other=0.0).to(tl.float32)
    gap, old, sampler = tl.zeros_like(logp), then, then
    if data.sampler is not None:
        said = tl.load(data.sampler + n, mask=here, other=0.0).to(tl.float32)
        gap = then - said
        if BYPASS:
            old = tl.where(_known(said), said, then)
        sampler = tl.where(_known(said), said, old)
    raw = logp - old
    slope = tl.where((raw >= -20.0) & (raw <= 20.0), 1.0, 0.0)
    A = tl.load(data.advantages + n, mask=here, other=0.0).to(tl.float32)
    d = clamp(raw, -20.0, 20.0)
    return Token(n=n, here=here, A=A, logp=logp, old=old, d=d, slope=slope, gap=gap, sampler=sampler)


@triton.jit
def _correction(t, mismatch, length, numbers, rules):
    """Returns m and c."""
    m = clamp(tl.where(_known(t.gap), t.gap, 0.0), -20.0, 20.0)
    q = tl.exp(rules.span(m, mismatch, length))
    return m, rules.mode(q, tl.exp(m), numbers.c_low, numbers.c_high)


@triton.jit
def _whole(data, numbers, rules, begin, end, BYPASS: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the sums that a token's loss may depend on; what no rule asks for is compiled away."""
    s = tl.program_id(0)
    length = tl.maximum(end - begin, 1).to(tl.float32)
    moved, mismatch, reach, drift = 0.0, 0.0, 0.0, 0.0
    for start in range(begin, end, BLOCK):
        t = _token(data, start, end, BYPASS, BLOCK)
        # a surrogate that sums c has it per token, where the completion's m is not asked for
        m, c = _correction(t, 0.0, length, numbers, rules)
        moved += _total(t.d, t.here)
        mismatch += _total(m, t.here)
        drift += _total(t.sampler - t.logp, t.here)
        if rules.reach is not None:
            term, _steep = rules.reach(t.d, c, t.A, numbers.own)
            reach += _total(term, t.here)
    near = 1.0
    if numbers.threshold is not None:
        near = tl.where(drift / length <= numbers.threshold, 1.0, 0.0)
    weight = tl.load(data.weights + s)
    return Whole(weight=weight, near=near, length=length, moved=moved, mismatch=mismatch, reach=reach)


@triton.jit
def _factors(data, numbers, rules, whole, t, FOLDED: tl.constexpr, TOP: tl.constexpr):
    """Returns what multiplies a token's objective, its entropy, and 0 where the off-policy mask drops."""
    kept = tl.zeros_like(t.logp) + 1.0
    if data.entropy_keep is not None:
        kept = tl.load(data.entropy_keep + t.n, mask=t.here, other=0).to(tl.float32)
    trains = tl.where(t.A >= 0, 1.0, whole.near)
    factor = whole.weight * trains
    if TOP:
        factor *= kept
    if not FOLDED:
        _m, c = _correction(t, whole.mismatch, whole.length, numbers, rules)
        factor *= c
    return factor, kept, trains


@triton.jit
def _surrogate(data, numbers, rules, whole, t, rho):
    selected = tl.zeros_like(t.logp)
    if data.selected is not None:
        selected = tl.load(data.selected + t.n, mask=t.here, other=0).to(tl.float32)
    return rules.surrogate(t.A, rho, t.d, t.logp, t.old, selected, whole.reach, whole.length, numbers.own)


@triton.jit
def _divergence(data, rules, t, rho, CORRECTED: tl.constexpr):
    """Returns the estimate, its derivative by the token, and that by log rho."""
    x = tl.load(data.ref + t.n, mask=t.here, other=0.0).to(tl.float32) - t.logp
    value, rise = rules.kl(clamp(x, -20.0, 20.0))
    rise = tl.where((x >= -20.0) & (x <= 20.0), -rise, 0.0)
    through = 0.0 * value
    if CORRECTED:
        value, rise = rho * value, rho * rise
        through = value
    return value, rise, through


@triton.jit
def _entropy(data, numbers, t, kept, dentropy):
    """Returns the sums of the entropy and of the bonus."""
    h, bonus = 0.0, 0.0
    if data.entropy is not None:
        each = tl.load(data.entropy + t.n, mask=t.here, other=0.0).to(tl.float32)
        h = _total(each, t.here)
        if numbers.bonus is not None:
            bonus = _total(numbers.bonus * kept * each, t.here)
            tl.store(dentropy + t.n, -numbers.bonus * kept, mask=t.here)
    return h, bonus


@triton.jit
def _tokens(
    data, numbers, rules, whole, begin, end, dlogprobs, dentropy,
    BYPASS: tl.constexpr, FOLDED: tl.constexpr, CORRECTED: tl.constexpr, TOP: tl.constexpr,
    SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Returns the completion's sums and the derivatives by its mean log-ratio and by its reach."""
    policy, kl, entropy, bonus, low, high, mark, out = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    by_mean, by_whole = 0.0, 0.0
    length = whole.length
    for start in range(begin, end, BLOCK):
        t = _token(data, start, end, BYPASS, BLOCK)
        rho = rules.level(t.d, whole.moved / length)
        factor, kept, trains = _factors(data, numbers, rules, whole, t, FOLDED, TOP)
        value, by_rho, by_logp, by_reach, said = _surrogate(data, numbers, rules, whole, t, rho)
        policy += _total(factor * value, t.here)
        by_whole += _total(factor * by_reach, t.here)
        through, direct = factor * by_rho, factor * by_logp
        if rules.kl is not None:
            value, rise, by_rho = _divergence(data, rules, t, rho, CORRECTED)
            kl += _total(value, t.here)
            if numbers.kl is not None:
                share = numbers.kl * whole.weight
                policy += _total(share * value, t.here)
                direct += share * rise
                through += share * by_rho
        if SHARED:
            by_mean += _total(through, t.here)
        else:
            direct += through * t.slope
        tl.store(dlogprobs + t.n, direct, mask=t.here)
        h, gain = _entropy(data, numbers, t, kept, dentropy)
        entropy += h
        bonus += gain
        low += _total(tl.where((rho < numbers.clip_low) & (t.A < 0), 1.0, 0.0), t.here)
        high += _total(tl.where((rho > numbers.clip_high) & (t.A > 0), 1.0, 0.0), t.here)
        mark += _total(said, t.here)
        out += _total(1.0 - trains, t.here)
    some = end > begin
    sums = Sums(
        loss=policy - bonus, policy=policy, kl=kl, entropy=entropy, low=low, high=high, clipped=low + high,
        mark=mark, low_mean=low / length, high_mean=high / length, clipped_mean=(low + high) / length,
        mark_mean=mark / length, off_policy=out / length,
        least_low=tl.where(some, low / length, float("inf")),
        most_high=tl.where(some, high / length, -float("inf")),
    )  # fmt: skip
    return sums, by_mean, by_whole


@triton.jit
def _share_out(
    data, numbers, rules, whole, begin, end, by_mean, by_whole, dlogprobs,
    BYPASS: tl.constexpr, SHARED: tl.constexpr, PULLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds to every token's derivative its part of what the completion as a whole has."""
    tl.debug_barrier()  # another thread may have written what this one reads
    for start in range(begin, end, BLOCK):
        t = _token(data, start, end, BYPASS, BLOCK)
        grad = tl.load(dlogprobs + t.n, mask=t.here, other=0.0)
        if SHARED:
            grad += t.slope * by_mean / whole.length
        if PULLS:
            _term, steep = rules.reach(t.d, 1.0, t.A, numbers.own)
            grad += t.slope * steep * by_whole
        tl.store(dlogprobs + t.n, grad, mask=t.here)


@triton.jit
def _sampling(data, numbers, rules, whole, begin, end, BYPASS: tl.constexpr, BLOCK: tl.constexpr):
    """Returns what there is to say about the engine's log-probabilities."""
    unknown, known, far, error, one, two, dropped = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    least_c, most_c, most_gap = float("inf"), -float("inf"), -float("inf")
    for start in range(begin, end, BLOCK):
        t = _token(data, start, end, BYPASS, BLOCK)
        m, c = _correction(t, whole.mismatch, whole.length, numbers, rules)
        told = t.here & _known(t.gap)
        known += _total(1.0, told)
        unknown += _total(tl.where(_known(t.gap), 0.0, 1.0), t.here)
        far += _total(tl.abs(t.gap), told)
        error += _total(tl.exp(tl.abs(m)), t.here)
        one += _total(c, t.here)
        two += _total(c * c, t.here)
        dropped += _total(tl.where(c == 0, 1.0, 0.0), t.here)
        least_c = tl.minimum(least_c, tl.min(tl.where(t.here, c, float("inf")), 0))
        most_c = tl.maximum(most_c, tl.max(tl.where(t.here, c, -float("inf")), 0))
        most_gap = tl.maximum(most_gap, tl.max(tl.where(told, tl.abs(t.gap), -float("inf")), 0))
    return Weighed(
        unknown=unknown, known=known, gap=far, error=error, c=one, c_squared=two, c_mean=one / whole.length,
        dropped=dropped, dropped_whole=tl.where(dropped == whole.length, 1.0, 0.0),
        least_c=least_c, most_c=most_c, most_gap=most_gap,
    )  # fmt: skip


@triton.jit
def _write(row, columns):
    for i in tl.static_range(len(columns)):
        tl.store(row + i, columns[i])


@triton.jit
def loss_kernel(
    data, numbers, rules, dlogprobs, dentropy, columns,
    WIDTH: tl.constexpr, BYPASS: tl.constexpr, FOLDED: tl.constexpr, CORRECTED: tl.constexpr,
    TOP: tl.constexpr, SHARED: tl.constexpr, PULLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0)
    begin, end = tl.load(data.bounds + s), tl.load(data.bounds + s + 1)
    whole = _whole(data, numbers, rules, begin, end, BYPASS, BLOCK)
    sums, by_mean, by_whole = _tokens(
        data, numbers, rules, whole, begin, end, dlogprobs, dentropy,
        BYPASS, FOLDED, CORRECTED, TOP, SHARED, BLOCK,
    )  # fmt: skip
    _write(columns + s * WIDTH, sums)
    if SHARED or PULLS:
        _share_out(
            data, numbers, rules, whole, begin, end, by_mean, by_whole, dlogprobs,
            BYPASS, SHARED, PULLS, BLOCK,
        )  # fmt: skip
    if data.sampler is not None:
        said = _sampling(data, numbers, rules, whole, begin, end, BYPASS, BLOCK)
        _write(columns + s * WIDTH + len(sums), said)
