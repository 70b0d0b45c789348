"""Liger's side of conformance.py: `LigerFusedLinearGRPOLoss` and our fused head with our loss, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from peers.cases import LONGEST, MAX_TOKENS, VOCAB, Case
from peers.cells import BETAS, CISPO_CAP, DELTAS, LEVELS, LOSSES, Cell
from torch import Tensor

from grpo_lightning.losses import CorrectionConfig, LossConfig, policy_loss
from grpo_lightning.losses.completion_sums import Segments
from grpo_lightning.losses.corrections import correction_weights
from grpo_lightning.ops import fused_linear_logprobs

HIDDEN = 32
WIDTH = LONGEST + 2  # padded beyond the longest completion too
TEMPERATURE = 0.7


@dataclass(frozen=True)
class LigerCell:
    """One combination of Liger's options; `ratio` is the level of the sampler's weights."""

    loss: str
    level: str
    beta: float
    delta: float | None
    bias: bool
    ratio: str | None

    @property
    def name(self) -> str:
        """What is printed where the cell fails."""
        kl = f"beta {self.beta}{', bias-corrected KL' if self.bias else ''}"
        return f"{self.loss}, {self.level}, {kl}, delta {self.delta}, vllm_is_ratio {self.ratio}"

    def ours(self) -> LossConfig:
        """Returns the same options as docs/losses.md translates them."""
        correction = CorrectionConfig(mode="off")
        if self.ratio is not None:
            correction = CorrectionConfig(level=self.ratio, mode="truncate", high=3.0)
        base = Cell(self.loss, self.level, self.beta, self.delta, None).ours()
        return replace(base, correction=correction, kl_bias_correction=self.bias)

    def theirs(self) -> LigerFusedLinearGRPOLoss:
        """Returns Liger's module; not compiled, which needs a C compiler and changes no formula."""
        return LigerFusedLinearGRPOLoss(
            loss_type=self.loss,
            importance_sampling_level=self.level,
            beta=self.beta,
            use_ref_model=self.beta != 0,
            delta=self.delta,
            use_bias_correction_kl=self.bias,
            max_completion_length=MAX_TOKENS,
            temperature=TEMPERATURE,
            compiled=False,
            **({"epsilon_high": CISPO_CAP} if self.loss == "cispo" else {}),
        )


def liger_cells() -> Iterator[LigerCell]:
    """Yields every combination; vespo takes weights per token only, in TRL too."""
    for loss, level, beta, delta in product(LOSSES, LEVELS, BETAS, DELTAS):
        for bias, ratio in product((False, True) if beta else (False,), (None, "token", "sequence")):
            if not (loss == "vespo" and ratio == "sequence"):
                yield LigerCell(loss, level, beta, delta, bias, ratio)


@dataclass(frozen=True)
class Problem:
    """A case whose log-probs come from hidden states [S, T, H] and a head [V, H]; padding is noise."""

    case: Case
    hidden: Tensor
    weight: Tensor
    ids: Tensor  # [S, T]
    mask: Tensor  # [S, T] bool


def problem(case: Case) -> Problem:
    """Returns hidden states for a case, which keeps its ratios, mismatches and reference gaps."""
    g = torch.Generator().manual_seed(case.seed)
    hidden = torch.randn(len(case.lengths), WIDTH, HIDDEN, generator=g)
    weight = torch.randn(VOCAB, HIDDEN, generator=g) / 4
    ids = torch.randint(0, VOCAB, hidden.shape[:2], generator=g)
    mask = case.mask(WIDTH)
    ids[mask] = case.ids
    case = case.to(torch.float32)
    logprobs, _ = fused_linear_logprobs(hidden[mask], weight, ids[mask], TEMPERATURE)
    moved = logprobs - case.logprobs
    assert case.old is not None
    case = replace(
        case,
        logprobs=logprobs,
        old=case.old + moved,
        ref=case.ref + moved,
        sampler=case.sampler + moved,
    )
    return Problem(case, hidden, weight, ids, mask)


def ours(p: Problem, cell: LigerCell) -> tuple[float, Tensor]:
    """Returns our value and d loss / d hidden [N, H]."""
    hidden = p.hidden[p.mask].clone().requires_grad_()
    logprobs, _ = fused_linear_logprobs(hidden, p.weight, p.ids[p.mask], TEMPERATURE)
    loss = policy_loss(logprobs, p.case.batch(), cell.ours()).loss
    return loss.item(), torch.autograd.grad(loss, hidden)[0]


def theirs(p: Problem, cell: LigerCell) -> tuple[float, Tensor, float]:
    """Returns Liger's value, d loss / d hidden [N, H] and the largest gradient that padding gets."""
    case, hidden = p.case, p.hidden.clone().requires_grad_()
    assert case.old is not None
    loss, _ = cell.theirs()(
        hidden,
        p.weight,
        p.ids,
        p.mask.long(),
        case.advantages,
        ref_per_token_logps=case.padded(case.ref, WIDTH, 1) if cell.beta else None,
        old_per_token_logps=case.padded(case.old, WIDTH, 2),
        vllm_is_ratio=_weights(p, cell),
    )
    (grad,) = torch.autograd.grad(loss, hidden)
    return loss.item(), grad[p.mask], grad[~p.mask].abs().max().item()


def _weights(p: Problem, cell: LigerCell) -> Tensor | None:
    """Returns the sampler's weights, an input of Liger's: [S, T] per token, [S, 1] per completion."""
    if cell.ratio is None:
        return None
    batch = p.case.batch()
    assert p.case.old is not None
    c, _ = correction_weights(p.case.old, batch, Segments.of(batch), cell.ours().correction)
    padded = p.case.padded(c, WIDTH).masked_fill(~p.mask, 1.0)
    return padded if cell.ratio == "token" else padded[:, :1]
