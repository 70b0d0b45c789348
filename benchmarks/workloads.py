"""Random rollouts and random models in the shapes that the train step is measured on (performance plan)."""

import math
import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.types import Completion

TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=1)
"""what a `Policy` asks of a tokenizer while it trains"""
SHAPES: dict[str, dict[str, int]] = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
             "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151_936},
    "7B": {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
           "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064,
           "tie_word_embeddings": False},
    "8B": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 131},
}  # fmt: skip


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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


def make_model(shape: str, device: torch.device, lora: int = 16, *, four_bit: bool = False) -> Any:
    """Returns a random Qwen2 of a shape with LoRA on all linear layers, in bf16 on a GPU.

    Args:
        shape: a row of `SHAPES`.
        device: where it is made.
        lora: rank.
        four_bit: the base in NF4, quantised layer by layer.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    tied = not four_bit
    config = Qwen2Config(**SHAPES[shape], tie_word_embeddings=tied, max_position_embeddings=65_536)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model: Any = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if four_bit:
        quantise(model, dtype)
    adapter = LoraConfig(r=lora, lora_alpha=lora, target_modules=LINEAR, task_type="CAUSAL_LM")
    model = get_peft_model(model, adapter)
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.02)
    return model


def quantise(model: Any, dtype: torch.dtype) -> None:
    """Exchanges the linear layers of the body for NF4 ones with the same weights."""
    from bitsandbytes.nn import Linear4bit

    model.is_loaded_in_4bit = True
    for layer in model.model.layers:
        for name in LINEAR:
            owner = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
            old = getattr(owner, name)
            sizes = (old.in_features, old.out_features, old.bias is not None)
            new = Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4")
            new.load_state_dict(old.state_dict())
            new.support_avx512bf16_for_cpu = False
            setattr(owner, name, new.to(old.weight.device))
            for p in new.parameters():
                p.requires_grad_(False)


def floor_ms(model: Any, batch: RolloutBatch, rate: float = 790e12) -> float:
    """Returns the time of the products alone at the rate an H200 sustains in dense bf16.

    4 FLOP per body parameter and token, and as many per head parameter and completion token: forward and the
    gradient of the input; a frozen base has no other.
    """
    base = model.get_base_model()
    body = sum(p.numel() for n, p in base.named_parameters() if _in_body(n))
    head = base.get_output_embeddings().weight.numel()
    return 1e3 * 4 * (body * batch.num_tokens + head * len(batch.target_ids)) / rate


def _in_body(name: str) -> bool:
    return "lora_" not in name and "embed_tokens" not in name and "lm_head" not in name
