"""One base for trainer and engine: shared only where equal to the bit, and never written to unnoticed."""

import pytest
import torch
from models import save_tiny
from tiny import tiny_tokenizer
from torch import nn

from grpo_lightning.engines.vllm.shared_base import SharedBase, offered, take_offered
from grpo_lightning.errors import EngineError
from grpo_lightning.ops.lora_linear import adjoining
from grpo_lightning.policy.loading import load_policy
from grpo_lightning.policy.lora import lora_config

STACKS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def make_policy(tmp_path, **lora):
    config = lora_config({"r": 4, "lora_alpha": 8, **lora})
    return load_policy(
        save_tiny(tmp_path), tiny_tokenizer(), lora=config, model_kwargs={"dtype": torch.bfloat16}
    )


class Stacked(nn.Module):
    """What vLLM makes of the tiny Llama: the names and stacks of its parameters."""

    packed_modules_mapping = STACKS

    def __init__(self, policy, dtype=torch.bfloat16):
        super().__init__()
        weights = SharedBase.of(policy).weights
        self.made = {}
        for name in weights:
            module, leaf, kind = name.rsplit(".", 2)
            stack = next((s for s, parts in STACKS.items() if leaf in parts), leaf)
            parts = [weights[f"{module}.{p}.{kind}"] for p in STACKS.get(stack, [leaf])]
            value = torch.cat([p.detach() for p in parts]).to(dtype)
            self.made[f"{module}.{stack}.{kind}"] = nn.Parameter(value, requires_grad=False)

    def named_parameters(self, *args, **kwargs):
        return iter(self.made.items())


def share(policy, model):
    base = SharedBase.of(policy)
    with offered(base):
        take_offered(model)
    return base


def test_all_of_a_frozen_base_exists_once(tmp_path):
    policy = make_policy(tmp_path)
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    model = Stacked(policy)
    base = share(policy, model)
    assert base.taken.keys() == model.made.keys()
    assert base.kept == 0
    assert all(torch.equal(p, before[n]) for n, p in policy.named_parameters())
    attention = policy.causal.model.layers[0].self_attn
    parts = [getattr(attention, n).base_layer.weight for n in STACKS["qkv_proj"]]
    held = model.made["model.layers.0.self_attn.qkv_proj.weight"]
    assert held.data_ptr() == parts[0].data_ptr() == adjoining(parts).data_ptr()
    assert torch.equal(held, torch.cat(parts))
    base.check()


def test_what_differs_is_kept_twice(tmp_path):
    policy = make_policy(tmp_path)
    model = Stacked(policy)
    name = "model.layers.1.mlp.gate_up_proj.weight"
    other = model.made[name]
    other.data[3, 5] += 1
    base = share(policy, model)
    assert base.taken.keys() == model.made.keys() - {name}
    assert base.kept == other.nbytes
    up = policy.causal.model.layers[1].mlp.up_proj.base_layer.weight
    assert not other.data_ptr() <= up.data_ptr() < other.data_ptr() + other.nbytes
    assert not share(policy, Stacked(policy, torch.float16)).taken


def test_what_trains_is_not_offered(tmp_path):
    policy = make_policy(tmp_path, target_modules=["q_proj"], modules_to_save=["up_proj"])
    names = SharedBase.of(policy).weights.keys()
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert not any("lora_" in n or "up_proj" in n for n in names)


@pytest.mark.parametrize("how", ["a bit", "an exchange of rows"])
def test_a_write_is_noticed(tmp_path, how):
    policy = make_policy(tmp_path)
    base = share(policy, Stacked(policy))
    weight = policy.causal.model.layers[0].mlp.down_proj.base_layer.weight.data
    if how == "a bit":
        weight.view(torch.int16)[2, 3] ^= 1
    else:
        weight[[0, 1]] = weight[[1, 0]]
    with pytest.raises(EngineError, match="has been written to"):
        base.check()


def test_nothing_is_taken_without_an_offer(tmp_path):
    policy = make_policy(tmp_path)
    model = Stacked(policy)
    addresses = {n: p.data_ptr() for n, p in model.made.items()}
    take_offered(model)
    assert {n: p.data_ptr() for n, p in model.made.items()} == addresses
