"""Numbers that must agree: the prepared model's with the model as loaded, the engine's with the trainer's."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from grpo_lightning.batch import RolloutBatch
from grpo_lightning.errors import ConfigError, GRPOError
from grpo_lightning.layouts import padded_hidden
from grpo_lightning.metrics import over_ranks
from grpo_lightning.policy import Policy
from grpo_lightning.stats import Stat, extreme, mean

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
    few, stats = rollout.few(), {}
    if few.lengths:
        stats = _distance("check/logprob_distance", logprob_distance(policy, few))
        pair = rollout.shortest_pair()
        if not policy.drops_out and pair.outline.unshared().num_tokens <= GRADIENT_ROWS:
            stats["check/gradient_distance"] = extreme("max", gradient_distance(policy, pair))
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


def engine_distance(rollout: RolloutBatch, logprobs: Tensor) -> dict[str, Stat]:
    """Returns how far apart, in nats, engine and trainer are on tokens sampled from this very policy.

    Args:
        rollout: S completions, sampled by the policy whose `logprobs` [N] these are.
        logprobs: without gradient.
    """
    if rollout.sampler_logprobs is None:
        return {}
    gap = (logprobs - rollout.sampler_logprobs).abs()
    gap = gap[torch.isfinite(gap)]
    return _distance("sampling/parity", gap) if len(gap) else {}


def check_totals(metrics: Mapping[str, float], step: int) -> None:
    """Raises ConfigError if the micro-batches of an optimizer step hold more tokens than their totals say.

    Args:
        metrics: what the loss of the step logged, all micro-batches and ranks together.
        step: the optimizer step.
    """
    held, counted = metrics["rollout/loss_tokens"], metrics["rollout/window_tokens"]
    if held > counted:
        raise ConfigError(
            f"the micro-batches of optimizer step {step} hold {held:.0f} tokens, but "
            f"RolloutBatch.totals.tokens is {counted:.0f}; it must count all of them, over all ranks. "
            "Pack the optimizer step as one RolloutBatch (totals of several ranks: all_reduce_totals), cut "
            "it with split(accumulate_grad_batches), and feed its parts in order, not shuffled"
        )


def _distance(name: str, gap: Tensor) -> dict[str, Stat]:
    return {f"{name}_mean": mean(gap.sum(), len(gap)), f"{name}_max": extreme("max", gap.max())}
