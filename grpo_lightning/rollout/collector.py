"""One rollout: prompts in, scored and packed completions out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_lightning import advantages as adv
from grpo_lightning.engines.base import Request, RolloutEngine, describe, sample_seeds
from grpo_lightning.engines.process_guard import random_kept
from grpo_lightning.engines.session import open_session
from grpo_lightning.errors import ConfigError, EngineError
from grpo_lightning.metrics.logging import all_sum, length_stats, raise_together, reward_stats
from grpo_lightning.metrics.reduce import Stat, mean_of, reduced
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.rewards.suite import Rewards, Scores
from grpo_lightning.rollout.checks import bad_advantages, bad_logprobs, bad_penalty
from grpo_lightning.rollout.dynamic_sampling import GroupSlot, run_dynamic_sampling
from grpo_lightning.types import Completion, PromptBatch, SamplingParams

Phase = Callable[[str], AbstractContextManager[Any]]
Alone = Callable[[], AbstractContextManager[Any]]


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


class Done(NamedTuple):
    """P requests and what came of them; texts and scores of all S completions in order."""

    requests: list[Request]
    completions: list[list[Completion]]
    texts: list[str]
    scores: Scores


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
        by_group: rewards are called group by group, beside decoding; groups without signal make way for the
            prompts' spares.
        phase: context manager around each phase, for profilers.
        alone: context manager around what a rank does without the others: sampling and rewards.
        all_ranks: advantages look at the rewards of all ranks; not in evaluation, where one rank may have
            fewer batches than another.
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
    by_group: bool = False
    phase: Phase = lambda name: nullcontext()
    alone: Alone = nullcontext
    all_ranks: bool = True

    def collect(
        self,
        prompts: PromptBatch,
        policy_version: int,
        trainer_state: Any,
        seconds: Mapping[str, float] | None = None,
    ) -> Rollout:
        """Returns the rollout of `prompts` under the policy the engine serves.

        Args:
            prompts: of one rank.
            policy_version: what the engine has to serve.
            trainer_state: goes to the reward functions.
            seconds: what phases before this one took, to be logged beside its own.

        Raises:
            EngineError: the engine serves another version, or returned the wrong number of completions.
            RewardError: a reward function failed.
        """
        if self.engine.policy_version != policy_version:
            raise EngineError(
                f"{describe(self.engine)} serves policy version {self.engine.policy_version}, "
                f"but version {policy_version} is being trained"
            )
        seconds = dict(seconds or {})
        replaced = 0
        with self.alone():
            if self.by_group and len(prompts):
                prompts, done, replaced = self._group_by_group(prompts, trainer_state, seconds)
            else:
                done = self._all_at_once(prompts, trainer_state, seconds)
        requests, completions, texts, scores = done
        if [len(c) for c in completions] != [len(r.seeds) for r in requests]:
            raise EngineError(f"{describe(self.engine)} returned {[len(c) for c in completions]} completions")
        raise_together(bad_logprobs(self.engine, requests, completions), self.all_ranks)
        rewards = self._rewards(scores, completions, len(requests))
        samples = _samples(prompts, texts, scores, rewards.total, self.num_generations)
        advantages = self._advantages(rewards, samples)
        batch = self._packed(prompts, completions, rewards, advantages, policy_version)
        stats = {
            **length_stats(completions, self.num_generations * sum(map(len, prompts.prompt_ids))),
            **reward_stats(
                scores.names, rewards.by_function, rewards.total, rewards.group_ids, len(requests)
            ),
            **{f"time/{name}": mean_of([s]) for name, s in seconds.items()},
            **({"rollout/replaced_groups": reduced("sum", float(replaced))} if self.by_group else {}),
        }
        return Rollout(
            batch=batch,
            stats=stats,
            requests=requests,
            completions=completions,
            samples=samples | {"advantage": advantages.tolist()},
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
        if self.sampling.off_policy_options:  # the engine's log-probabilities are not those of a policy
            flat, truncation = [replace(c, logprobs=None) for c in flat], None
        return RolloutBatch.pack(
            prompt_ids=prompts.prompt_ids,
            completions=flat,
            group_ids=rewards.group_ids.tolist(),
            advantages=advantages,
            rewards=rewards.total,
            max_tokens=self.sampling.max_tokens,
            temperature=self.sampling.temperature,
            policy_versions=policy_version,
            truncation=truncation,
            mask_truncated=self.mask_truncated,
        )

    def penalised(self, rollout: Rollout, penalty: Tensor) -> RolloutBatch:
        """Returns the batch with `penalty` [S] taken off the rewards, and the advantages that follow.

        Both go into the rollout's samples.

        Raises:
            GRPOError: a penalty is not finite; nan would make its completion look unscored.
        """
        raise_together(bad_penalty(penalty), self.all_ranks)
        table = replace(rollout.rewards, penalty=penalty.double())
        advantages = self._advantages(table, rollout.samples)
        batch, rewards = rollout.batch, table.total.float()
        rollout.samples.update(advantage=advantages.float().tolist(), penalised_reward=rewards.tolist())
        return replace(batch, rewards=rewards, advantages=advantages.float()[batch.sequence_ids])

    def _advantages(self, table: adv.RewardTable, samples: Mapping[str, list[Any]]) -> Tensor:
        """Returns advantages [S]; raises RewardError, showing the first sample whose own is not finite."""
        out = adv.compute_advantages(self.advantage, table, clip=self.advantage_clip)
        raise_together(bad_advantages(out, self.advantage, table, samples), self.all_ranks)
        return out

    @contextmanager
    def _timed(self, name: str, seconds: dict[str, float]) -> Iterator[None]:
        started = perf_counter()
        with self.phase(name):
            yield
        seconds[name] = perf_counter() - started

    def _request(self, prompts: PromptBatch, i: int) -> Request:
        uid, rollout_index = prompts.uids[i], prompts.rollout_index
        return Request(
            prompt_ids=prompts.prompt_ids[i],
            uid=uid,
            rollout_index=rollout_index,
            model_inputs=prompts.model_inputs[i] if prompts.model_inputs else {},
            seeds=sample_seeds(self.seed, rollout_index, uid, self.num_generations),
        )

    def _all_at_once(self, prompts: PromptBatch, trainer_state: Any, seconds: dict[str, float]) -> Done:
        requests = [self._request(prompts, i) for i in range(len(prompts))]
        with self._timed("generate", seconds):
            completions = self.engine.generate(requests, self.sampling) if requests else []
        with self._timed("reward", seconds):
            flat = [c for group in completions for c in group]
            texts, scores = self._score(prompts, flat, trainer_state)
        return Done(requests, completions, texts, scores)

    def _group_by_group(
        self, prompts: PromptBatch, trainer_state: Any, seconds: dict[str, float]
    ) -> tuple[PromptBatch, Done, int]:
        """Returns the prompts taken, what came of them, and how many groups were replaced on the way."""
        slots = [GroupSlot([b.take(i) for b in (prompts, *prompts.spares)]) for i in range(len(prompts))]

        def silent(slot: GroupSlot) -> bool:
            assert slot.scores is not None
            table = self._rewards(slot.scores, [slot.completions], 1, all_ranks=False)
            return bool(table.zero_variance_groups(self.advantage))

        # The states of random numbers are the process's: here a reward and the engine use them side by side.
        with self._timed("generate", seconds), random_kept():
            replaced = run_dynamic_sampling(
                slots,
                open_session(self.engine, self.sampling),
                ask=lambda prompt: self._request(prompt, 0),
                score=lambda prompt, group: self._score(prompt, group, trainer_state),
                silent=silent,
            )
        done = Done(
            [p.request for p in slots if p.request is not None],
            [p.completions for p in slots],
            [text for p in slots for text in p.texts],
            Scores.join([p.scores for p in slots if p.scores is not None]),
        )
        return PromptBatch.join([p.prompt for p in slots]), done, replaced

    def _rewards(
        self, scores: Scores, completions: list[list[Completion]], num_groups: int, all_ranks: bool = True
    ) -> adv.RewardTable:
        by_function = torch.tensor(scores.values, dtype=torch.float64)
        options: dict[str, Any] = {"all_sum": all_sum} if all_ranks and self.all_ranks else {}
        return adv.RewardTable(
            by_function=by_function.reshape(len(scores.values), len(scores.names)),
            weights=torch.tensor(scores.weights, dtype=torch.float64),
            group_ids=torch.arange(num_groups).repeat_interleave(self.num_generations),
            num_groups=num_groups,
            lengths=torch.tensor([len(c.token_ids) for group in completions for c in group]),
            **options,
        )

    def _score(
        self, prompts: PromptBatch, completions: Sequence[Completion], trainer_state: Any
    ) -> tuple[list[str], Scores]:
        texts: list[str] = [self.tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]
        scores = self.rewards.score(
            prompts=repeat(prompts.prompts, self.num_generations),
            completions=texts,
            completion_ids=[c.token_ids for c in completions],
            columns={k: repeat(v, self.num_generations) for k, v in prompts.columns.items()},
            trainer_state=trainer_state,
            group_size=self.num_generations,
        )
        return texts, scores


def repeat(items: Sequence[Any], count: int) -> list[Any]:
    """Returns each item `count` times, neighbours together."""
    return [x for x in items for _ in range(count)]


def last_text(prompt: Any) -> str:
    """Returns what a person wants to see of a prompt: the text, or the last message's."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _samples(
    prompts: PromptBatch, texts: list[str], scores: Scores, total: Tensor, count: int
) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {
        "prompt": [last_text(p) for p in repeat(prompts.prompts, count)],
        "completion": texts,
        **{name: [row[k] for row in scores.values] for k, name in enumerate(scores.names)},
        "reward": total.tolist(),
        "advantage": [],
    }
    for name in scores.extra:
        if name in columns:
            owner = scores.logged_by[name]
            raise ConfigError(
                f"reward function {owner!r} calls log_extra({name!r}, ...), but the samples have a column "
                f"of that name; take another name, e.g. {f'{owner}/{name}'!r}"
            )
    return columns | scores.extra
