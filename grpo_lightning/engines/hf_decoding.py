"""Decoding with transformers: batches of rows that a completion leaves as it ends."""

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_lightning.engines.base import Request
from grpo_lightning.engines.hf_sampling import choose, uniforms
from grpo_lightning.errors import EngineError
from grpo_lightning.policy.policy import Policy
from grpo_lightning.types import Completion, SamplingParams
from grpo_lightning.utils.signals import check


class DecodeMode(NamedTuple):
    """How a batch is decoded."""

    padded: bool
    """prompts of different lengths together, padded on the left"""
    cached: bool
    """each step reads one token; without a cache it reads the whole row again"""


def not_finite(model: Any) -> str:
    """Returns what is said of a model whose logits no token can be drawn from."""
    return (
        f"the logits of {type(model).__name__} are not finite, so no token can be drawn from them: its "
        "weights are ruined, or a value overflows in their type; go on from an older checkpoint "
        "(--ckpt_path), or change trainer.precision"
    )


def decode(
    policy: Policy,
    requests: Sequence[Request],
    sampling: SamplingParams,
    mode: DecodeMode,
    limit: int | None = None,
) -> list[list[Completion]]:
    """Returns for each request one completion per seed, in order, of at most `limit` decoded together."""
    out: list[list[Completion]] = [[] for _ in requests]
    with policy.generating() as causal:
        for places in _together(requests, mode):
            own = [requests[i] for i in places]
            pieces: list[list[Completion]] = []
            for chunk in _chunks(own, limit):
                pieces.extend(_Decoder(causal, policy, chunk, sampling, mode).run())
            for i, group in zip(places, _regroup(pieces, own), strict=True):
                out[i] = group
    return out


def _together(requests: Sequence[Request], mode: DecodeMode) -> Iterator[list[int]]:
    """Yields places of requests that may stand in one batch."""
    lengths: dict[int, list[int]] = {}
    for i, r in enumerate(requests):
        lengths.setdefault(0 if mode.padded else len(r.prompt_ids), []).append(i)
    yield from lengths.values()


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
        self,
        causal: Any,
        policy: Policy,
        requests: Sequence[Request],
        sampling: SamplingParams,
        mode: DecodeMode,
    ) -> None:
        from transformers import DynamicCache

        self.causal, self.sampling, self.requests, self.mode = causal, sampling, requests, mode
        self.eos = set(policy.eos_ids)
        self.device = causal.device
        self.seeds = [seed for r in requests for seed in r.seeds]
        self.tokens: list[list[int]] = [[] for _ in self.seeds]
        self.logprobs: list[list[float]] = [[] for _ in self.seeds]
        self.rows = list(range(len(self.seeds)))
        width = max(len(r.prompt_ids) for r in requests)
        pads = [width - len(r.prompt_ids) for r in requests]
        self.read = torch.tensor(
            [[policy.pad_id] * p + r.prompt_ids for p, r in zip(pads, requests, strict=True)],
            device=self.device,
        )  # [R, L], what the model has read or reads next
        self.mask = torch.tensor([[0] * p + [1] * (width - p) for p in pads], device=self.device)
        self.cache: Any = DynamicCache(config=causal.config) if mode.cached else None
        takes = inspect.signature(causal.forward).parameters
        self.cache_name = "cache_params" if "cache_params" in takes else "past_key_values"
        self.options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def run(self) -> list[list[Completion]]:
        """Returns the completions of each request; each prompt is read once."""
        spread = torch.tensor([i for i, r in enumerate(self.requests) for _ in r.seeds], device=self.device)
        logits = self._forward(self.read.shape[1])[spread]
        self._select(spread)
        seen = self._seen(logits)
        for position in range(self.sampling.max_tokens):
            check()
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
                ids = ids[index]
                seen = None if seen is None else seen[index]
                self._select(index)
                self.rows = [self.rows[i] for i in alive]
            self.read = torch.cat([self.read, ids[:, None]], 1)
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], 1)
            if seen is not None:
                seen.scatter_(1, ids[:, None], True)
            logits = self._forward(1)
        done = iter(
            Completion(
                token_ids=ids, logprobs=lp, finish_reason="stop" if ids and ids[-1] in self.eos else "length"
            )
            for ids, lp in zip(self.tokens, self.logprobs, strict=True)
        )
        return [[next(done) for _ in r.seeds] for r in self.requests]

    def _select(self, index: Tensor) -> None:
        """Makes the rows `index` the batch."""
        self.read, self.mask = self.read[index], self.mask[index]
        if self.cache is not None:
            self.cache.reorder_cache(index)

    def _forward(self, new: int) -> Tensor:
        """Returns the logits [R, V] that follow the last of `new` unread tokens of each row."""
        inputs: dict[str, Any] = {"input_ids": self.read, "use_cache": self.mode.cached, **self.options}
        if self.mode.cached:
            inputs |= {"input_ids": self.read[:, -new:], self.cache_name: self.cache}
        if self.mode.padded:
            positions = (self.mask.cumsum(1) - 1).clamp(min=0)
            inputs |= {"attention_mask": self.mask, "position_ids": positions[:, -new:]}
        return self.causal(**inputs).logits[:, -1]

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
        """Stores one token per row; returns the places of the rows that go on.

        Raises:
            EngineError: a token was drawn from logits that are not finite.
        """
        if not math.isfinite(sum(logprobs)):
            raise EngineError(not_finite(self.causal))
        alive = []
        for i, (row, token, logprob) in enumerate(zip(self.rows, ids, logprobs, strict=True)):
            self.tokens[row].append(token)
            self.logprobs[row].append(logprob)
            if token not in self.eos:
                alive.append(i)
        return alive
