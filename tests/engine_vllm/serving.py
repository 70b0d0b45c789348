"""A tiny policy, a vLLM engine beside it, and how far apart they are."""

import torch
from tiny import tiny_tokenizer

from grpo_lightning.engines import EngineContext, Request, VLLMEngine
from grpo_lightning.engines.base import sample_seeds
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.policy.loading import load_policy
from grpo_lightning.policy.lora import lora_config
from grpo_lightning.types import SamplingParams

PROMPTS = [[5 + i % 20 for i in range(40)], [9, 8, 7, 6, 5, 4], [20]]
SHAPE = {"hidden_size": 128, "head_dim": 32}
"""vLLM's CPU attention takes no narrower heads"""


def make_policy(folder, seed=1, dtype=torch.float32, **lora):
    settings = {"r": 4, "lora_alpha": 8, **lora}
    policy = load_policy(
        folder,
        tiny_tokenizer(),
        lora=None if lora.get("r") == 0 else lora_config(settings),
        model_kwargs={"dtype": dtype},
    )
    move(policy, seed)
    return policy


def move(policy, seed):
    """Gives what trains a push that changes every distribution."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in policy.trainable().values():
            p.add_(torch.randn_like(p) * 0.15)


def start(policy, folder, **options):
    engine = VLLMEngine(**{"max_num_seqs": 16, **options})
    engine.start(EngineContext(policy=policy, model_path=folder, max_model_len=64, sampling=SamplingParams()))
    return engine


def ask(group=4, rollout=0, prompts=PROMPTS):
    return [
        Request(prompt_ids=p, seeds=sample_seeds(0, rollout, i, group), uid=i) for i, p in enumerate(prompts)
    ]


def distance(policy, requests, out, sampling):
    """Returns |trainer - engine| over sampled tokens, in nats, and the same with the adapter off."""
    flat = [c for group in out for c in group]
    batch = RolloutBatch.pack(
        prompt_ids=[r.prompt_ids for r in requests],
        completions=flat,
        group_ids=[i for i, group in enumerate(out) for _ in group],
        advantages=torch.zeros(len(flat)),
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        truncation=sampling.truncation,
    )
    with torch.no_grad():
        scores = policy.logprobs(batch)
        rescored = batch if scores.log_kept is None else batch.rescored(scores.log_kept)
        gap = (scores.logprobs - rescored.sampler_logprobs).abs()
        if not policy.is_lora:
            return gap, None
        with policy.reference():
            return gap, (policy.logprobs(batch).logprobs - rescored.sampler_logprobs).abs()


def assert_served(policy, engine):
    sampling = SamplingParams(max_tokens=8)
    gap, off = distance(policy, ask(), engine.generate(ask(), sampling), sampling)
    assert gap.mean() < 2e-5
    assert off.mean() > 0.1
