"""From a rollout to the micro-batches that train: penalties, optimizer steps, scoring, selections."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import lightning.pytorch as pl
import torch

from grpo_lightning.engines.hf_sampling import uniforms
from grpo_lightning.errors import GRPOError
from grpo_lightning.losses import LossConfig
from grpo_lightning.losses.token_selection import choose_tokens, reference_gap, require
from grpo_lightning.metrics.logging import all_sum, gather, raise_together
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.packing.geometry import sampling_weights
from grpo_lightning.rollout.collector import Collector, Rollout
from grpo_lightning.rollout.micro_batch_sizing import MicroBatchSizer, cut
from grpo_lightning.rollout.phases import profiled
from grpo_lightning.rollout.trained_module import TrainsOnRollouts

COMPLETIONS = 32
"""that metrics should rest on, per rank and optimizer step"""
SAMPLED_TOKENS = 2048
"""of zero-variance groups that run for it at most, about; but never fewer than `FEWEST` completions"""
FEWEST = 4


@dataclass(frozen=True, slots=True)
class Splitting:
    """How a rollout becomes optimizer steps, and these micro-batches.

    Args:
        updates_per_rollout: optimizer steps of one pass, each with its own groups.
        num_iterations: passes.
        zero_variance_groups: drop, keep, or null for what the recipe says.
        sizer: into how many micro-batches an optimizer step is cut.
        seed: of the run.
    """

    updates_per_rollout: int
    num_iterations: int
    zero_variance_groups: str | None
    sizer: MicroBatchSizer
    seed: int


def make_micro_batches(
    rollout: Rollout,
    collector: Collector,
    splitting: Splitting,
    trainer: pl.Trainer,
    module: TrainsOnRollouts,
) -> tuple[list[RolloutBatch], int]:
    """Returns the micro-batches of one pass, in training order, and how many groups were dropped."""
    whole = _with_kl_in_reward(rollout, collector, trainer, module)
    batch = whole
    if _drops(splitting, module.loss):
        batch = whole.without_groups(rollout.rewards.zero_variance_groups(collector.advantage))
    several = splitting.updates_per_rollout * splitting.num_iterations > 1
    micro_batches = [
        micro_batch
        for step in batch.optimizer_steps(splitting.updates_per_rollout)
        for micro_batch in _micro_batches(step, several, splitting, trainer, module)
    ]
    raise_together(_unsound(micro_batches, module.loss))
    return micro_batches, len(whole.prompt_lengths) - len(batch.prompt_lengths)


def _with_kl_in_reward(
    rollout: Rollout, collector: Collector, trainer: pl.Trainer, module: TrainsOnRollouts
) -> RolloutBatch:
    """Returns the batch with its reference; the rewards lose kl_coef times the summed log-ratio to it."""
    loss: LossConfig = module.loss
    if not loss.kl_coef or loss.kl_in != "reward":
        return rollout.batch
    with profiled(trainer, "score"):
        micro_batches = rollout.batch.split(trainer.accumulate_grad_batches)
        scored = [module.score(p.to(module.device), old=True).to("cpu") for p in micro_batches]
    gap = torch.cat([reference_gap(p) for p in scored])
    reference = torch.cat([require(p.ref_logprobs) for p in scored])
    batch = collector.penalised(rollout, module.coefficients.kl * gap)
    return replace(batch, ref_logprobs=reference)


def _unsound(micro_batches: Sequence[RolloutBatch], loss: LossConfig) -> GRPOError | None:
    """Returns the error of numbers that were scored before training and are not finite, or None."""
    scored = {
        "log-probabilities of the policy": "old_logprobs",
        "log-probabilities of the reference": "ref_logprobs",
        **({"entropies of the policy": "old_entropies"} if loss.top_entropy_quantile < 1 else {}),
    }
    for name, field in scored.items():
        known = [x for x in (getattr(micro_batch, field) for micro_batch in micro_batches) if x is not None]
        if not all(bool(x.isfinite().all()) for x in known):
            return GRPOError(
                f"the {name}, taken of a rollout before it trains, are not finite: weights are ruined, or a "
                "value overflows in its type; go on from an older checkpoint (--ckpt_path), or change "
                "trainer.precision"
            )
    return None


def _drops(splitting: Splitting, loss: LossConfig) -> bool:
    default = "drop" if loss.recipe.drops_zero_variance_groups else "keep"
    return (splitting.zero_variance_groups or default) == "drop"


def _micro_batches(
    step: RolloutBatch,
    several: bool,
    splitting: Splitting,
    trainer: pl.Trainer,
    module: TrainsOnRollouts,
) -> list[RolloutBatch]:
    """Returns the micro-batches of one optimizer step, scored where the policy moves before they train."""
    loss: LossConfig = module.loss
    seed = splitting.seed
    micro_batches = _cut(step, splitting.sizer, trainer.world_size, loss, seed)
    # The engine's numbers stand for the old ones, once they are over the whole vocabulary.
    bypassed = loss.correction.bypass and step.sampler_logprobs is not None and step.truncation is None
    old = (several and not bypassed) or loss.needs_old_pass
    if not old and not loss.kl_loss_coef:
        return micro_batches
    with profiled(trainer, "score"):
        micro_batches = [
            module.score(micro_batch.to(module.device), old=old).to("cpu") for micro_batch in micro_batches
        ]
    if not loss.needs_old_pass:
        return micro_batches
    return choose_tokens(micro_batches, loss, seed=seed, gather=gather, rank=trainer.global_rank)


def _cut(
    step: RolloutBatch, sizer: MicroBatchSizer, ranks: int, loss: LossConfig, seed: int
) -> list[RolloutBatch]:
    """Returns the micro-batches of one optimizer step with the counts of all of them, over all ranks."""
    living, whole = step, loss.surrogate_row.whole_groups
    if loss.zero_variance_groups_have_no_gradient and not loss.needs_old_pass:
        living = with_fair_sample(step, seed)
    n = sizer.count(living.sequence_layout, whole_groups=whole)
    micro_batches = cut(living, n, sizer.most, whole_groups=whole)
    empty = sum(not any(p.lengths) for p in micro_batches)
    counted = replace(step, normalizers=replace(step.normalizers, empty_micro_batches=empty))
    normalizers = counted.all_reduce_normalizers(all_sum, micro_batches=sizer.most * ranks).normalizers
    return [replace(p, normalizers=normalizers) for p in micro_batches]


def with_fair_sample(step: RolloutBatch, seed: int) -> RolloutBatch:
    """Returns the completions that train, and a random sample of those whose groups have zero variance.

    The latter have gradients of exactly 0; they run because metrics cover all sampled tokens. All of them
    stay if they are few. The choice is a function of the seed and the policy's version.

    Args:
        step: of one optimizer step and rank.
        seed: of the run.
    """
    still = step.zero_variance_groups()
    sizes = [n if g in still else 0 for n, g in zip(step.lengths, step.host_groups, strict=True)]
    total, trained = sum(sizes), sum(g not in still for g in step.host_groups)
    if not total:
        return step.without_groups(still)
    expected = sum(n * n for n in sizes) / total  # tokens of a completion drawn in proportion to its tokens
    draws = max(FEWEST, min(COMPLETIONS - trained, int(SAMPLED_TOKENS / expected)))
    weights = [1.0 if n else 0.0 for n in sizes]
    if draws < sum(weights):
        (u,) = uniforms([seed], step.newest_version)
        weights = sampling_weights(sizes, draws, u)
    kept = [w if g in still else 1.0 for w, g in zip(weights, step.host_groups, strict=True)]
    sample = replace(step, sample_weights=torch.tensor(kept))
    return sample.take([s for s, w in enumerate(kept) if w])
