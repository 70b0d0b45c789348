"""Our side of conformance.py: the packed loss of an optimizer step, in any number of micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from peers.cases import Case
from torch import Tensor

from grpo_lightning.losses import LossConfig, policy_loss
from grpo_lightning.losses.token_selection import choose_tokens
from grpo_lightning.metrics.reduce import Stat, combine, values
from grpo_lightning.packing.batch import RolloutBatch


@dataclass
class Answer:
    """What one side says: a value, its gradients [N] in the order of the tokens, and what it logs."""

    value: float
    grad: Tensor
    entropy_grad: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


def our_loss(
    case: Case, config: LossConfig, rows: Sequence[Sequence[int]], optimizer_steps: int = 1
) -> Answer:
    """Returns the sum over optimizer steps of our loss.

    Args:
        case: the rollout.
        config: the recipe.
        rows: the completions of each micro-batch.
        optimizer_steps: optimizer steps that the micro-batches are dealt to, in order.
    """
    kept = case.kept
    logprobs = case.logprobs[kept].clone().requires_grad_()
    entropy = case.entropy[kept].clone().requires_grad_()
    whole, total, stats = case.batch(), torch.zeros((), dtype=logprobs.dtype), list[dict[str, Stat]]()
    each = len(rows) // optimizer_steps
    for w in range(optimizer_steps):
        for part in _optimizer_step(whole, rows[w * each : (w + 1) * each], config):
            mine = part.tokens
            out = policy_loss(logprobs[mine], part.batch, config, entropy[mine])
            total = total + out.loss
            stats.append(out.stats)
    grads = torch.autograd.grad(total, [logprobs, entropy], allow_unused=True)
    full = [torch.zeros_like(case.logprobs) for _ in grads]
    for place, g in zip(full, grads, strict=True):
        if g is not None:
            place[kept] = g
    return Answer(total.item(), *full, metrics=values(combine(stats)))


@dataclass(frozen=True)
class _Part:
    batch: RolloutBatch
    tokens: Tensor  # [N] of the part, into the tokens of the rollout


def _optimizer_step(whole: RolloutBatch, rows: Sequence[Sequence[int]], config: LossConfig) -> list[_Part]:
    """Returns the micro-batches of one optimizer step, with its counts and the selections made over it."""
    inside = whole.take(sorted(s for part in rows for s in part))
    normalizers = replace(
        whole.normalizers,
        tokens=sum(inside.lengths),
        sequences=len(inside.lengths),
        groups=int((inside.group_tokens > 0).sum()),
        micro_batches=len(rows),
    )
    parts = [replace(whole.take(part), normalizers=normalizers) for part in rows]
    tokens = [torch.isin(whole.sequence_ids, torch.tensor(list(part))).nonzero()[:, 0] for part in rows]
    chosen = choose_tokens(parts, config, seed=0, gather=lambda x: [x]) if config.needs_old_pass else parts
    return [_Part(b, t) for b, t in zip(chosen, tokens, strict=True)]
