"""The parts of the loss kernel: a device function for each row of the tables of `losses/` that it covers.

All of them see one block of tokens of one completion. Derivatives are written beside the values; a test
compares every row with what autograd makes of its twin. A row that is missing here runs in plain torch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl

from grpo_lightning.losses import LossConfig


@triton.jit
def clamp(x, low, high):
    """Returns x in [low, high]; NaN stays NaN, which tl.clamp does not promise."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


# Surrogates: (A, rho, d, logp, old, selected, reach, length, own) -> value, d / d log rho, d / d logp,
# d / d reach, what is reported. reach and length are the completion's; `own` the numbers of the row.


@triton.jit
def _clipped(A, rho, own):
    free = tl.where(rho > own[2], own[2], rho) * A
    bound = clamp(rho, own[0], own[1]) * A
    taken = free <= bound
    return -tl.where(taken, free, bound), -tl.where(taken & (rho <= own[2]), A * rho, 0.0)


@triton.jit
def ppo_clip(A, rho, d, logp, old, selected, reach, length, own):
    value, slope = _clipped(A, rho, own)
    return value, slope, 0.0, 0.0, 0.0


@triton.jit
def clip_cov(A, rho, d, logp, old, selected, reach, length, own):
    value, slope = _clipped(A, rho, own)
    silent = selected > 0
    return tl.where(silent, 0.0, value), tl.where(silent, 0.0, slope), 0.0, 0.0, selected


@triton.jit
def kl_cov(A, rho, d, logp, old, selected, reach, length, own):
    value, pull = -A * rho, own[0] * selected
    sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
    return value + pull * tl.abs(d), value + pull * sign, 0.0, 0.0, selected


@triton.jit
def reinforce(A, rho, d, logp, old, selected, reach, length, own):
    return -A * logp, 0.0, -A, 0.0, 0.0


@triton.jit
def dro(A, rho, d, logp, old, selected, reach, length, own):
    return -A * logp + 0.5 * own[0] * d * d, own[0] * d, -A, 0.0, 0.0


@triton.jit
def cispo(A, rho, d, logp, old, selected, reach, length, own):
    pull = -clamp(rho, own[0], own[1]) * A
    return pull * logp, 0.0, pull, 0.0, tl.where((rho > own[1]) & (A > 0), 1.0, 0.0)


@triton.jit
def sapo(A, rho, d, logp, old, selected, reach, length, own):
    tau = tl.where(A > 0, own[0], own[1])
    gate = 1.0 / (1.0 + tl.exp(-tau * (rho - 1.0)))
    return -A * (4.0 / tau) * gate, -A * 4.0 * gate * (1.0 - gate) * rho, 0.0, 0.0, 0.0


@triton.jit
def vespo(A, rho, d, logp, old, selected, reach, length, own):
    u = clamp(reach, -18.420680743952367, 20.0)
    k = tl.where(A >= 0, own[0], own[2])
    rate = tl.maximum(tl.where(A >= 0, own[1], own[3]), 1e-4)
    phi = tl.exp(rate + k * u - rate * tl.exp(u))
    phi = tl.where(phi < float("inf"), phi, 0.0)
    return -phi * A * logp, 0.0, -phi * A, 0.0, phi


@triton.jit
def gmpo(A, rho, d, logp, old, selected, reach, length, own):
    value = -A * tl.exp(reach / length)
    return value, 0.0, 0.0, value / length, 0.0


@triton.jit
def _weighed(A, rho, logp, keep, own):
    pull = tl.where(keep, -tl.where(rho > own[2], own[2], rho) * A, 0.0)
    return pull * logp, 0.0, pull, 0.0, tl.where(keep, 0.0, 1.0)


@triton.jit
def dppo_tv(A, rho, d, logp, old, selected, reach, length, own):
    moved = tl.exp(logp) - tl.exp(old)
    keep = ((A > 0) & (moved <= own[1])) | ((A <= 0) & (moved >= -own[0]))
    return _weighed(A, rho, logp, keep, own)


@triton.jit
def dppo_kl(A, rho, d, logp, old, selected, reach, length, own):
    p, p_old = tl.exp(logp), tl.exp(old)
    rest = (1.0 - p_old) * tl.log((1.0 - p_old + 1e-8) / (1.0 - p + 1e-8))
    divergence = p_old * (old - logp) + rest
    up = (A > 0) & ((divergence <= own[1]) | (p <= p_old))
    down = (A <= 0) & ((divergence <= own[0]) | (p >= p_old))
    return _weighed(A, rho, logp, up | down, own)


# What a surrogate sums over a completion: (d, c, A, own) -> term, d term / d d.


@triton.jit
def _with_correction(d, c, A, own):
    return d + tl.minimum(tl.log(tl.maximum(c, 1e-8)), 20.0), 0.0


@triton.jit
def _pessimistic(d, c, A, own):
    beyond = tl.where(A > 0, d > own[1], d < -own[0])
    return tl.where(beyond, tl.where(A > 0, own[1], -own[0]), d), tl.where(beyond, 0.0, 1.0)


