"""Does the engine sample from the policy that trains? Asked before every on-policy optimizer step.

1. Measure: KL(engine || trainer) over a fair sample of all sampled tokens, from the training forward.
2. Examine, on the first step, every `EVERY` steps, and when that estimate leaves its usual range: the same
   completions are scored by the model as it was loaded, and once more with random rounding (`rounding.py`).
3. Decide: a distance counts that is more than `FACTOR` times what rounding does to these very tokens, even
   without the `LEFT_OUT` completions that say so loudest. Distances are k3 sums over completions.

| engine from trainer | engine from stock | trainer from stock | so |
|---|---|---|---|
| apart | apart | | another policy: sync, measure again for the message, stop |
| apart | | apart | kernels compute something else: stop |
| else | | | rounding: go on |
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from grpo_lightning.engines.base import Request, describe, sample_seeds
from grpo_lightning.engines.weight_sync import PolicyWeights
from grpo_lightning.errors import ConfigError, EngineError, GRPOError, choices
from grpo_lightning.metrics.logging import gather, log_numbers
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.policy.verification import Distances, distances
from grpo_lightning.rollout.collector import Collector

ACTIONS = ("stop", "warn")
ENOUGH = 8
"""effective completions that a judgement needs; estimates add up over optimizer steps until then"""
FACTOR = 4.0
"""times the measured rounding: two correct programs are 0.3 to 1 times it apart, see docs/rollouts.md"""
NEGLIGIBLE = 1e-6
"""nats a token, below which no distance matters: in fp32 engines approximate functions"""
LEFT_OUT = 2
EVERY = 100
"""judgements after which rounding is measured anew, since a policy that grows surer rounds to less"""
EXAMINED, EXAMINED_TOKENS = 32, 8192
"""completions per rank of an examination, and tokens unless these are fewer than `ENOUGH` completions"""
PROMPTS, SAMPLES = 8, 4
"""sampled anew after another sync, per rank"""


class Verdict(NamedTuple):
    """What an examination found: per token, in nats; and which pairs rounding does not explain."""

    kl: dict[str, float]
    allowed: float
    apart: frozenset[str]


def judge(found: Distances) -> Verdict:
    """Returns which of engine, trainer and the model as loaded are further apart than rounding explains."""
    tokens = found.tokens.sum()
    allowed = torch.clamp(FACTOR * found.rounding.sum() / tokens, min=NEGLIGIBLE)
    pairs = {k: v for k, v in found._asdict().items() if k not in ("tokens", "rounding")}
    apart = {
        name
        for name, sums in pairs.items()
        if sums.sum() - sums.topk(min(LEFT_OUT, len(sums))).values.sum() > allowed * tokens
    }
    kl = {name: float(sums.sum() / tokens) for name, sums in {**pairs, "rounding": found.rounding}.items()}
    return Verdict(kl, float(allowed), frozenset(apart))


class PolicyCheck:
    """Stops a run whose engine samples from another policy than trains, before a weight changes.

    All ranks decide from the same sums. Not judged: steps after the first of a rollout, dropout, engines
    that say their numbers need not be the policy's (`exact`), sampling whose numbers cannot be compared.

    Args:
        action: stop raises, warn says it and goes on.
    """

    def __init__(self, action: str) -> None:
        if action not in ACTIONS:
            raise ConfigError(f"rollout.on_policy_mismatch is {choices(action, ACTIONS)}")
        self.action = action
        self.level: float | None = None
        """nats a token above which the running estimate asks for an examination; None: at once"""
        self.micro_batches: Sequence[RolloutBatch] = ()
        """the micro-batches of the optimizer step under way, on the host"""
        self._sums = torch.zeros(5, dtype=torch.float64)
        self._judged = 0
        self._evidence: list[Distances] = []
        self._said = False

    def before_step(self, collector: Collector, trainer: pl.Trainer, module: Any) -> None:
        """Judges the engine by the micro-batches of the optimizer step that is about to be taken.

        Raises:
            EngineError: the engine is apart from the trainer and from the model as it was loaded.
            GRPOError: the trainer is, so that its kernels are to blame.
        """
        stat = module.step_stats.get("sampling/kl_engine_trainer")
        engine, policy = collector.engine, module.policy
        if stat is None or not getattr(engine, "exact", True) or policy.drops_out:
            return
        self._sums += stat.value.double().cpu()
        if not (self._evidence or self._asks()):
            return
        own = _examined(self.micro_batches, module.step_gaps)
        seed = collector.seed + trainer.global_step
        self._evidence.append(_over_ranks([distances(policy, b, gap, seed) for b, gap in own]))
        found = _join(self._evidence)
        if len(found.tokens) < ENOUGH:
            return
        self._evidence = []
        verdict = judge(found)
        log_numbers(module, {f"check/kl_{name}": x for name, x in verdict.kl.items()})
        self._decide(verdict, found, [b for b, _ in own], collector, trainer, module)

    def _asks(self) -> bool:
        """Returns whether an examination is due; the running estimate starts anew once it was judged."""
        y, n, yy, yn, nn = self._sums.tolist()
        if not n or n * n / nn < ENOUGH:
            return False
        kl = y / n
        error = max(yy - 2 * kl * yn + kl * kl * nn, 0.0) ** 0.5 / n
        self._sums.zero_()
        self._judged += 1
        return self.level is None or self._judged >= EVERY or kl - error > self.level

    def _decide(
        self,
        verdict: Verdict,
        found: Distances,
        own: Sequence[RolloutBatch],
        collector: Collector,
        trainer: pl.Trainer,
        module: Any,
    ) -> None:
        asked, self._judged = self.level, 0
        kl, apart = verdict.kl, verdict.apart
        usual = 2 * max(kl["rounding"], kl["engine_trainer"])
        self.level = max(min(usual, verdict.allowed), NEGLIGIBLE)
        over = f"over {int(found.tokens.sum())} tokens of {len(found.tokens)} completions"
        if {"engine_trainer", "engine_stock"} <= apart:
            again = _again(own, collector, trainer, module)
            self._end(EngineError(_another_policy(collector.engine, verdict, over, again)))
        elif {"engine_trainer", "trainer_stock"} <= apart:
            self._end(GRPOError(_another_forward(module.policy, verdict, over)))
        elif asked is not None and kl["engine_trainer"] > asked and not self._said:
            self._said = True
            rank_zero_warn(
                f"sampling/kl_engine_trainer is {kl['engine_trainer']:.3g} nats a token {over}; rounding "
                f"explains it: the model as loaded is {kl['engine_stock']:.3g} from the engine, and "
                f"{kl['rounding']:.3g} from itself when it rounds at random"
            )

    def _end(self, error: GRPOError) -> None:
        if self.action == "stop":
            raise error
        self.level = float("inf")  # until rounding is measured anew
        rank_zero_warn(f"{error} (rollout.on_policy_mismatch: warn)")

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run goes on with, as plain types."""
        return {"level": self.level, "sums": self._sums.tolist(), "judged": self._judged, "said": self._said}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self.level, self._judged, self._said = state["level"], state["judged"], state["said"]
        self._sums = torch.tensor(state["sums"], dtype=torch.float64)


