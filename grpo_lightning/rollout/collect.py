"""One rollout: prompts in, scored and packed completions out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from grpo_lightning import advantages as adv
from grpo_lightning.batch import RolloutBatch
from grpo_lightning.errors import EngineError
from grpo_lightning.metrics import all_sum, length_stats, reward_stats
from grpo_lightning.rewards.suite import Rewards, Scores
from grpo_lightning.rollout.engine import Request, RolloutEngine, describe, sample_seeds
from grpo_lightning.samples import Completion, PromptBatch, SamplingParams
from grpo_lightning.stats import Stat, mean_of

Phase = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """What a rollout left: this rank's packed batch, statistics, and samples for people to read."""

    batch: RolloutBatch
    stats: dict[str, Stat]
    requests: list[Request]
    completions: list[list[Completion]]
    samples: dict[str, list[Any]]
    """columns of S rows: prompt, completion, one per reward function, reward, advantage, and what rewards
    logged"""
    scores: Scores
    rewards: adv.RewardTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Collector:
    """How rollouts are made; holds settings, no state.

    Args:
        engine: samples completions.
        rewards: scores them.
        tokenizer: decodes them for the rewards.
        num_generations: completions per prompt.
        sampling: how they are sampled.
        seed: of the run; with rollout, prompt and sample it gives every completion its own.
        advantage: a row of `ADVANTAGES`.
        advantage_clip: lowest and highest advantage.
        mask_truncated: completions cut at `max_tokens` do not train.
        phase: context manager around each phase, for profilers.
    """

    engine: RolloutEngine
    rewards: Rewards
    tokenizer: Any
    num_generations: int
    sampling: SamplingParams
    seed: int
    advantage: str = "group_norm"
    advantage_clip: tuple[float | None, float | None] | None = None
    mask_truncated: bool = False
    phase: Phase = lambda name: nullcontext()

    def collect(self, prompts: PromptBatch, policy_version: int, trainer_state: Any) -> Rollout:
        """Returns the rollout of `prompts` under the policy the engine serves.

        Raises:
            EngineError: the engine serves another version, or returned the wrong number of completions.
            RewardError: a reward function failed.
        """
        if self.engine.policy_version != policy_version:
            raise EngineError(
                f"{describe(self.engine)} serves policy version {self.engine.policy_version}, "
                f"but version {policy_version} is being trained"
            )
        requests = [
            Request(
                prompt_ids=ids,
                uid=uid,
                rollout_index=prompts.rollout_index,
                seeds=sample_seeds(self.seed, prompts.rollout_index, uid, self.num_generations),
            )
            for ids, uid in zip(prompts.prompt_ids, prompts.uids, strict=True)
        ]
        seconds: dict[str, float] = {}
        with self._timed("generate", seconds):
            completions = self.engine.generate(requests, self.sampling) if requests else []
        if [len(c) for c in completions] != [len(r.seeds) for r in requests]:
            raise EngineError(f"{describe(self.engine)} returned {[len(c) for c in completions]} completions")
        with self._timed("reward", seconds):
            texts, scores = self._score(prompts, completions, trainer_state)
        group_ids = torch.arange(len(requests)).repeat_interleave(self.num_generations)
        by_function = torch.tensor(scores.values, dtype=torch.float64).reshape(len(texts), len(scores.names))
        rewards = adv.RewardTable(
            by_function=by_function,
            weights=torch.tensor(scores.weights, dtype=torch.float64),
            group_ids=group_ids,
            num_groups=len(requests),
            lengths=torch.tensor([len(c.token_ids) for group in completions for c in group]),
            all_sum=all_sum,
        )
        advantages = adv.compute_advantages(self.advantage, rewards, clip=self.advantage_clip)
        batch = self._packed(prompts, completions, rewards, advantages, policy_version)
        stats = {
            **length_stats(completions, self.num_generations * sum(map(len, prompts.prompt_ids))),
            **reward_stats(scores.names, by_function, rewards.total, group_ids, len(requests)),
            **{name: mean_of([value]) for name, value in scores.metrics.items()},
            **{f"time/{name}": mean_of([s]) for name, s in seconds.items()},
        }
        return Rollout(
            batch=batch,
            stats=stats,
            requests=requests,
            completions=completions,
            samples=_samples(prompts, texts, scores, rewards.total, advantages, self.num_generations),
            scores=scores,
            rewards=rewards,
        )

    def _packed(
        self,
        prompts: PromptBatch,
        completions: Sequence[Sequence[Completion]],
        rewards: adv.RewardTable,
        advantages: Tensor,
        policy_version: int,
    ) -> RolloutBatch:
        flat, truncation = [c for group in completions for c in group], self.sampling.truncation
        if self.sampling.distorted_by:  # the engine's log-probabilities are not those of a policy
            flat, truncation = [replace(c, logprobs=None) for c in flat], None
        return RolloutBatch.pack(
            prompt_ids=prompts.prompt_ids,
            completions=flat,
            group_ids=rewards.group_ids.tolist(),
            advantages=advantages,
            rewards=rewards.total,
            max_tokens=self.sampling.max_tokens,
            temperature=self.sampling.temperature,
            policy_version=policy_version,
            truncation=truncation,
            mask_truncated=self.mask_truncated,
        )

    def penalised(self, rollout: Rollout, penalty: Tensor) -> RolloutBatch:
        """Returns the batch with `penalty` [S] taken off the rewards, and the advantages that follow."""
        table = replace(rollout.rewards, penalty=penalty.double())
        advantages = adv.compute_advantages(self.advantage, table, clip=self.advantage_clip)
        return replace(rollout.batch, rewards=table.total.float(), advantages=advantages)

    @contextmanager
    def _timed(self, name: str, seconds: dict[str, float]) -> Iterator[None]:
        started = perf_counter()
        with self.phase(name):
            yield
        seconds[name] = perf_counter() - started

    def _score(
        self, prompts: PromptBatch, completions: Sequence[Sequence[Completion]], trainer_state: Any
    ) -> tuple[list[str], Scores]:
        flat = [c for group in completions for c in group]
        texts: list[str] = [self.tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in flat]
        scores = self.rewards.score(
            prompts=repeat(prompts.prompts, self.num_generations),
            completions=texts,
            completion_ids=[c.token_ids for c in flat],
            columns={k: repeat(v, self.num_generations) for k, v in prompts.columns.items()},
            trainer_state=trainer_state,
        )
        return texts, scores


def repeat(items: Sequence[Any], count: int) -> list[Any]:
    """Returns each item `count` times, neighbours together."""
    return [x for x in items for _ in range(count)]


def last_text(prompt: Any) -> str:
    """Returns what a person wants to see of a prompt: the text, or the last message's."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _samples(
    prompts: PromptBatch, texts: list[str], scores: Scores, total: Tensor, advantages: Tensor, count: int
) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {
        "prompt": [last_text(p) for p in repeat(prompts.prompts, count)],
        "completion": texts,
        **{name: [row[k] for row in scores.values] for k, name in enumerate(scores.names)},
        "reward": total.tolist(),
        "advantage": advantages.tolist(),
    }
    extra: Mapping[str, list[Any]] = scores.extra
    return columns | {k: v for k, v in extra.items() if k not in columns}
