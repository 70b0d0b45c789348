"""What conformance.py compares with TRL: one `Cell` per combination of options, in both vocabularies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from peers.cases import EOS, Case

from grpo_lightning.losses import CorrectionConfig, LossConfig

LOSSES = (
    "grpo",
    "bnpo",
    "dr_grpo",
    "dapo",
    "cispo",
    "sapo",
    "luspo",
    "vespo",
)  # TRL's names, all of them ours
LEVELS = ("token", "sequence")
BETAS = (0.0, 0.04)
DELTAS = (None, 4.0)
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")  # TRL's names
CAP = 3.0  # TRL's default vllm_importance_sampling_clip_max
CISPO_CAP = 5.0  # absolute on both sides; TRL inherits 0.2 where none is given, which we refuse

Options = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Extra:
    """Options outside the grid, as TRL and we spell them, and what they need of the batch."""

    name: str
    trl: Options = field(default_factory=dict)
    ours: Options = field(default_factory=dict)
    low: float | None = None
    """lower bound of the sampler correction"""
    change: Callable[[Case], Case] = lambda case: case
    modes: tuple[str | None, ...] = ("token_truncate",)
    losses: tuple[str, ...] = LOSSES
    levels: tuple[str, ...] = ("token",)
    optimizer_steps: bool = True
    """whether TRL can spread the rollout over two optimizer steps with it"""


@dataclass(frozen=True)
class Cell:
    """One combination of options."""

    loss: str
    level: str
    beta: float
    delta: float | None
    mode: str | None
    extra: Extra = Extra("")

    @property
    def name(self) -> str:
        """What is printed where the cell fails."""
        grid = (
            f"{self.loss}, {self.level}, beta {self.beta}, delta {self.delta}, {self.mode or 'no correction'}"
        )
        return f"{grid}, {self.extra.name}" if self.extra.name else grid

    def trl(self) -> Options:
        """Returns the arguments of `GRPOConfig`; what is not in it keeps TRL's default."""
        out: Options = {"loss_type": self.loss, "importance_sampling_level": self.level, "beta": self.beta}
        out["delta"] = self.delta
        if self.loss == "cispo":
            out["epsilon_high"] = CISPO_CAP
        if self.mode is not None:
            out |= {"use_vllm": True, "vllm_importance_sampling_mode": self.mode}
            out |= {
                "vllm_importance_sampling_clip_max": CAP,
                "vllm_importance_sampling_clip_min": self.extra.low,
            }
        return out | self.extra.trl

    def ours(self) -> LossConfig:
        """Returns the same options as docs/losses.md translates them."""
        level = self.level
        if level == "sequence" and self.loss in ("cispo", "sapo"):
            level = "sequence_token"  # the only level beside `token` that they have here
        if self.loss == "vespo":
            level = "token"  # likewise
        options: Options = {"ratio_level": level, "kl_coef": self.beta, "dual_clip": self.delta}
        options |= {"clip_low": 0.2, "clip_high": 0.2, "cispo_weight_max": CISPO_CAP}
        return LossConfig(self.loss, correction=self.correction(), **options | self.extra.ours).resolve()

    def correction(self) -> CorrectionConfig:
        """Returns TRL's mode as level and mode."""
        if self.mode is None:
            return CorrectionConfig(mode="off")
        level, mode = self.mode.split("_")
        return CorrectionConfig(level=level, mode=mode, low=self.extra.low, high=CAP)


def grid() -> Iterator[Cell]:
    """Yields the 256 cells and, without a sampler correction, 64 more."""
    for options in product(LOSSES, LEVELS, BETAS, DELTAS, (*MODES, None)):
        yield Cell(*options)


def extras() -> Iterator[Cell]:
    """Yields every extra for every loss it is meant for."""
    for extra in EXTRAS:
        for loss, level, mode in product(extra.losses, extra.levels, extra.modes):
            if loss != "vespo" or mode not in ("sequence_truncate", "sequence_mask"):  # which TRL refuses
                yield Cell(loss, level, 0.04, None, mode, extra)


def _far_ratio(case: Case) -> Case:
    assert case.old is not None
    old = case.old.clone()
    place = _first(case, case.advantages < 0)
    old[place] = case.logprobs[place] - 22
    return replace(case, old=old)


def _far_reference(case: Case) -> Case:
    ref = case.ref.clone()
    ref[3] = case.logprobs[3] + 22
    return replace(case, ref=ref)


def _some_missing(case: Case) -> Case:
    sampler = case.sampler.clone()
    sampler[::3] = torch.nan
    return replace(case, sampler=sampler)


