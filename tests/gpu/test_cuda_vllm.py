"""vLLM beside the trainer on a GPU, where it is installed: `pytest -m gpu tests/gpu/test_cuda_vllm.py`."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from models import TINY
from tiny import tiny_tokenizer

from grpo_lightning.engines import EngineContext, Request, VLLMEngine
from grpo_lightning.engines.base import sample_seeds
from grpo_lightning.engines.weight_sync import PolicyWeights
from grpo_lightning.errors import EngineError
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.policy.loading import load_policy
from grpo_lightning.policy.lora import lora_config
from grpo_lightning.types import SamplingParams

pytestmark = pytest.mark.gpu
SHAPE = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64, "num_attention_heads": 8}
SHAPE |= {"vocab_size": 192}  # vLLM pads rows to a multiple of 64, and what is padded is not shared
PROMPTS = [[5 + (i * k) % 100 for i in range(40)] for k in (1, 3, 7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    path = tmp_path_factory.mktemp("qwen2")
    torch.manual_seed(0)
    config = Qwen2Config(**{**TINY, **SHAPE, "num_key_value_heads": 2, "initializer_range": 0.05})
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def make_policy(folder, quantization=None, r=16):
    policy = load_policy(
        folder,
        tiny_tokenizer(),
        lora=lora_config({"r": r, "lora_alpha": 2 * r}) if r else None,
        model_kwargs={"dtype": torch.bfloat16},
        quantization=quantization,
    ).to("cuda")
    move(policy, 1)
    return policy


def move(policy, seed):
    g = torch.Generator("cuda").manual_seed(seed)
    with torch.no_grad():
        for p in policy.trainable().values():
            p.add_(torch.randn(p.shape, generator=g, device="cuda") * 0.05)


def start(policy, folder, **options):
    engine = VLLMEngine(
        **{"max_num_seqs": 16, "gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 1 << 30, **options}
    )
    engine.start(EngineContext(policy=policy, model_path=folder, max_model_len=64, sampling=SamplingParams()))
    return engine


def ask(version=0):
    return [Request(prompt_ids=p, seeds=sample_seeds(0, version, i, 4), uid=i) for i, p in enumerate(PROMPTS)]


def distance(policy, engine, version=0):
    """Returns mean |trainer - engine| on sampled tokens, in nats, and the same with the adapter off."""
    requests, sampling = ask(version), SamplingParams(max_tokens=16)
    out = engine.generate(requests, sampling)
    batch = RolloutBatch.pack(
        prompt_ids=[r.prompt_ids for r in requests],
        completions=[c for group in out for c in group],
        group_ids=[i for i, group in enumerate(out) for _ in group],
        advantages=torch.zeros(12),
        max_tokens=16,
    ).to("cuda")
    with torch.no_grad():
        gap = (policy.logprobs(batch).logprobs - batch.sampler_logprobs).abs().mean()
        if not policy.is_lora:
            return float(gap), float("inf")
        with policy.reference():
            return float(gap), float((policy.logprobs(batch).logprobs - batch.sampler_logprobs).abs().mean())


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("kind", ["adapter", "merge", "full"])
def test_the_engine_serves_the_policy(folder, kind, eager):
    policy = make_policy(folder, r=0 if kind == "full" else 16)
    engine = start(policy, folder, sync=kind, enforce_eager=eager)
    try:
        for version in range(3):
            move(policy, 10 + version)
            engine.sync(PolicyWeights(policy), version)
            gap, off = distance(policy, engine, version)
            assert gap < 0.08
            assert off > 5 * gap
    finally:
        engine.close()


def test_four_bits_on_both_sides_are_one_policy(folder):
    policy = make_policy(folder, quantization="nf4")
    engine = start(policy, folder, enforce_eager=True)
    assert engine.sync_kind == "adapter"
    try:
        engine.sync(PolicyWeights(policy), 0)
        gap, off = distance(policy, engine)
        assert gap < 0.1
        assert off > 3 * gap
    finally:
        engine.close()


def used():
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


@pytest.mark.parametrize("kind", ["adapter", "merge"])
def test_sleeping_gives_memory_back_and_waking_changes_nothing(folder, kind):
    policy = make_policy(folder)
    before = used()
    engine = start(policy, folder, sync=kind, kv_cache_memory_bytes=4 << 30, enforce_eager=True)
    try:
        engine.sync(PolicyWeights(policy), 0)
        first, _ = distance(policy, engine)
        held = []
        for _ in range(20):
            engine.sleep()
            held.append(used())
            torch.randn(1 << 26, device="cuda").sum()  # the trainer works
            gap, _ = distance(policy, engine)  # woken without a push
            assert gap == pytest.approx(first, abs=0.01)
        assert max(held) - before < 3
        assert held[-1] - held[2] < 0.2
    finally:
        engine.close()


def test_closing_a_sleeping_engine_frees_its_memory(folder, capfd):
    policy = make_policy(folder)
    before = used()
    engine = start(policy, folder, kv_cache_memory_bytes=4 << 30, enforce_eager=True)
    engine.sync(PolicyWeights(policy), 0)
    engine.sleep()
    engine.close()
    assert used() - before < 1
    assert "CUDA Error" not in "".join(capfd.readouterr())


def test_the_process_stays_as_it_was(folder):
    policy = make_policy(folder)
    torch.set_float32_matmul_precision("high")
    torch.cuda.manual_seed(5)
    before = torch.cuda.get_rng_state().tolist(), torch.get_rng_state().tolist(), torch.get_num_threads()
    engine = start(policy, folder)
    try:
        for version in range(20):
            engine.sync(PolicyWeights(policy), version)
            engine.generate(ask(version), SamplingParams(max_tokens=4))
            engine.sleep()
        after = torch.cuda.get_rng_state().tolist(), torch.get_rng_state().tolist(), torch.get_num_threads()
        assert after == before
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        engine.close()
        torch.set_float32_matmul_precision("highest")


def test_a_killed_run_leaves_no_memory_behind(folder):
    script = textwrap.dedent(f"""
        import sys
        sys.path[:0] = [{str(Path(__file__).parents[1])!r}, {str(Path(__file__).parent)!r}]
        import test_cuda_vllm as t
        policy = t.make_policy({folder!r})
        engine = t.start(policy, {folder!r}, enforce_eager=True)
        engine.sync(t.PolicyWeights(policy), 0)
        print("ready", flush=True)
        while True:
            engine.generate(t.ask(), t.SamplingParams(max_tokens=20))
    """)
    before = used()
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert any("ready" in line for line in process.stdout)
    assert used() > before + 1
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while used() > before + 0.5 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert used() < before + 0.5
    policy = make_policy(folder)
    engine = start(policy, folder, enforce_eager=True)
    engine.sync(PolicyWeights(policy), 0)
    engine.close()


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_one_base_for_both_sides(folder, quantization):
    """Nothing writes into it, and the engine serves the policy as it does from a base of its own."""
    policy = make_policy(folder, quantization=quantization)
    before = {n: p.detach().clone() for n, p in policy.named_parameters() if not p.requires_grad}
    engine = start(policy, folder, sleep="off", share_base="on")
    try:
        taken = engine._base.taken
        addresses = {p.data_ptr() for n, p in policy.named_parameters() if not p.requires_grad}
        assert {t.data_ptr() for t in taken.values()} <= addresses
        assert sum(t.nbytes for t in taken.values()) > 0.9 * sum(
            p.nbytes for n, p in policy.named_parameters() if n in before and p.ndim == 2
        )
        for version in range(3):
            move(policy, 10 + version)
            engine.sync(PolicyWeights(policy), version)
            gap, off = distance(policy, engine, version)
            assert gap < 0.1
            assert off > 3 * gap
        engine._base.check()
        assert all(torch.equal(p, before[n]) for n, p in policy.named_parameters() if n in before)
        next(iter(taken.values())).view(torch.uint8).view(-1)[7] ^= 1
        with pytest.raises(EngineError, match="has been written to"):
            engine.close()
        assert engine._llm is None
    finally:
        engine.close()
