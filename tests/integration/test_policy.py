"""The packed forward against the plainest one there is: one sequence at a time, stock attention."""

from dataclasses import replace

import pytest
import torch
from models import TINY, random_rollout, tiny_llama
from peft import LoraConfig, get_peft_model
from tiny import tiny_tokenizer

from grpo_lightning.errors import ConfigError
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.policy.forward import padded_hidden
from grpo_lightning.policy.policy import Policy
from grpo_lightning.policy.probe import check_head


def lora_policy(model=None, seed=0, **settings):
    torch.manual_seed(seed)
    wrapped = get_peft_model(
        tiny_llama() if model is None else model,
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **settings),
    )
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return Policy(wrapped, tiny_tokenizer())


def prompts_of(b: RolloutBatch) -> list[list[int]]:
    starts = b.row_starts().prompts
    return [b.input_ids[s : s + n].tolist() for s, n in zip(starts, b.prompt_lengths, strict=True)]


def one_by_one(policy, b):
    """Log-probabilities [N] from the stock model, a sequence at a time, full softmax."""
    prompts, out, start = prompts_of(b), [], 0
    with policy.generating() as causal:
        for g, n in zip(b.host_groups, b.lengths, strict=True):
            target = b.target_ids[start : start + n]
            start += n
            if n == 0:
                continue
            ids = torch.tensor([prompts[g] + target.tolist()])
            z = causal(input_ids=ids).logits[0, len(prompts[g]) - 1 : -1].log_softmax(-1)
            out.append(z.gather(1, target[:, None])[:, 0])
    return torch.cat(out)