class Objective(NamedTuple):
    """A surrogate as the kernel knows it."""

    function: Any
    own: Callable[[LossConfig], tuple[float | None, ...]] = lambda c: ()
    """its numbers; null is no bound above"""
    report: str | None = None
    """the statistic that the fifth result is"""
    per_completion: bool = False
    """whether that is a mean over completions at every ratio level"""
    per_token: bool = False
    """whether it is a mean over tokens at every ratio level"""
    reach: Any = None
    pulls: bool = False
    """whether the sum over the completion carries a gradient"""


def _clip(c: LossConfig) -> tuple[float | None, ...]:
    low, high = c.clip_range
    return 1 - low, 1 + high, c.dual_clip


def _dppo(c: LossConfig) -> tuple[float | None, ...]:
    return *c.dppo_range, c.dppo_weight_max


def _shape(c: LossConfig) -> tuple[float | None, ...]:
    return c.vespo_k_pos, c.vespo_lambda_pos, c.vespo_k_neg, c.vespo_lambda_neg


SURROGATE_RULES: dict[str, Objective] = {
    "ppo_clip": Objective(ppo_clip, _clip),
    "reinforce": Objective(reinforce),
    "cispo": Objective(cispo, lambda c: (c.cispo_weight_min, c.cispo_weight_max), "cispo_clip_ratio"),
    "sapo": Objective(sapo, lambda c: (c.sapo_tau_pos, c.sapo_tau_neg)),
    "vespo": Objective(vespo, _shape, "vespo/phi_seq_mean", per_completion=True, reach=_with_correction),
    "gmpo": Objective(gmpo, lambda c: (c.log_clip_low, c.log_clip_high), reach=_pessimistic, pulls=True),
    "dppo_tv": Objective(dppo_tv, _dppo, "dppo/dropped_token_frac", per_token=True),
    "dppo_kl": Objective(dppo_kl, _dppo, "dppo/dropped_token_frac", per_token=True),
    "clip_cov": Objective(clip_cov, _clip, "cov/selected_frac", per_token=True),
    "kl_cov": Objective(kl_cov, lambda c: (c.kl_cov_coef,), "cov/selected_frac", per_token=True),
    "dro": Objective(dro, lambda c: (c.dro_coef,)),
}


# Ratio levels: (d, mean of d) -> rho.


@triton.jit
def _token(d, mean):
    return tl.exp(d)


@triton.jit
def _completion(d, mean):
    return tl.zeros_like(d) + tl.exp(mean)


class Level(NamedTuple):
    """A ratio level as the kernel knows it."""

    function: Any
    shared: bool = False
    """whether the gradient is that of the mean, not of the token"""


LEVELS: dict[str, Level] = {
    "token": Level(_token),
    "sequence": Level(_completion, shared=True),
    "sequence_token": Level(_completion),
}


# Estimators of the KL divergence: x -> value, d value / d x.


@triton.jit
def _k1(x):
    return -x, -1.0


@triton.jit
def _k2(x):
    return 0.5 * x * x, x


@triton.jit
def _k3(x):
    near = 1.0 + x / 6.0 * (1.0 + x / 7.0 * (1.0 + x / 8.0 * (1.0 + x / 9.0)))
    near = 0.5 * x * x * (1.0 + x / 3.0 * (1.0 + x / 4.0 * (1.0 + x / 5.0 * near)))
    value = tl.where(tl.abs(x) < 0.5, near, tl.exp(x) - 1.0 - x)
    return value, value + x


@triton.jit
def _k1_straight(x):
    return -x, x


@triton.jit
def _k3_straight(x):
    value, _slope = _k3(x)
    return value, x


ESTIMATORS = {
    "k1": _k1,
    "k2": _k2,
    "k3": _k3,
    "k1_straight": _k1_straight,
    "k3_straight": _k3_straight,
}


# Sampler corrections: what is bounded, (m, sum of m, length) -> nats, and how, (q, own, low, high) -> c.


@triton.jit
def _own(m, total, length):
    return m


@triton.jit
def _product(m, total, length):
    return tl.zeros_like(m) + clamp(total, -20.0, 20.0)


@triton.jit
def _mean(m, total, length):
    return tl.zeros_like(m) + total / length


SPANS = {"token": _own, "sequence": _product, "geometric": _mean}


@triton.jit
def _truncate(q, own, low, high):
    return clamp(q, low, high)


@triton.jit
def _mask(q, own, low, high):
    return tl.where((q >= low) & (q <= high), q, 0.0)


@triton.jit
def _gate(q, own, low, high):
    return tl.where((q >= low) & (q <= high), own, 0.0)


@triton.jit
def _off(q, own, low, high):
    return tl.zeros_like(q) + 1.0


MODES = {"truncate": _truncate, "mask": _mask, "gate": _gate, "off": _off}
