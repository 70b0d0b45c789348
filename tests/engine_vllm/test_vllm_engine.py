"""The real vLLM on a CPU: what it serves is the policy that trains, and the process stays as it was."""

import gc
import random

import numpy as np
import pytest
import torch
from models import TINY
from serving import SHAPE, ask, distance, make_policy, move, start
from tiny import tiny_tokenizer

from grpo_lightning.engines import EngineContext, VLLMEngine
from grpo_lightning.engines.weight_sync import PolicyWeights
from grpo_lightning.errors import ConfigError, EngineError
from grpo_lightning.rollout.checks import bad_logprobs
from grpo_lightning.types import SamplingParams

pytestmark = pytest.mark.vllm


ADAPTERS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "some modules": {"target_modules": ["q_proj", "down_proj"]},
    "parts of stacks": {"target_modules": ["k_proj", "up_proj"]},
    "DoRA": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 1, "k_proj": 3}},
    "PiSSA": {"init_lora_weights": "pissa"},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
}
KINDS = {f"{kind}: {name}": (kind, lora) for name, lora in ADAPTERS.items() for kind in ("adapter", "merge")}
KINDS["full"] = "full", {"r": 0}


@pytest.mark.parametrize("name", KINDS)
def test_the_engine_serves_the_policy_after_every_push(folder, name):
    kind, lora = KINDS[name]
    policy = make_policy(folder, **lora)
    engine = start(policy, folder, sync=kind)
    sampling = SamplingParams(max_tokens=12, temperature=0.8)
    frozen = {n: p.clone() for n, p in policy.named_parameters()}
    try:
        for version in range(3):  # the same prompts: stale cached prefixes would show
            if version:
                move(policy, 10 + version)
                frozen = {n: p.clone() for n, p in policy.named_parameters()}
            engine.sync(PolicyWeights(policy), version)
            out = engine.generate(ask(rollout=version), sampling)
            gap, off = distance(policy, ask(), out, sampling)
            assert gap.mean() < 2e-5
            assert gap.max() < 1e-3
            if off is not None:
                assert off.mean() > 0.1
        assert all(torch.equal(p, frozen[n]) for n, p in policy.named_parameters())
    finally:
        engine.close()


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3"])
@pytest.mark.parametrize("kind", ["adapter", "merge", "full"])
def test_architectures(tmp_path, architecture, kind):
    """Qwen2 has biases in q, k and v, Qwen3 has norms of q and k; the merge sends whole stacks."""
    import transformers

    config = getattr(transformers, f"{architecture}Config")(
        **{**TINY, **SHAPE, "tie_word_embeddings": kind != "merge"}
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith("bias"):
                p.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    lora = {"r": 0} if kind == "full" else {"target_modules": ["v_proj", "gate_proj"]}
    policy = make_policy(str(tmp_path), **lora)
    engine = start(policy, str(tmp_path), sync=kind)
    try:
        engine.sync(PolicyWeights(policy), 0)
        sampling = SamplingParams(max_tokens=10)
        gap, _ = distance(policy, ask(), engine.generate(ask(), sampling), sampling)
        assert gap.mean() < 2e-5
    finally:
        engine.close()


def test_half_precision_is_close(folder):
    policy = make_policy(folder, dtype=torch.bfloat16)
    sampling = SamplingParams(max_tokens=12)
    for kind in ("adapter", "merge"):
        engine = start(policy, folder, sync=kind)
        try:
            engine.sync(PolicyWeights(policy), 0)
            gap, off = distance(policy, ask(), engine.generate(ask(), sampling), sampling)
            assert gap.mean() < 0.08
            assert off.mean() > 5 * gap.mean()
        finally:
            engine.close()


def process():
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "set_num_threads": torch.set_num_threads,
        "frozen": gc.get_freeze_count(),
    }


