"""The adapter beside a checkpoint: peft's own loader finds every weight of it."""

import pytest
import torch
from fits import module
from models import save_tiny

from grpo_lightning.checkpoints import AdapterCheckpointIO

KINDS = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "head": {"modules_to_save": ["lm_head"]},
    "head_and_embedding": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "norms": {"modules_to_save": ["norm"]},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "parameters": {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate_proj.weight"]},
}


@pytest.fixture(params=[True, False], ids=["tied", "untied"], scope="module")
def folder(request, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"), tie_word_embeddings=request.param)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_a_checkpoint_writes(folder, tmp_path, kind):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    m = module(folder, lora={"r": 4, "lora_alpha": 8, **KINDS[kind]})
    m.configure_model()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in m.policy.trainable().values():
            p.add_(0.1 * torch.randn_like(p))
    checkpoint = {"state_dict": m.state_dict()}
    m.on_save_checkpoint(checkpoint)
    AdapterCheckpointIO().save_checkpoint(checkpoint, tmp_path / "x.ckpt")
    base = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(base, tmp_path / "x-adapter")(input_ids=ids).logits
        with m.policy.generating() as causal:
            ours = causal(input_ids=ids).logits
    assert (ours - before).abs().max() > 0.01
    torch.testing.assert_close(theirs, ours)
