"""Random rollouts that conformance.py gives to every peer: packed for us, padded for the others."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.types import Completion

PROMPTS, GROUP, LONGEST = 4, 4, 13
MAX_TOKENS = 16  # above LONGEST, so that dr_grpo's divisor is not the padded width by chance
PAD, EOS, VOCAB = 0, 1, 97


@dataclass(frozen=True)
class Case:
    """One rollout of S completions, N tokens; what is per token is float64, in nats."""

    seed: int
    lengths: tuple[int, ...]
    ids: Tensor  # [N]
    advantages: Tensor  # [S]
    logprobs: Tensor  # [N] of the policy being trained
    old: Tensor | None  # [N]; None: TRL makes no pass for it, the ratio is 1
    ref: Tensor
    sampler: Tensor  # NaN where the engine reported nothing
    entropy: Tensor
    old_entropy: Tensor
    truncated: tuple[bool, ...] = (False,) * (PROMPTS * GROUP)
    """completions without an end token, which `mask_truncated` leaves out of the loss"""
    mask_truncated: bool = False

    @property
    def kept(self) -> Tensor:
        """[N] bool: tokens that train."""
        out = [not (self.mask_truncated and t) for t in self.truncated]
        return torch.tensor(out).repeat_interleave(torch.tensor(self.lengths))

    def per_completion(self, x: Tensor) -> list[Tensor]:
        """[N] -> S tensors."""
        return list(x.split(list(self.lengths)))

    def padded(self, x: Tensor, width: int, salt: int = 0) -> Tensor:
        """[N] -> [S, width]; the padding is noise, because a mask that works hides any number."""
        g = torch.Generator().manual_seed(1000 * self.seed + salt)
        out = -9 * torch.rand(len(self.lengths), width, generator=g, dtype=torch.float64).to(x.dtype)
        out[self.mask(width)] = x
        return out

    def mask(self, width: int) -> Tensor:
        """[S, width] bool: where a token is."""
        return torch.arange(width)[None] < torch.tensor(self.lengths)[:, None]

    def batch(self) -> RolloutBatch:
        """Returns the packed form that our losses take."""
        packed = RolloutBatch.pack(
            prompt_ids=[[7]] * PROMPTS,
            completions=[
                Completion(token_ids=i.tolist(), finish_reason="length" if t else "stop")
                for i, t in zip(self.per_completion(self.ids), self.truncated, strict=True)
            ],
            group_ids=[p for p in range(PROMPTS) for _ in range(GROUP)],
            advantages=self.advantages,
            max_tokens=MAX_TOKENS,
            mask_truncated=self.mask_truncated,
        )
        kept = self.kept
        return replace(
            packed,
            advantages=self.advantages[packed.sequence_ids],
            old_logprobs=None if self.old is None else self.old[kept],
            ref_logprobs=self.ref[kept],
            sampler_logprobs=self.sampler[kept],
            old_entropies=self.old_entropy[kept],
        )

    def to(self, dtype: torch.dtype) -> Case:
        """Returns the case with its real numbers in `dtype`."""
        real = {
            f.name: value.to(dtype)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor) and value.is_floating_point()
        }
        return replace(self, **real)


def random_case(seed: int) -> Case:
    """Returns a case with ratios on both sides of every bound that the cells use."""
    g = torch.Generator().manual_seed(seed)
    s = PROMPTS * GROUP
    lengths = torch.randint(1, LONGEST + 1, (s,), generator=g)
    lengths[torch.randint(0, s, (2,), generator=g)] = 1
    n, of = int(lengths.sum()), torch.arange(s).repeat_interleave(lengths)

    def noise(size: int, scale: float) -> Tensor:
        return scale * torch.randn(size, generator=g, dtype=torch.float64)

    ids = torch.randint(2, VOCAB, (n,), generator=g)
    ids[lengths.cumsum(0) - 1] = EOS
    advantages = noise(s, 1.0)
    advantages[torch.randint(0, s, (2,), generator=g)] = 0.0
    # One completion of one token has a ratio above every `delta`, which no geometric mean would reach.
    alone = int((lengths == 1).nonzero()[0])
    advantages[alone] = -1.3
    logprobs = -torch.rand(n, generator=g, dtype=torch.float64) * 3 - 0.01
    ratio = noise(s, 0.4)[of] + noise(n, 0.6)
    ratio[of == alone] = 1.7
    old = logprobs - ratio
    mismatch = noise(s, 0.25)[of] + noise(n, 0.5)
    return Case(
        seed=seed,
        lengths=tuple(lengths.tolist()),
        ids=ids,
        advantages=advantages,
        logprobs=logprobs,
        old=old,
        ref=logprobs + noise(n, 0.4),
        sampler=old - mismatch,
        # TRL takes quantiles of float32: such values make the same choice in both widths.
        entropy=(torch.rand(n, generator=g) * 2).double(),
        old_entropy=(torch.rand(n, generator=g) * 2).double(),
    )


def uncovered(
    case: Case, low: float = 0.2, high: float = 0.2, delta: float = 4.0, cap: float = 3.0
) -> list[str]:
    """Returns which bounds nothing in the case crosses; a case that tests everything returns none."""
    assert case.old is not None
    lengths = torch.tensor(case.lengths)
    of = torch.arange(len(lengths)).repeat_interleave(lengths)
    sums = {
        name: torch.zeros(len(lengths), dtype=torch.float64).index_add(0, of, x)
        for name, x in (("ratio", case.logprobs - case.old), ("mismatch", case.old - case.sampler))
    }
    a = case.advantages
    levels = {
        "token": ((case.logprobs - case.old).exp(), a[of]),
        "sequence": ((sums["ratio"] / lengths).exp(), a),
    }
    events = {
        f"{level}: {what}": hit
        for level, (rho, adv) in levels.items()
        for what, hit in {
            "clip low": (rho < 1 - low) & (adv < 0),
            "clip high": (rho > 1 + high) & (adv > 0),
            "delta": (rho > delta) & (adv < 0),
        }.items()
    }
    events["cispo's cap"] = (case.logprobs - case.old).exp() > 5
    for level, m in (("token", case.old - case.sampler), ("sequence", sums["mismatch"])):
        events[f"{level}: correction"] = m.exp() > cap
        events[f"{level}: correction below"] = m.exp() < 0.5
    return [name for name, hit in events.items() if not hit.any() or hit.all()]


def covering_seeds(count: int) -> list[int]:
    """Returns the first seeds whose cases cross every bound."""
    out: list[int] = []
    seed = 0
    while len(out) < count:
        if not uncovered(random_case(seed)):
            out.append(seed)
        seed += 1
    return out