def test_the_process_stays_as_it_was(folder, monkeypatch):
    import os

    policy = make_policy(folder)
    torch.set_float32_matmul_precision("high")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    try:
        random.seed(1), np.random.seed(2), torch.manual_seed(3)
        before, environment = process(), dict(os.environ)
        engine = start(policy, folder, sync="merge")
        assert process() == before
        for version in range(20):
            engine.sync(PolicyWeights(policy), version)
            engine.generate(ask(2), SamplingParams(max_tokens=4))
            engine.sleep()
        assert process() == before
        engine.close()
        assert process() == before
        assert {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")} == {
            k: v for k, v in environment.items() if not k.startswith("VLLM_")
        }
        assert not torch.distributed.is_initialized()
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_regex_holds(folder):
    policy = make_policy(folder)
    sampling = SamplingParams(max_tokens=6, regex="[ab]{3}")
    engine = VLLMEngine(sync="merge", max_num_seqs=8)
    engine.start(EngineContext(policy=policy, model_path=folder, max_model_len=64, sampling=sampling))
    try:
        engine.sync(PolicyWeights(policy), 0)
        tokenizer = tiny_tokenizer()
        out = engine.generate(ask(2), sampling)
        assert all(c.finish_reason == "stop" for group in out for c in group)
        texts = [tokenizer.decode(c.token_ids[:-1]) for group in out for c in group]  # without the end token
        assert all(len(t) == 3 and set(t) <= set("ab") for t in texts), texts
    finally:
        engine.close()


def test_what_cannot_start_says_why(folder):
    plain = make_policy(folder)
    with pytest.raises(ConfigError, match=r"share_base is on, but vLLM repacks its weights on a CPU"):
        start(plain, folder, share_base="on")
    untied = make_policy(folder, modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match=r"embedding and head are one tensor .* model.lora.modules_to_save"):
        start(untied, folder)
    with pytest.raises(ConfigError, match=r"max_model_len is 32, .* make 64"):
        start(plain, folder, max_model_len=32)
    with pytest.raises(ConfigError, match="engine_kwargs sets seed"):
        start(plain, folder, engine_kwargs={"seed": 4})
    with pytest.raises(ConfigError, match=r"sync is 'adaptor' \(did you mean 'adapter'"):
        VLLMEngine(sync="adaptor")
    with pytest.raises(EngineError, match="could not start"):
        start(plain, "/nowhere")


def test_an_engine_that_cannot_be_woken_is_closed_all_the_same(folder, monkeypatch):
    def fails(**kwargs):
        raise RuntimeError("no memory left")

    engine = start(make_policy(folder), folder, sync="merge")
    engine.sleep_mode = "weights"  # on a CPU nothing sleeps
    monkeypatch.setattr(engine._llm, "sleep", fails)
    with pytest.raises(
        EngineError, match=r"could not sleep: .*memory left; .*--ckpt_path last; .*sleep to 'off'"
    ):
        engine.sleep()
    assert not engine._asleep
    engine._asleep = True
    monkeypatch.setattr(engine._llm, "wake_up", fails)
    with pytest.warns(UserWarning, match="closed asleep: vLLM could not wake up: RuntimeError: no memory"):
        engine.close()
    assert engine._llm is None
    assert not engine._asleep


def test_logits_that_are_not_finite_do_not_pass_for_tokens(folder):
    """vLLM draws token 0 from them, and says nan of it."""
    policy = make_policy(folder)
    engine = start(policy, folder)
    try:
        for version, size in enumerate((0.15, 1e25)):
            with torch.no_grad():
                for p in policy.trainable().values():
                    p.fill_(size)  # finite, and in the forward it overflows
            engine.sync(PolicyWeights(policy), version)
            for options in ({}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}):
                out = engine.generate(ask(), SamplingParams(max_tokens=4, **options))
                error = bad_logprobs(engine, ask(), out)
                if version == 0:
                    assert error is None
                else:
                    assert "VLLMEngine reports nan as the log-probability of token 0" in str(error)
    finally:
        engine.close()
