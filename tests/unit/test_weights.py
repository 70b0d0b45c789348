"""What engines get of a policy's weights: the adapter by peft's names, merges in fp32, nothing left out."""

import pytest
import torch
from models import save_tiny
from tiny import tiny_tokenizer

from grpo_lightning.engines import weight_sync as weights
from grpo_lightning.engines.sync_kinds import choose_kind
from grpo_lightning.engines.weight_sync import adapter_of, merged_weights
from grpo_lightning.errors import ConfigError
from grpo_lightning.policy.loading import load_policy
from grpo_lightning.policy.lora import lora_config

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def make_policy(tmp_path, dtype=torch.float32, **lora):
    folder = save_tiny(tmp_path)
    config = lora_config({"r": 4, "lora_alpha": 6, **lora})
    policy = load_policy(folder, tiny_tokenizer(), lora=config, model_kwargs={"dtype": dtype})
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.trainable().values():
            p.add_(torch.randn_like(p) * 0.15)
    return policy


def test_an_adapter_is_what_peft_saves(tmp_path):
    from peft import get_peft_model_state_dict

    policy = make_policy(tmp_path, target_modules=["q_proj", "down_proj"])
    theirs = get_peft_model_state_dict(policy.model)
    sent = adapter_of(policy)
    ours = {
        f"base_model.model.{name}.lora_{part}.weight": tensor
        for name, module in sent.items()
        for part, tensor in (("A", module.a), ("B", module.b))
    }
    assert ours.keys() == theirs.keys()
    assert all(ours[n].data_ptr() == t.data_ptr() for n, t in theirs.items())
    assert {t.data_ptr() for t in ours.values()} == {p.data_ptr() for p in policy.trainable().values()}
    assert sent.keys() == weights.adapter_ranks(policy).keys()


PATTERNS = {"rank_pattern": {"q_proj": 8, "layers.0.mlp.up_proj": 2}, "alpha_pattern": {"down_proj": 16}}


@pytest.mark.parametrize("fused", [FUSED, None])
@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"use_dora": True}, PATTERNS])
def test_a_merge_is_exact_to_one_rounding(tmp_path, lora, fused):
    policy = make_policy(tmp_path, torch.bfloat16, **lora)
    merged = dict(merged_weights(policy, torch.bfloat16, fused))
    assert len(merged) == len(adapter_of(policy))
    policy.model.double().merge_and_unload()
    for name, ours in merged.items():
        exact = policy.causal.get_submodule(name.removesuffix(".weight")).weight
        off = (ours.double() - exact).abs()
        assert (off <= 1.004 * 2**-8 * exact.abs().clamp_min(1e-6)).all(), name


@pytest.mark.parametrize("room", [1, 3 * 4 * 32 * 32, 1 << 30])
def test_layers_merged_together_are_as_merged_alone(tmp_path, monkeypatch, room):
    monkeypatch.setattr(weights, "MERGED_AT_ONCE", room)
    policy = make_policy(tmp_path, target_modules="all-linear", **PATTERNS)
    together = dict(merged_weights(policy, torch.float32, None))
    layers = dict(weights.lora_layers(policy))
    assert together.keys() == {f"{name}.weight" for name in layers}
    for name, layer in layers.items():
        torch.testing.assert_close(
            together[f"{name}.weight"], weights.merged_weight(layer), atol=1e-6, rtol=0
        )


def test_merging_launches_little(tmp_path):
    """All layers of one shape are one product; the policy is not touched."""
    policy = make_policy(tmp_path)
    before = {n: p.clone() for n, p in policy.named_parameters()}
    with torch.profiler.profile() as seen:
        made = list(merged_weights(policy, torch.bfloat16, None))
    products = sum(e.count for e in seen.key_averages() if e.key == "aten::baddbmm_")
    shapes = {t.shape for _, t in made}
    assert products == len(shapes) < len(made)
    assert all(torch.equal(p, before[n]) for n, p in policy.named_parameters())


def test_stacks_come_whole_where_they_have_to(tmp_path):
    policy = make_policy(
        tmp_path, target_modules=["k_proj", "gate_proj"], modules_to_save=["input_layernorm"]
    )
    alone = [n for n, _ in merged_weights(policy, torch.float32, None)]
    whole = [n for n, _ in merged_weights(policy, torch.float32, FUSED)]
    layer = ["self_attn.k_proj", "mlp.gate_proj", "input_layernorm"]
    expected = [f"model.layers.{i}.{n}.weight" for i in range(2) for n in layer]
    assert sorted(alone) == sorted(expected)
    assert [n for n in whole if n in alone] == expected
    assert len(whole) == len(set(whole)) == 2 * 6


@pytest.mark.parametrize("kind", ["adapter", "merge"])
def test_what_trains_and_would_not_be_sent_is_refused(tmp_path, kind):
    policy = make_policy(tmp_path, target_modules=["q_proj"])
    assert choose_kind(policy, kind) == kind
    policy.causal.model.norm.weight.requires_grad_()
    with pytest.raises(ConfigError, match=r"model\.norm\.weight trains, which is not sent"):
        choose_kind(policy, kind)
