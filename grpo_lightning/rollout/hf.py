"""`HFEngine`: samples from the live policy with transformers alone. The CPU path, and the oracle for other
engines."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_lightning.errors import ConfigError, EngineError
from grpo_lightning.policy import Policy
from grpo_lightning.rollout.engine import EngineContext, Request
from grpo_lightning.rollout.sampling import choose, uniforms
from grpo_lightning.samples import Completion, SamplingParams


class HFEngine:
    """Decodes with the model being trained: nothing to synchronise, nothing to install.

    A prompt is read once for all its completions, and a completion that has ended leaves the batch at once.

    Args:
        batch_size: most completions decoded at one time; null decodes all of a rollout together.
    """

    def __init__(self, batch_size: int | None = None) -> None:
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"rollout.engine.batch_size is {batch_size}; it must be null or at least 1")
        self.batch_size = batch_size
        self.policy_version = -1
        self._policy: Policy | None = None

    def start(self, context: EngineContext) -> None:
        """Refuses what this engine cannot do."""
        if context.sampling.regex is not None or context.sampling.extra:
            raise ConfigError(
                "rollout.sampling.regex and .extra need an engine with structured outputs; "
                "HFEngine has none: remove them or use VLLMEngine"
            )

    def sync(self, policy: Policy, version: int) -> None:
        """Remembers the policy; there is no copy of the weights."""
        self._policy, self.policy_version = policy, version

    def sleep(self) -> None:
        """Holds no memory between calls."""

    def close(self) -> None:
        """Lets go of the policy."""
        self._policy, self.policy_version = None, -1

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[list[Completion]]:
        """Returns for each request one completion per seed, in order.

        Raises:
            EngineError: called before `sync`.
        """
        if self._policy is None:
            raise EngineError("HFEngine has no policy yet: call sync(policy, version) before generate")
        out: list[list[Completion]] = []
        with self._policy.generating() as causal:
            for chunk in _chunks(requests, self.batch_size):
                out.extend(_Decoder(causal, self._policy, chunk, sampling).run())
        return _regroup(out, requests)


def _chunks(requests: Sequence[Request], limit: int | None) -> list[list[Request]]:
    """Returns runs of requests of at most `limit` completions each; a longer request is cut."""
    if limit is None:
        return [list(requests)] if requests else []
    chunks: list[list[Request]] = []
    used = limit
    for r in requests:
        for i in range(0, len(r.seeds), limit):
            piece = Request(prompt_ids=r.prompt_ids, seeds=r.seeds[i : i + limit], uid=r.uid)
            if used + len(piece.seeds) > limit:
                chunks.append([])
                used = 0
            chunks[-1].append(piece)
            used += len(piece.seeds)
    return chunks


def _regroup(pieces: list[list[Completion]], requests: Sequence[Request]) -> list[list[Completion]]:
    flat = iter(c for piece in pieces for c in piece)
    return [[next(flat) for _ in r.seeds] for r in requests]


class _Decoder:
    """One batch of completions on its way; rows are the completions that have not ended."""

    def __init__(
        self, causal: Any, policy: Policy, requests: Sequence[Request], sampling: SamplingParams
    ) -> None:
        self.causal, self.sampling, self.requests = causal, sampling, requests
        self.eos = set(policy.eos_ids)
        self.device = causal.device
        self.seeds = [seed for r in requests for seed in r.seeds]
        self.tokens: list[list[int]] = [[] for _ in self.seeds]
        self.logprobs: list[list[float]] = [[] for _ in self.seeds]
        self.rows = list(range(len(self.seeds)))
        self.pad_id = policy.pad_id

    def run(self) -> list[list[Completion]]:
        """Returns the completions of each request."""
        logits, cache, mask = self._prefill()
        seen = self._seen(logits)
        for position in range(self.sampling.max_tokens):
            u = torch.tensor(
                uniforms([self.seeds[r] for r in self.rows], position),
                dtype=torch.float64,
                device=self.device,
            )
            ids, logprobs = choose(logits, self.sampling, u, seen)
            alive = self._record(ids.tolist(), logprobs.tolist())
            if not alive or position + 1 == self.sampling.max_tokens:
                break
            if len(alive) < len(self.rows):
                index = torch.tensor(alive, device=self.device)
                ids, mask = ids[index], mask[index]
                seen = None if seen is None else seen[index]
                cache.batch_select_indices(index)
                self.rows = [self.rows[i] for i in alive]
            mask = torch.cat([mask, mask.new_ones(len(self.rows), 1)], 1)
            if seen is not None:
                seen.scatter_(1, ids[:, None], True)
            logits = self._forward(ids[:, None], mask, (mask.sum(1) - 1)[:, None], cache)
        done = iter(
            Completion(
                token_ids=ids, logprobs=lp, finish_reason="stop" if ids and ids[-1] in self.eos else "length"
            )
            for ids, lp in zip(self.tokens, self.logprobs, strict=True)
        )
        return [[next(done) for _ in r.seeds] for r in self.requests]

    def _prefill(self) -> tuple[Tensor, Any, Tensor]:
        """Returns logits [R, V] after the prompts, the cache and the mask; each prompt is read once."""
        from transformers import DynamicCache

        width = max(len(r.prompt_ids) for r in self.requests)
        pads = [width - len(r.prompt_ids) for r in self.requests]
        ids = torch.tensor(
            [[self.pad_id] * p + r.prompt_ids for p, r in zip(pads, self.requests, strict=True)],
            device=self.device,
        )
        mask = torch.tensor([[0] * p + [1] * (width - p) for p in pads], device=self.device)
        cache = DynamicCache(config=self.causal.config)
        logits = self._forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
        spread = torch.tensor([i for i, r in enumerate(self.requests) for _ in r.seeds], device=self.device)
        cache.batch_select_indices(spread)
        return logits[spread], cache, mask[spread]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Returns the logits [R, V] that follow the last token of each row."""
        out = self.causal(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def _seen(self, logits: Tensor) -> Tensor | None:
        if self.sampling.repetition_penalty == 1.0:
            return None
        seen = torch.zeros_like(logits, dtype=torch.bool)
        row = 0
        for r in self.requests:
            seen[row : row + len(r.seeds), torch.tensor(r.prompt_ids, device=self.device)] = True
            row += len(r.seeds)
        return seen

    def _record(self, ids: list[int], logprobs: list[float]) -> list[int]:
        """Stores one token per row; returns the places of the rows that go on."""
        alive = []
        for i, (row, token, logprob) in enumerate(zip(self.rows, ids, logprobs, strict=True)):
            self.tokens[row].append(token)
            self.logprobs[row].append(logprob)
            if token not in self.eos:
                alive.append(i)
        return alive
