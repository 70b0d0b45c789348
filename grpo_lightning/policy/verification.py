"""Numbers that must agree: the prepared model's with the model as loaded, the engine's with the trainer's."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_lightning.errors import ConfigError, GRPOError
from grpo_lightning.losses.completion_sums import Segments
from grpo_lightning.losses.token_selection import require
from grpo_lightning.metrics.logging import over_ranks
from grpo_lightning.metrics.reduce import Stat, mean, mean_of, ratio, reduced
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.policy.finite_checks import BAD_LOGPROBS
from grpo_lightning.policy.forward import padded_hidden
from grpo_lightning.policy.policy import Policy, TokenScores
from grpo_lightning.policy.rounding import head_logprobs, random_rounding, rounding_unit

LARGEST_DISTANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""mean distance, in nats, of two forwards that differ by rounding alone"""


LARGEST_TURN = {torch.float64: 1e-3, torch.float32: 1e-2, torch.float16: 0.3, torch.bfloat16: 0.3}
"""distance of two gradients that differ by rounding alone, of their length"""
GRADIENT_ROWS = 4096
"""the most rows of which gradients are compared: nothing is recomputed in that pass"""


def first_step_distance(policy: Policy, rollout: RolloutBatch) -> dict[str, float]:
    """Returns how far a few completions are from the model as it was loaded; all ranks together.

    Log-probabilities in nats, the gradient of the sum of two completions' in parts of its length. Empty where
    no rank has a completion; without the gradient where a model drops out or completions are long.

    Raises:
        GRPOError: a distance is more than rounding explains.
    """
    few, stats = rollout.spot_check_subset(), {}
    if few.lengths:
        stats = _distance("check/logprob_distance", logprob_distance(policy, few))
        pair = rollout.shortest_pair()
        if not policy.drops_out and pair.sequence_layout.unshared().num_tokens <= GRADIENT_ROWS:
            stats["check/gradient_distance"] = reduced("max", gradient_distance(policy, pair))
    found = over_ranks(stats)  # all ranks together: if one stops, all do
    if not found and not stats:
        return {}
    limits = (
        ("check/logprob_distance_mean", "nats in log-probabilities", _largest_distance(policy), float("nan")),
        ("check/gradient_distance", "of the length of a gradient", LARGEST_TURN[policy.compute_dtype], 0.0),
    )
    for name, unit, allowed, missing in limits:
        distance = found.get(name, missing)
        if not distance <= allowed:
            on = [key for key, chosen in policy.prepared.chosen.items() if chosen and key != "loss"]
            raise GRPOError(
                f"the packed forward is {distance:.3g} {unit} from the model as loaded; at most {allowed:g} "
                f"is rounding. Kernels: {', '.join(on) or 'none'}; switch them off (model.kernels) or use "
                "another architecture"
            )
    return found


def logprob_distance(policy: Policy, batch: RolloutBatch) -> Tensor:
    """Returns |log-probability - that of the model as loaded, one completion per row| [N], in nats."""
    found = []
    for way in (_prepared, _plain):
        with way(policy) as logprobs:
            found.append(logprobs(batch))
    return (found[0] - found[1]).abs()


def gradient_distance(policy: Policy, batch: RolloutBatch) -> Tensor:
    """Returns |g - g'| / |g'|, with g' the gradient of the model as loaded, of summed log-probabilities.

    They are of tokens half a vocabulary away from the sampled ones: where a policy is sure of its tokens, the
    gradient of these is nothing but rounding. Nothing may drop out: layers are checkpointed only in training
    mode, and it is taken for the gradients.
    """
    size = policy.causal.config.get_text_config().vocab_size
    batch = replace(batch, target_ids=(batch.target_ids + size // 2) % size)
    params = list(policy.trainable().values())
    gradients = []
    # a shape's first pass runs without a graph, its second as one
    for way in (_prepared, *[_prepared] * (policy.graphs is not None), _plain):
        with way(policy) as logprobs, torch.enable_grad():
            policy.model.train()
            total = logprobs(batch).sum()
            # inside, since a checkpointed layer runs again here
            known = total.requires_grad
            found = torch.autograd.grad(total, params, allow_unused=True) if known else [None] * len(params)
        pairs = zip(found, params, strict=True)
        gradients.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]))
    got, want = (g.float() for g in gradients[-2:])
    return (got - want).norm() / want.norm().clamp_min(1e-30)


