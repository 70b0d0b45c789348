"""`losses.fused.policy_loss` by the kernel: what it covers, which parts a call takes, its launch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

from grpo_lightning.losses import AGGREGATIONS, KL_ESTIMATORS, LossConfig
from grpo_lightning.losses.completion_sums import Segments
from grpo_lightning.losses.fused.kernel_triton import loss_kernel
from grpo_lightning.losses.fused.rules_triton import ESTIMATORS, LEVELS, MODES, SPANS, SURROGATE_RULES
from grpo_lightning.losses.fused.statistics import Counts, Reported, Sums, Weighed, statistics
from grpo_lightning.losses.policy_loss import LossGrad
from grpo_lightning.packing.batch import RolloutBatch

BLOCK = 512
"""tokens that a program takes at a time; lengths do not change it, so that nothing compiles again"""

ALIGNED = 16
"""bytes; Triton compiles again for a pointer that is not, and for those in a record it always looks"""


class Data(NamedTuple):
    """What is read; None: there is none."""

    logprobs: Any  # [N] and so on down to advantages
    old: Any
    sampler: Any
    ref: Any
    entropy: Any
    selected: Any  # uint8
    entropy_keep: Any  # uint8
    advantages: Any  # [N]
    weights: Any  # [S]
    bounds: Any  # [S + 1] int32, where completions begin


class Numbers(NamedTuple):
    """What may change from step to step without a compilation; None: it does not apply."""

    clip_low: Any  # lowest and highest ratio that are not reported as clipped
    clip_high: Any
    c_low: Any  # bounds of the correction
    c_high: Any
    threshold: Any  # of the off-policy mask
    kl: Any  # coefficient
    bonus: Any  # coefficient of the entropy over the count of tokens
    own: Any  # of the surrogate


class Rules(NamedTuple):
    """Device functions, and None for what is not computed."""

    surrogate: Any
    reach: Any
    level: Any
    span: Any
    mode: Any
    kl: Any


def why_not(config: LossConfig) -> str | None:
    """Returns what of a resolved config the kernel does not cover, or None."""
    tables = {
        "surrogate": (config.surrogate, SURROGATE_RULES),
        "ratio_level": (config.ratio_level, LEVELS),
        "kl_estimator": (config.kl_estimator, ESTIMATORS),
        "correction.level": (config.correction.level, SPANS),
        "correction.mode": (config.correction.mode, MODES),
    }
    missing = [f"{key} {name!r}" for key, (name, table) in tables.items() if name not in table]
    if not missing and not config.surrogate_row.ours:
        missing = [f"surrogate {config.surrogate!r}, which is not the library's own"]
    return ", ".join(missing) or None


class Choice(NamedTuple):
    """What of the kernel a call takes."""

    rules: Rules
    flags: dict[str, bool]


def choose(config: LossConfig, batch: RolloutBatch) -> Choice:
    """Returns the device functions and flags for a resolved config that is covered."""
    row, level = SURROGATE_RULES[str(config.surrogate)], LEVELS[str(config.ratio_level)]
    correction, estimator = config.correction, str(config.kl_estimator)
    known = config.kl_coef != 0 and batch.ref_logprobs is not None
    rules = Rules(
        surrogate=row.function,
        reach=row.reach,
        level=level.function,
        span=SPANS[correction.level],
        mode=MODES[str(correction.mode) if correction.active else "off"],
        kl=ESTIMATORS[estimator] if known else None,
    )
    flags = {
        "BYPASS": correction.bypass,
        "FOLDED": config.surrogate_row.folds_correction,
        "CORRECTED": config.kl_bias_correction and KL_ESTIMATORS[estimator].correctable,
        "TOP": config.top_entropy_quantile < 1,
        "SHARED": level.shared,
        "PULLS": row.pulls,
    }
    return Choice(rules, flags)


def lacks(batch: RolloutBatch, config: LossConfig, entropy: Tensor | None, entropy_coef: float) -> bool:
    """Returns whether the loss cannot be computed from what is given; the twin says why."""
    return (
        (batch.token_advantages and config.needs_completion_advantages is not None)
        or (config.surrogate_row.needs_old and batch.selected is None)
        or (config.top_entropy_quantile < 1 and batch.entropy_keep is None)
        or (config.kl_loss_coef != 0 and batch.ref_logprobs is None)
        or (entropy is None and entropy_coef != 0)
    )


@contextmanager
def _unwatched() -> Iterator[None]:
    """Sets aside who watches Triton compile, as vLLM does in the trainer's process.

    Triton 3.6 describes a kernel's constants to them in JSON, which has no word for a device function.
    """
    watchers = "jit_cache_hook", "jit_post_compile_hook"
    known = {name: getattr(knobs.runtime, name) for name in watchers}
    for name in watchers:
        setattr(knobs.runtime, name, None)
    try:
        yield
    finally:
        for name, hook in known.items():
            setattr(knobs.runtime, name, hook)


def policy_loss_grad(
    logprobs: Tensor,
    batch: RolloutBatch,
    config: LossConfig,
    entropy: Tensor | None,
    kl_coef: float,
    entropy_coef: float,
) -> LossGrad:
    """As `fused.policy_loss_grad`, for a resolved config that is covered and at least one token, in fp32."""
    rules, flags = choose(config, batch)
    row = SURROGATE_RULES[str(config.surrogate)]
    width = len(Sums._fields) + (0 if batch.sampler_logprobs is None else len(Weighed._fields))
    columns = logprobs.new_empty(len(batch.lengths), width)
    dlogprobs = torch.empty_like(logprobs, memory_format=torch.contiguous_format)
    dentropy = torch.empty_like(dlogprobs) if entropy_coef else None
    numbers = _numbers(batch, config, kl_coef, entropy_coef)
    with _unwatched():
        loss_kernel[(len(batch.lengths),)](
            _data(logprobs, batch, config, entropy), numbers, rules, dlogprobs, dentropy, columns,
            WIDTH=width, **flags, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    present = {
        "kl": rules.kl is not None,
        "entropy": entropy is not None,
        "bonus": dentropy is not None,
        "off_policy": config.off_policy_threshold is not None,
        "sampler": batch.sampler_logprobs is not None,
    }
    counts = Counts.of(torch.tensor(batch.lengths), batch.sample_weights)
    whole = row.per_completion or (not row.per_token and config.ratio_level != "token")
    reported = None if row.report is None else Reported(row.report, whole)
    stats = statistics(
        columns, counts, config, reported, {k for k, v in present.items() if v}, batch.sample_weights
    )
    return LossGrad(stats["loss"].value.to(logprobs.dtype), dlogprobs, dentropy, stats)


def _numbers(batch: RolloutBatch, config: LossConfig, kl_coef: float, entropy_coef: float) -> Numbers:
    low, high = config.clip_range
    count = batch.normalizers.tokens if batch.entropy_keep is None else batch.normalizers.entropy_tokens
    own = SURROGATE_RULES[str(config.surrogate)].own(config)
    threshold = config.off_policy_threshold
    return Numbers(
        clip_low=1.0 - low,
        clip_high=1.0 + high,
        c_low=float(config.correction.bounds[0]),
        c_high=float(config.correction.bounds[1]),
        threshold=None if threshold is None else float(threshold),
        kl=float(kl_coef) if config.kl_loss_coef else None,
        bonus=entropy_coef / max(count, 1) if entropy_coef else None,
        own=tuple(torch.inf if x is None else float(x) for x in own),
    )


def _data(logprobs: Tensor, batch: RolloutBatch, config: LossConfig, entropy: Tensor | None) -> Data:
    device = logprobs.device
    lengths = torch.tensor(batch.lengths, dtype=torch.int64)
    segments = Segments(batch.sequence_ids, lengths, batch.group_ids, batch.group_tokens)
    aggregation = AGGREGATIONS[str(config.aggregation)]
    vectors = (
        logprobs.detach(), batch.old_logprobs, batch.sampler_logprobs, batch.ref_logprobs,
        None if entropy is None else entropy.detach(),
        batch.selected if config.surrogate_row.needs_old else None, batch.entropy_keep, batch.advantages,
    )  # fmt: skip
    return Data(
        *(_plain(x) for x in vectors),
        weights=_on(aggregation.per_completion(segments, batch.normalizers).float(), device),
        bounds=_on(torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(), device),
    )


def _plain(x: Tensor | None) -> Tensor | None:
    """Returns what the kernel can walk: one number after the other, bytes for truth values."""
    if x is None:
        return None
    x = x.contiguous().view(torch.uint8) if x.dtype == torch.bool else x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNED else x


def _on(x: Tensor, device: torch.device) -> Tensor:
    """Returns `x` on `device`, without waiting for it."""
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
