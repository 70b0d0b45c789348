"""A few tokens through a loaded model, before anything trains: which forward gives the model's own numbers.

What they must be is one row in one call, without padding, cache or kernels.
"""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from grpo_lightning.errors import ConfigError
from grpo_lightning.ops import fused_linear_logprobs
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.policy.dropout import restored
from grpo_lightning.policy.forward import decoder_of
from grpo_lightning.policy.logit_transforms import logit_changes
from grpo_lightning.policy.policy import Policy
from grpo_lightning.types import Completion

ROUNDING = {torch.float64: 2e-4, torch.float32: 2e-4, torch.float16: 0.05, torch.bfloat16: 0.2}
"""mean distance, in nats, of two forwards that differ by rounding alone, on tokens that make no sense
(SmolLM2-135M: 5e-6, 0.004 and 0.05)"""
TF32 = 50.0
"""how many times that is with products in TF32"""
HEAD_ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.2, torch.bfloat16: 0.2}
"""largest distance of 7 unlikely tokens, whose logits are rounded to the model's type in one of two ways"""

PROMPTS, LENGTHS = (9, 4), (7, 3, 12, 5)
"""tokens of two prompts, and of two completions of each"""


def settle_forward(policy: Policy) -> None:
    """Lets a policy run packed, or padded where that differs from one row at a time.

    Raises:
        ConfigError: neither gives the log-probabilities of the model alone, a token's depend on those that
            follow it, or the head is not one that this library can run.
    """
    name = type(policy.causal).__name__
    try:
        batch, expected = _expected(policy)
        check_head(policy)
    except ConfigError:
        raise
    except Exception as error:  # whatever a model of somebody else's raises
        raise ConfigError(f"{name} cannot train: {said(error)}; use another architecture") from error
    if policy.padded_reason is None:
        reason = _why_wrong(policy, batch, expected)
        if reason is None:
            return
        policy.run_padded(f"its packed forward {reason}")
        rank_zero_warn(f"{name} runs padded, not packed, because {policy.padded_reason}")
    reason = _why_wrong(policy, batch, expected)
    if reason is not None:
        raise ConfigError(f"{name} cannot train: its padded forward {reason}; use another architecture")


def check_head(policy: Policy) -> None:
    """Finds what the architecture does to its logits.

    Raises:
        ConfigError: nothing that its config names gives the model's own log-probabilities.
    """
    ids, known = tokens(policy, 8), logit_changes(policy.causal.config)
    theirs = alone(policy, ids)[range(len(ids) - 1), ids[1:]]
    gaps = [_head_gap(policy, ids, theirs, changes) for changes in known]
    gap = min(gaps)
    if not gap <= HEAD_ROUNDING[policy.compute_dtype] * _tf32(policy):
        raise ConfigError(
            f"{type(policy.causal).__name__} changes its logits in a way that is not supported yet: "
            f"log-probabilities differ by {gap:.3g} nats; use another architecture"
        )
    policy.logit_changes = known[gaps.index(gap)]


def alone(policy: Policy, ids: Sequence[int], *, kernels: bool = False) -> Tensor:
    """Returns log-probabilities [L, V] in fp32 of one row in one call of the model as loaded, or as prepared
    with `kernels`."""
    as_is = nullcontext() if kernels else policy.prepared.plain()
    with restored(policy.rates), as_is, policy.generating() as causal:
        row = torch.tensor([list(ids)], device=causal.device)
        return causal(input_ids=row, use_cache=False).logits[0].float().log_softmax(-1)


def rounding(policy: Policy) -> float:
    """Returns the largest mean distance, in nats, that is rounding."""
    return ROUNDING[policy.compute_dtype] * _tf32(policy)


def _tf32(policy: Policy) -> float:
    on_gpu = policy.causal.device.type == "cuda" and policy.compute_dtype == torch.float32
    return TF32 if on_gpu and torch.get_float32_matmul_precision() != "highest" else 1.0


def _head_gap(policy: Policy, ids: list[int], theirs: Tensor, changes: dict[str, Any]) -> float:
    with restored(policy.rates), policy.prepared.plain(), policy.generating() as causal:
        row = torch.tensor([ids], device=causal.device)
        hidden = decoder_of(causal)(input_ids=row).last_hidden_state[0, :-1]
        head = causal.get_output_embeddings()
        bias = getattr(head, "bias", None)
        hidden = hidden.to(head.weight.dtype)
        ours, _ = fused_linear_logprobs(hidden, head.weight, row[0, 1:], bias=bias, **changes)
        return (theirs - ours).abs().max().item()


def _expected(policy: Policy) -> tuple[RolloutBatch, Tensor]:
    """Returns completions and log-probabilities of the likeliest token at each place, which rounding moves
    least."""
    stream = iter(tokens(policy, sum(PROMPTS) + sum(LENGTHS)))
    prompts = [[next(stream) for _ in range(n)] for n in PROMPTS]
    completions = [[next(stream) for _ in range(n)] for n in LENGTHS]
    rows = []
    for s, own in enumerate(completions):
        prompt = prompts[s // 2]
        rows.append(alone(policy, [*prompt, *own[:-1]])[len(prompt) - 1 :])
        if s == 0:
            _check_causal(policy, prompt, rows[0][0])
    best = torch.cat(rows).max(-1)
    batch = RolloutBatch.pack(
        prompt_ids=prompts,
        completions=[Completion(token_ids=own) for own in completions],
        group_ids=[0, 0, 1, 1],
        advantages=torch.zeros(4),
        max_tokens=max(LENGTHS),
    ).to(policy.causal.device)
    return replace(batch, target_ids=best.indices), best.values


def _check_causal(policy: Policy, prompt: list[int], followed: Tensor) -> None:
    gap = (alone(policy, prompt)[-1] - followed).abs().mean().item()
    if not gap <= rounding(policy):
        raise ConfigError(
            f"{type(policy.causal).__name__} cannot train: a token's log-probabilities depend on the tokens "
            f"after it ({gap:.3g} nats), so nothing can be sampled from it; use a causal language model"
        )


def _why_wrong(policy: Policy, batch: RolloutBatch, expected: Tensor) -> str | None:
    """Returns what is wrong with the policy's forward as a training step runs it, or None."""
    training = policy.model.training
    policy.model.train(not policy.drops_out)
    try:
        with policy.measuring():
            found = policy.logprobs(batch).logprobs
    except Exception as error:  # whatever a model of somebody else's raises
        return f"fails ({said(error)})"
    finally:
        policy.model.train(training)
    gap = (found - expected).abs().mean().item()
    if gap <= rounding(policy):
        return None
    return f"is {gap:.3g} nats from one row at a time, of which {rounding(policy):g} would be rounding"


def tokens(policy: Policy, count: int) -> list[int]:
    """Returns ordinary tokens, the same on every rank."""
    special = {*policy.eos_ids, policy.pad_id, *getattr(policy.tokenizer, "all_special_ids", ())}
    size = policy.causal.config.get_text_config().vocab_size
    random = torch.Generator().manual_seed(0)
    order = torch.randint(size, (20 * count + 200,), generator=random).tolist()
    return [i for i in order if i not in special][:count]


def said(error: Exception) -> str:
    """Returns the first clause of an error in one line."""
    clause = re.split(r"[;\n]", str(error).strip())[0]
    return f"{type(error).__name__}: {clause[:200]}"