LogProbs = Callable[[RolloutBatch], Tensor]


@contextmanager
def _prepared(policy: Policy) -> Iterator[LogProbs]:
    training = policy.model.training
    policy.model.eval()
    try:
        with policy.measuring():
            yield lambda batch: policy.logprobs(batch).logprobs
    finally:
        policy.model.train(training)


@contextmanager
def _plain(policy: Policy) -> Iterator[LogProbs]:
    def logprobs(batch: RolloutBatch) -> Tensor:
        # one completion per call: some models compute something else beside longer rows
        alone = (batch.take([s]) for s in range(len(batch.lengths)))
        rows = torch.cat([padded_hidden(policy.decoder, one, policy.pad_id) for one in alone])
        return policy.scores(rows, batch, entropy_grad=False).logprobs

    with policy.prepared.plain(), policy.generating():
        yield logprobs


def _largest_distance(policy: Policy) -> float:
    kind = policy.compute_dtype
    tf32 = policy.causal.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return 0.01 if tf32 and kind == torch.float32 else LARGEST_DISTANCE[kind]


FARTHEST = 5.0
"""nats by which the trainer may find a sampled token likelier than the engine did; beyond, k3 counts this"""


def k3(gap: Tensor) -> Tensor:
    """Returns exp(x) - 1 - x >= 0 in fp64, whose mean estimates KL(q || p) for tokens sampled from q.

    Args:
        gap: x = log p - log q, in nats (Schulman 2020, "Approximating KL divergence").
    """
    x = gap.double().clamp(max=FARTHEST)
    return x.expm1() - x


def engine_gap(rollout: RolloutBatch, logprobs: Tensor) -> Tensor | None:
    """Returns the trainer's less the engine's log-probabilities [N] in nats; None if there are none.

    Not finite where the engine reported nothing.

    Args:
        rollout: S completions, sampled by the policy whose `logprobs` [N] these are.
        logprobs: without gradient.
    """
    return None if rollout.sampler_logprobs is None else logprobs - rollout.sampler_logprobs


def rollout_stats(
    rollout: RolloutBatch, logprobs: Tensor, gap: Tensor | None, lags: Sequence[int]
) -> dict[str, Stat]:
    """Returns what a micro-batch is part of, how far it is from its engine, and its ratios from 1 at first.

    Args:
        rollout: a micro-batch.
        logprobs: [N] of the training forward, without gradient.
        gap: of `engine_gap`, or None.
        lags: [S] optimizer steps since each completion was sampled.
    """
    stats = {
        "rollout/policy_lag": mean_of(map(float, lags)),
        "rollout/step_tokens": reduced("max", float(rollout.normalizers.tokens)),
        "rollout/loss_tokens": reduced("sum", float(sum(rollout.lengths))),
        BAD_LOGPROBS: reduced("sum", (~logprobs.isfinite()).sum()),
    }
    if not any(lags) and rollout.old_logprobs is not None and len(logprobs):
        error = ((logprobs - rollout.old_logprobs).exp() - 1).abs().max()
        stats["ratio/first_pass_max_error"] = reduced("max", error)
    return stats if gap is None else stats | engine_distance(rollout, gap)


def engine_distance(rollout: RolloutBatch, gap: Tensor) -> dict[str, Stat]:
    """Returns how far apart, in nats a token, engine and trainer are over all sampled tokens.

    `sampling/kl_engine_trainer` is k3 with its standard error, completions being independent;
    `sampling/parity_mean` and `_max` are of |gap|.

    Args:
        rollout: of `engine_gap`.
        gap: what it returned.
    """
    if not len(gap):
        return {}
    segments, known = Segments.of(rollout), torch.isfinite(gap)
    apart = torch.where(known, gap, 0.0)
    kl, error = ratio(segments.sum(k3(apart)), segments.sum(known.double()), rollout.sample_weights)
    return {
        "sampling/parity_mean": segments.token_mean(apart.abs(), known),
        "sampling/parity_max": reduced("max", torch.where(known, gap.abs(), -torch.inf).max()),
        "sampling/kl_engine_trainer": kl,
        "sampling/kl_engine_trainer_error": error,
    }