def _one_unreported(case: Case) -> Case:
    """A completion with A < 0 that left the old policy and of which the engine reported nothing."""
    assert case.old is not None
    of = torch.arange(len(case.lengths)).repeat_interleave(torch.tensor(case.lengths))
    start = _first(case, case.advantages < 0)
    mine = of == of[start]
    sampler = case.sampler.masked_fill(mine, torch.nan)
    return replace(case, sampler=sampler, old=torch.where(mine, case.logprobs + 0.5, case.old))


def _first(case: Case, wanted: torch.Tensor) -> int:
    """Returns the first token of the first completion that is wanted."""
    s = int(wanted.nonzero()[0])
    return sum(case.lengths[:s])


def _truncated(case: Case) -> Case:
    out = tuple(s % 5 == 1 for s in range(len(case.lengths)))
    ids = case.ids.clone()
    ends = torch.tensor(case.lengths).cumsum(0) - 1
    ids[ends[torch.tensor(out)]] = EOS + 1
    return replace(case, ids=ids, truncated=out, mask_truncated=True)


def _off_policy(name: str, change: Callable[[Case], Case], **more: Any) -> Extra:
    trl, ours = {"off_policy_mask_threshold": 0.1}, {"off_policy_threshold": 0.1}
    return Extra(name, trl, ours, change=change, **more)


PPO = tuple(name for name in LOSSES if name not in ("cispo", "sapo", "vespo"))
BONUS = "entropy bonus"
TOP = "top_entropy_quantile"
FAR_RATIO = "log-ratio of 22"
FAR_REFERENCE = "reference 22 nats away"
UNREPORTED = "off_policy_mask_threshold, log-probs missing"
MOVED = f"{TOP}, entropy has moved"
TRUNCATED = "mask_truncated_completions"
LOW_DELTA = "delta 1.1, below 1 + epsilon_high"
LOW_CAP = "cispo's cap left at TRL's default, 0.2"
SHAPES = {"vespo_k_pos": 1.5, "vespo_lambda_neg": 1.7}


def _still(case: Case) -> Case:
    """The policy's entropies are those of the old pass, as before the first update."""
    return replace(case, old_entropy=case.entropy)


EXTRAS = (
    Extra("lower bound of the correction 0.5", low=0.5, modes=MODES),
    Extra(
        "epsilon 0.1, epsilon_high 0.28",
        {"epsilon": 0.1, "epsilon_high": 0.28},
        {"clip_low": 0.1, "clip_high": 0.28},
        losses=PPO,
        levels=LEVELS,
    ),
    Extra(
        "cispo's cap 1.2",
        {"epsilon_high": 1.2},
        {"cispo_weight_max": 1.2},
        losses=("cispo",),
        levels=LEVELS,
    ),
    Extra(
        "other sapo and vespo parameters",
        {"sapo_temperature_pos": 0.75, "sapo_temperature_neg": 1.3, **SHAPES},
        {"sapo_tau_pos": 0.75, "sapo_tau_neg": 1.3, **SHAPES},
        losses=("sapo", "vespo"),
    ),
    Extra("use_bias_correction_kl off", {"use_bias_correction_kl": False}, {"kl_bias_correction": False}),
    Extra(
        "no old pass",
        {"num_iterations": 1},
        change=lambda c: replace(c, old=None),
        modes=(None,),
        levels=LEVELS,
        optimizer_steps=False,
    ),
    Extra(
        TRUNCATED,
        {"mask_truncated_completions": True},
        change=_truncated,
        modes=(*MODES, None),
        levels=LEVELS,
    ),
    Extra("log-probs missing from the engine", change=_some_missing, modes=MODES),
    _off_policy("off_policy_mask_threshold", lambda case: case, modes=("token_truncate", None)),
    _off_policy(UNREPORTED, _one_unreported),
    Extra(BONUS, {"entropy_coef": 0.05}, {"entropy_coef": 0.05}),
    Extra(TOP, {TOP: 0.4}, {TOP: 0.4}, change=_still),
    Extra(
        f"{TOP}, {BONUS}", {TOP: 0.4, "entropy_coef": 0.05}, {TOP: 0.4, "entropy_coef": 0.05}, change=_still
    ),
    Extra(MOVED, {TOP: 0.4}, {TOP: 0.4}),
    Extra(LOW_DELTA, {"delta": 1.1}, {"dual_clip": 1.1}, losses=PPO),
    Extra(LOW_CAP, {"epsilon_high": None}, {"cispo_weight_max": 0.2}, losses=("cispo",)),
    Extra(FAR_RATIO, change=_far_ratio),
    Extra(FAR_REFERENCE, change=_far_reference),
)