def _examined(
    micro_batches: Sequence[RolloutBatch], gaps: Sequence[Tensor | None]
) -> list[tuple[RolloutBatch, Tensor]]:
    """Returns completions of the micro-batches, evenly spaced, and their part of the gaps; on the device."""
    known = [i for i, gap in enumerate(gaps) if gap is not None]
    lengths = {i: micro_batches[i].lengths for i in known}
    found = [(i, s) for i in known for s, n in enumerate(lengths[i]) if n]
    mean = sum(lengths[i][s] for i, s in found) / max(len(found), 1)
    count = min(len(found), EXAMINED, max(ENOUGH, int(EXAMINED_TOKENS / max(mean, 1))))
    chosen = [found[k * len(found) // count] for k in range(count)]
    out: list[tuple[RolloutBatch, Tensor]] = []
    for i in known:
        gap, mine = gaps[i], [s for j, s in chosen if j == i]
        if gap is not None and mine:
            tokens = torch.isin(micro_batches[i].sequence_ids, torch.tensor(mine))
            out.append((micro_batches[i].take(mine).to(gap.device), gap[tokens.to(gap.device)]))
    return out


def _again(
    own: Sequence[RolloutBatch], collector: Collector, trainer: pl.Trainer, module: Any
) -> Verdict | str:
    """Returns what another sync and new samples of the same prompts give, or why there is no such thing."""
    engine, policy, version = collector.engine, module.policy, trainer.global_step
    prompts = [ids for b in own for ids in _prompts(b)][:PROMPTS]
    seed = collector.seed
    requests = [  # no rollout has a negative number, so no sample has had these seeds
        Request(prompt_ids=ids, uid=i, seeds=sample_seeds(seed, -version - 2, i, SAMPLES))
        for i, ids in enumerate(prompts)
    ]
    failed, found = "", []
    try:
        engine.sync(PolicyWeights(policy), version)
        groups = engine.generate(requests, collector.sampling) if requests else []
        engine.sleep()
        found = [_packed(requests, groups, collector)] if groups else []
    except EngineError as error:
        failed = str(error)
    failed = "; ".join(filter(None, gather(failed)))
    if failed:
        return failed
    pieces = _over_ranks([distances(policy, b.to(module.device), None, version) for b in found])
    return judge(pieces)


def _prompts(batch: RolloutBatch) -> list[list[int]]:
    starts = batch.row_starts().prompts
    ids = batch.input_ids.tolist()
    return [ids[a : a + n] for a, n in zip(starts, batch.prompt_lengths, strict=True)]


def _packed(requests: Sequence[Request], groups: Sequence[Any], collector: Collector) -> RolloutBatch:
    flat = [c for group in groups for c in group]
    return RolloutBatch.pack(
        prompt_ids=[r.prompt_ids for r in requests],
        completions=flat,
        group_ids=[i for i, group in enumerate(groups) for _ in group],
        advantages=torch.zeros(len(flat)),
        max_tokens=collector.sampling.max_tokens,
        temperature=collector.sampling.temperature,
        truncation=collector.sampling.truncation,
    )


def _join(found: Sequence[Distances]) -> Distances:
    empty = Distances(*[torch.zeros(0, dtype=torch.float64)] * len(Distances._fields))
    return Distances(*(torch.cat(column) for column in zip(empty, *found, strict=True)))


def _over_ranks(found: Sequence[Distances]) -> Distances:
    return _join([Distances(*other) for other in gather(tuple(_join(found)))])


def _another_policy(engine: Any, verdict: Verdict, over: str, again: Verdict | str) -> str:
    kl = verdict.kl
    if isinstance(again, str):
        synced = f"it could not be synced again ({again})"
    else:
        now, cured = again.kl["engine_trainer"], "engine_trainer" not in again.apart
        synced = f"after another sync {now:.3g}" + (
            ", so the last one had not arrived" if cured else ", so another sync does not help"
        )
    return (
        f"{describe(engine)} does not sample from the policy that trains: {over} KL(engine || trainer) is "
        f"{kl['engine_trainer']:.3g} nats a token, KL(engine || model as loaded) {kl['engine_stock']:.3g}, "
        f"{synced}; rounding explains {verdict.allowed:.3g}. No weight has changed since the last optimizer "
        "step: check rollout.engine, or take grpo_lightning.engines.HFEngine"
    )


def _another_forward(policy: Any, verdict: Verdict, over: str) -> str:
    kl = verdict.kl
    on = [key for key, chosen in policy.prepared.chosen.items() if chosen and key != "loss"]
    return (
        f"the packed forward computes something else than the model as loaded: {over} it is "
        f"{kl['trainer_stock']:.3g} nats a token from it (k3), {kl['engine_trainer']:.3g} from the engine, "
        f"which is {kl['engine_stock']:.3g} from the model as loaded; rounding explains "
        f"{verdict.allowed:.3g}. Kernels: {', '.join(on) or 'none'}; "
        "switch them off (model.kernels) or use another architecture"
    )