def check_normalizers(metrics: Mapping[str, float], step: int) -> None:
    """Raises ConfigError if the micro-batches of an optimizer step hold more tokens than `normalizers` says.

    Args:
        metrics: what the loss of the step logged, all micro-batches and ranks together.
        step: the optimizer step.
    """
    held, counted = metrics["rollout/loss_tokens"], metrics["rollout/step_tokens"]
    if held > counted:
        raise ConfigError(
            f"the micro-batches of optimizer step {step} hold {held:.0f} tokens, but "
            f"RolloutBatch.normalizers.tokens is {counted:.0f}; it must count all of them, over all ranks. "
            "Pack the step as one RolloutBatch (of several ranks: all_reduce_normalizers), cut it with "
            "split(accumulate_grad_batches), and feed its micro-batches in order, not shuffled"
        )


def _distance(name: str, gap: Tensor) -> dict[str, Stat]:
    return {f"{name}_mean": mean(gap.sum(), len(gap)), f"{name}_max": reduced("max", gap.max())}


class Distances(NamedTuple):
    """Sums of k3 over each of C completions, in nats, as fp64 on the host."""

    tokens: Tensor  # [C]
    engine_trainer: Tensor  # [C]
    engine_stock: Tensor  # [C] stock: the model as it was loaded, and no kernels
    trainer_stock: Tensor  # [C]
    rounding: Tensor  # [C] stock against stock rounded at random


def distances(policy: Policy, batch: RolloutBatch, gap: Tensor | None, seed: int) -> Distances:
    """Returns how far engine, trainer and the model as it was loaded are from each other.

    Args:
        policy: as it was when the completions were sampled.
        batch: completions with what the engine said of them.
        gap: [N] trainer less engine, where a training forward has given it; None runs the prepared model.
        seed: of the random rounding.
    """
    found = [_distances(policy, piece, own, seed) for piece, own in _pieces(batch, gap)]
    return Distances(*(torch.cat(column).double().cpu() for column in zip(*found, strict=True)))


AT_ONCE = 16384
"""tokens, padding included, of a stock forward that compares"""
ROUNDINGS = 2
"""random roundings that the scale is the mean of"""


def _pieces(batch: RolloutBatch, gap: Tensor | None) -> Iterator[tuple[RolloutBatch, Tensor | None]]:
    """Yields the completions in runs that a padded forward has room for."""
    runs: list[list[int]] = [[]]
    widest = 0
    for s, (g, n) in enumerate(zip(batch.host_groups, batch.sequence_layout.rows, strict=True)):
        widest = max(widest, batch.prompt_lengths[g] + n + 1)
        if runs[-1] and widest * (len(runs[-1]) + 1) > AT_ONCE:
            runs.append([])
            widest = batch.prompt_lengths[g] + n + 1
        runs[-1].append(s)
    for run in runs:
        mine = torch.isin(batch.sequence_ids, torch.tensor(run, device=batch.sequence_ids.device))
        yield batch.take(run), None if gap is None else gap[mine]


def _distances(policy: Policy, batch: RolloutBatch, gap: Tensor | None, seed: int) -> Distances:
    decoder, eps = policy.decoder, rounding_unit(policy.compute_dtype, policy.causal.device)
    engine = require(batch.sampler_logprobs)
    if gap is None:
        with _prepared(policy):
            gap = _sampled(policy.logprobs(batch)) - engine
    with policy.prepared.plain(), policy.generating():
        stock = _sampled(
            policy.scores(padded_hidden(decoder, batch, policy.pad_id), batch, entropy_grad=False)
        )
        rounded = []
        for i in range(ROUNDINGS):
            with random_rounding(decoder, eps, seed + i):
                hidden = padded_hidden(decoder, batch, policy.pad_id)
            rounded.append(head_logprobs(policy, hidden, batch))
    known = torch.isfinite(gap)
    # Tokens are the engine's: of two other programs neither has a reason to find them likelier.
    pairs = [
        (gap,),
        (stock - engine,),
        (-(stock - engine - gap).abs(),),
        [-(r - stock).abs() for r in rounded],
    ]
    segments = Segments.of(batch)
    sums = [
        segments.sum(torch.stack([k3(torch.where(known, x, 0.0)) for x in pair]).mean(0)) for pair in pairs
    ]
    return Distances(segments.sum(known.double()), *sums)


def _sampled(scores: TokenScores) -> Tensor:
    """Returns log-probabilities [N] of the distribution that was sampled from, as engines report them."""
    return scores.logprobs if scores.log_kept is None else scores.logprobs - scores.log_kept
