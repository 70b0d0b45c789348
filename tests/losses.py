"""Micro-batches for comparisons of the loss kernel with its twin, and the comparison."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grpo_lightning.losses import LossConfig, fused
from grpo_lightning.losses.fused.launch_triton import why_not
from grpo_lightning.metrics.reduce import values
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.types import Completion

REQUIRED = {"dro": {"dro_coef": 0.1}}
NARROW = ("old_logprobs", "ref_logprobs", "sampler_logprobs")


def micro_batch(
    lengths: tuple[int, ...] = (3, 0, 1, 5, 2, 4, 0, 6), seed: int = 1, spread: float = 0.7
) -> dict[str, Any]:
    """Returns a random micro-batch in fp32: batch, log-probabilities and entropy.

    Args:
        lengths: of the completions, four to a group.
        seed: of everything.
        spread: how far policies are from each other, in nats.
    """
    b = of_lengths(lengths, seed)
    g = torch.Generator().manual_seed(seed)
    n = len(b.target_ids)
    logprobs = -torch.rand(n, generator=g) - 0.01

    def near() -> Tensor:
        return (logprobs + spread * torch.randn(n, generator=g)).clamp(max=-1e-3)

    b = replace(
        b,
        old_logprobs=near(),
        ref_logprobs=near(),
        sampler_logprobs=near(),
        selected=torch.rand(n, generator=g) < 0.3,
        entropy_keep=torch.rand(n, generator=g) < 0.6,
    )
    b = replace(b, normalizers=replace(b.normalizers, entropy_tokens=int(b.entropy_keep.sum())))
    return {"batch": b, "logprobs": logprobs, "entropy": torch.rand(n, generator=g)}


def of_lengths(lengths: tuple[int, ...], seed: int) -> RolloutBatch:
    """Returns a packed rollout of completions of these lengths, four to a group."""
    assert len(lengths) % 4 == 0
    g = torch.Generator().manual_seed(seed)
    groups = [s // 4 for s in range(len(lengths))]
    return RolloutBatch.pack(
        prompt_ids=[[3, 4]] * (len(lengths) // 4),
        completions=[Completion(token_ids=[5] * n, finish_reason="stop") for n in lengths],
        group_ids=groups,
        advantages=torch.randn(len(lengths), generator=g),
        max_tokens=max(lengths, default=1) or 1,
    )


def wide(b: RolloutBatch) -> RolloutBatch:
    """Returns the batch with its log-probabilities in fp64."""
    given = {k: x.double() for k in NARROW if (x := getattr(b, k)) is not None}
    return replace(b, **given)


def assert_as_twin(
    config: LossConfig,
    batch: RolloutBatch,
    logprobs: Tensor,
    entropy: Tensor | None,
    covered: bool = True,
    **weights: float,
) -> fused.LossGrad:
    """Returns what the kernel gives after comparing all of it with the twin in fp64."""
    assert (why_not(config.resolve()) is None) == covered  # or torch would be compared with itself
    spread = None if entropy is None else entropy.double()
    want = fused.policy_loss_grad(logprobs.double(), wide(batch), config, spread, **weights)
    got = fused.policy_loss_grad(logprobs, batch, config, entropy, backend="triton", **weights)
    close = {"atol": 2e-6, "rtol": 2e-5, "check_dtype": False}
    torch.testing.assert_close(got.loss, want.loss, **close)
    scale = torch.cat([want.dlogprobs.abs(), want.loss.new_tensor([1e-3])]).max()
    torch.testing.assert_close(got.dlogprobs / scale, want.dlogprobs / scale, **close)
    assert (got.dentropy is None) == (want.dentropy is None)
    if got.dentropy is not None:
        torch.testing.assert_close(got.dentropy, want.dentropy, atol=1e-9, rtol=1e-6, check_dtype=False)
    ours, theirs = values(got.stats), values(want.stats)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=2e-6, rtol=2e-5, msg=lambda m, n=name: n + m)
    assert {k: s.kind for k, s in got.stats.items() if k in want.stats} == {
        k: s.kind for k, s in want.stats.items()
    }
    return got
