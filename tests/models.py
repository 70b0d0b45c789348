"""Tiny random models on disk and in memory, for tests without a network."""

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_tokenizer

from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.types import Completion

TINY = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "initializer_range": 0.15,
}
"""two layers over the tiny tokenizer's vocabulary, for any architecture"""


def tiny_llama(**changes: Any) -> Any:
    """Returns a random Llama with a tied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TINY, "tie_word_embeddings": True, **changes}))


def save_tiny(folder: Path, **changes: Any) -> str:
    """Writes a tiny model and its tokenizer; returns the folder's name.

    Many tokens end a completion, so that lengths differ.
    """
    tiny_llama(**{"eos_token_id": [1, *range(30, 47)], **changes}).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def random_rollout(
    prompts: int = 3, group: int = 4, longest: int = 7, seed: int = 0, vocab: int = 131, **changes: Any
) -> RolloutBatch:
    """Returns a packed rollout of random tokens with uneven lengths, empty completions among them."""
    g = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        return torch.randint(3, vocab, (n,), generator=g).tolist()

    lengths = torch.randint(0, longest + 1, (prompts * group,), generator=g).tolist()
    completions = [
        Completion(token_ids=tokens(n), finish_reason="length" if n == longest else "stop") for n in lengths
    ]
    settings: dict[str, Any] = {
        "prompt_ids": [tokens(2 + 3 * p) for p in range(prompts)],
        "completions": completions,
        "group_ids": [p for p in range(prompts) for _ in range(group)],
        "advantages": torch.randn(prompts * group, generator=g),
        "max_tokens": longest,
    }
    return RolloutBatch.pack(**{**settings, **changes})


def hf_engine(policy: Any, version: int = 0, **options: Any) -> Any:
    """Returns an `HFEngine` that serves `policy` as `version`."""
    from grpo_lightning.engines import EngineContext, HFEngine
    from grpo_lightning.engines.weight_sync import PolicyWeights
    from grpo_lightning.types import SamplingParams

    engine = HFEngine(**options)
    engine.start(EngineContext(policy=policy, model_path="", max_model_len=None, sampling=SamplingParams()))
    engine.sync(PolicyWeights(policy), version)
    return engine