def tiny_variant(kind):
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import AutoConfig

    changes = {
        "qwen2": {},
        "qwen3": {},
        "mistral": {"sliding_window": 4},
        "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 4, "final_logit_softcapping": 5.0},
        "cohere": {"logit_scale": 0.25},
        "granite": {"logits_scaling": 3.0},
        "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    }[kind]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**TINY, **changes}))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_packed_equals_one_by_one(seed):
    policy, b = lora_policy(seed=seed), random_rollout(seed=seed)
    with torch.no_grad():
        got = policy.logprobs(b).logprobs
    torch.testing.assert_close(got, one_by_one(policy, b), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral", "gemma2", "cohere", "granite", "phi3"])
def test_architectures(kind):
    policy, b = Policy(tiny_variant(kind), tiny_tokenizer()), random_rollout()
    check_head(policy)
    with torch.no_grad():
        got = policy.logprobs(b).logprobs
    assert (policy.padded_reason is not None) == (kind == "gemma2")
    torch.testing.assert_close(got, one_by_one(policy, b), atol=1e-5, rtol=0)


def test_sequences_do_not_see_each_other():
    policy, b = lora_policy(), random_rollout(seed=4)
    changed = b.segment_ids == 1  # every first completion of a group gets other tokens
    assert changed.any()
    other = replace(b, input_ids=torch.where(changed, (b.input_ids + 50) % 128 + 3, b.input_ids))
    with torch.no_grad():
        before, after = policy.completion_hidden(b), policy.completion_hidden(other)
    first = torch.zeros(len(b.lengths), dtype=torch.bool)
    for s, g in enumerate(b.host_groups):
        first[s] = s == 0 or b.host_groups[s - 1] != g
    touched = first[b.sequence_ids]
    assert torch.equal(before[~touched], after[~touched])
    assert not torch.equal(before[touched], after[touched])


def test_a_group_does_not_see_another_groups_prompt():
    policy, b = lora_policy(), random_rollout(seed=4)
    ids = b.input_ids.clone()
    ids[: b.prompt_lengths[0]] = 77
    with torch.no_grad():
        before, after = policy.completion_hidden(b), policy.completion_hidden(replace(b, input_ids=ids))
    own = b.group_ids[b.sequence_ids] == 0
    assert torch.equal(before[~own], after[~own])


def test_packed_attention_refuses_masks_and_missing_layouts():
    policy = lora_policy()
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(RuntimeError, match="no layout"):
        policy.causal(input_ids=ids)
    with pytest.raises(RuntimeError, match=r"policy\.generating"):
        policy.causal(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_the_padded_forward(checkpointing):
    b = random_rollout(seed=6)
    grads = []
    for padded in (False, True):
        policy = lora_policy()
        policy.train()
        if checkpointing:
            policy.causal.gradient_checkpointing_enable({"use_reentrant": False})
        if padded:
            policy.padded_reason = "test"
            policy._set_attention("sdpa")
        logp, entropy, _ = policy.logprobs(b, entropy_grad=True)
        (logp * torch.arange(len(logp)) + entropy).sum().backward()
        grads.append({n: p.grad for n, p in policy.trainable().items()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=2e-5, rtol=1e-4, msg=name)


def test_generating_restores_what_it_changes():
    policy = lora_policy()
    policy.train()
    with policy.generating() as causal:
        assert not causal.training
        assert causal.config._attn_implementation == "sdpa"
        assert not torch.is_grad_enabled()
    assert policy.causal.training
    assert policy.causal.config._attn_implementation == "grpo_lightning_packed"


def test_reference_is_the_adapter_switched_off():
    policy, b = lora_policy(), random_rollout()
    with torch.no_grad():
        on = policy.logprobs(b).logprobs
        with policy.reference():
            off = policy.logprobs(b).logprobs
        again = policy.logprobs(b).logprobs
        plain = Policy(tiny_llama(), tiny_tokenizer()).logprobs(b).logprobs
    assert (on - off).abs().max() > 0.01
    assert torch.equal(on, again)
    torch.testing.assert_close(off, plain, atol=1e-6, rtol=0)
    assert all(p.requires_grad for n, p in policy.named_parameters() if "lora_" in n)


def test_reference_of_full_weights_is_a_frozen_copy():
    policy, b = Policy(tiny_llama(), tiny_tokenizer(), keep_reference=True), random_rollout()
    with torch.no_grad():
        before = policy.logprobs(b).logprobs
        for p in policy.trainable().values():
            p.add_(0.01)
        after = policy.logprobs(b).logprobs
        with policy.reference():
            reference = policy.logprobs(b).logprobs
    assert torch.equal(reference, before)
    assert not torch.equal(after, before)
    assert not any("frozen" in name for name in policy.trainable())
    with (
        pytest.raises(ConfigError, match="keeps no reference"),
        Policy(tiny_llama(), tiny_tokenizer()).reference(),
    ):
        pass


def test_full_weights_train_the_tied_head():
    policy, b = Policy(tiny_llama(), tiny_tokenizer()), random_rollout()
    logp = policy.logprobs(b).logprobs
    logp.sum().backward()
    packed = policy.causal.get_output_embeddings().weight.grad.clone()
    policy.zero_grad()
    policy._set_attention("sdpa")
    hidden = padded_hidden(policy.causal.get_decoder(), b, 0)
    z = (hidden @ policy.causal.get_output_embeddings().weight.T).log_softmax(-1)
    z.gather(1, b.target_ids[:, None]).sum().backward()
    torch.testing.assert_close(
        packed, policy.causal.get_output_embeddings().weight.grad, atol=1e-4, rtol=1e-4
    )


def test_lora_masters_stay_fp32_in_a_bf16_model():
    policy = lora_policy()
    exact = {n: p.detach().clone() for n, p in policy.trainable().items()}
    policy.to(torch.bfloat16)
    assert policy.causal.get_output_embeddings().weight.dtype == torch.bfloat16
    for name, p in policy.trainable().items():
        assert p.dtype == torch.float32
        assert torch.equal(p, exact[name])
    logp = policy.logprobs(random_rollout()).logprobs
    logp.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in policy.trainable().values())


@pytest.mark.parametrize("lora", [True, False])
def test_a_bf16_policy_keeps_its_positions(lora):
    """transformers keeps rotary frequencies in fp32 when it loads a bf16 model."""
    policy = lora_policy() if lora else Policy(tiny_llama(), tiny_tokenizer())
    frequencies = policy.causal.model.rotary_emb.inv_freq.clone()
    policy.to(torch.bfloat16)
    assert torch.equal(policy.causal.model.rotary_emb.inv_freq, frequencies)
    assert policy.causal.model.embed_tokens.weight.dtype == torch.bfloat16


def test_an_empty_micro_batch_reaches_every_parameter():
    policy = lora_policy()
    logp = policy.logprobs(random_rollout().take([])).logprobs
    logp.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.trainable().values())


def test_every_end_token_counts():
    policy = lora_policy()
    policy.causal.generation_config.eos_token_id = [1, 9]
    policy.tokenizer.eos_token = "!"
    assert policy.eos_ids == sorted({1, 9, policy.tokenizer.convert_tokens_to_ids("!")})
    assert policy.pad_id == 0


def test_check_head_notices_a_head_it_does_not_know():
    policy = Policy(tiny_llama(), tiny_tokenizer())
    head = policy.causal.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: out * 3)
    with pytest.raises(ConfigError, match="LlamaForCausalLM changes its logits"):
        check_head(policy)
