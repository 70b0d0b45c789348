"""Random rollouts and random models in the shapes that the train step is measured on (performance plan)."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from grpo_lightning.batch import RolloutBatch
from grpo_lightning.samples import Completion

SHAPES: dict[str, dict[str, int]] = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
             "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151_936},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 131},
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """How long prompts and completions are."""

    prompt: tuple[int, int]
    """uniform"""
    median: int
    """of the completions, lognormal with sigma 0.6"""
    longest: int
    prompts: int = 16
    group: int = 8


WORKLOADS = {
    "gsm8k-like": Workload((80, 220), 100, 256),
    "long completions": Workload((80, 220), 700, 2048),
    "long prompts": Workload((700, 1300), 100, 256, prompts=4),
    "tiny": Workload((3, 9), 5, 12, prompts=4, group=4),
}


def make_rollout(work: Workload, vocabulary: int, seed: int = 0, dead: float = 0.0) -> RolloutBatch:
    """Returns a packed rollout; a share `dead` of its groups has advantages of 0."""
    draw = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(n)]

    def length() -> int:
        return max(1, min(work.longest, round(work.median * math.exp(draw.gauss(0, 0.6)))))

    groups = [g for g in range(work.prompts) for _ in range(work.group)]
    advantages = torch.tensor([draw.gauss(0, 1) * (g >= dead * work.prompts) for g in groups])
    return RolloutBatch.pack(
        prompt_ids=[ids(draw.randint(*work.prompt)) for _ in range(work.prompts)],
        completions=[Completion(token_ids=ids(length())) for _ in groups],
        group_ids=groups,
        advantages=advantages,
        max_tokens=work.longest,
    )


def make_model(shape: str, device: torch.device, lora: int = 16) -> Any:
    """Returns a random Qwen2 of a shape with LoRA on all linear layers, in bf16 on a GPU."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(**SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=8192)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model: Any = Qwen2ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    adapter = LoraConfig(r=lora, lora_alpha=lora, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, adapter)
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.02)
    return model


def floor_ms(model: Any, batch: RolloutBatch, rate: float = 790e12) -> float:
    """Returns 4 FLOP per body parameter and token at the rate an H200 sustains in dense bf16."""
    body = sum(p.numel() for n, p in model.get_base_model().named_parameters() if _in_body(n))
    return 1e3 * 4 * body * batch.num_tokens / rate


def _in_body(name: str) -> bool:
    return "lora_" not in name and "embed_tokens" not in name and "lm_head" not in name


Runner = Callable[[], torch.Tensor]
