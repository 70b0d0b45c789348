"""Numbers that must agree: the prepared model's with the model as loaded, the engine's with the trainer's."""

import torch
from torch import Tensor

from grpo_lightning.batch import RolloutBatch
from grpo_lightning.errors import GRPOError
from grpo_lightning.metrics import over_ranks
from grpo_lightning.policy import Policy
from grpo_lightning.stats import Stat, extreme, mean

LARGEST_DISTANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""mean distance, in nats, of two forwards that differ by rounding alone"""


def first_step_distance(policy: Policy, rollout: RolloutBatch) -> dict[str, float]:
    """Returns how far, in nats, a few completions are from the model as it was loaded; all ranks together.

    Empty where no rank has a completion.

    Raises:
        GRPOError: the distance is more than rounding explains, on every rank.
    """
    few, stats = rollout.few(), {}
    if few.lengths:
        stats = _distance("check/logprob_distance", policy.distance_from_plain(few))
    found = over_ranks(stats)  # all ranks together: if one stops, all do
    if not found and not stats:
        return {}
    distance, allowed = found.get("check/logprob_distance_mean", float("nan")), _largest_distance(policy)
    if not distance <= allowed:
        on = [key for key, chosen in policy.prepared.chosen.items() if chosen and key != "loss"]
        raise GRPOError(
            f"the packed forward gives log-probabilities that are {distance:.3g} nats on average from the "
            f"model's own; at most {allowed:g} is rounding. Kernels: {', '.join(on) or 'none'}; switch them "
            "off (model.kernels) or use another architecture"
        )
    return found


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


def _distance(name: str, gap: Tensor) -> dict[str, Stat]:
    return {f"{name}_mean": mean(gap.sum(), len(gap)), f"{name}_max": extreme("max", gap.max())}
