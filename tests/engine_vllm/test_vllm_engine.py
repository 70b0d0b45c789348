"""The real vLLM on a CPU: what it serves is the policy that trains, and the process stays as it was."""

import gc
import random

import numpy as np
import pytest
import torch
from models import TINY, save_tiny
from tiny import tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_lightning.batch import RolloutBatch
from grpo_lightning.errors import ConfigError, EngineError
from grpo_lightning.loading import load_policy
from grpo_lightning.lora import lora_config
from grpo_lightning.rollout import EngineContext, HFEngine, Request, VLLMEngine
from grpo_lightning.rollout.engine import sample_seeds
from grpo_lightning.samples import SamplingParams

pytestmark = pytest.mark.vllm

PROMPTS = [[5 + i % 20 for i in range(40)], [9, 8, 7, 6, 5, 4], [20]]
SHAPE = {"hidden_size": 128, "head_dim": 32}
"""vLLM's CPU attention takes no narrower heads"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama"), **SHAPE)


def make_policy(folder, seed=1, dtype=torch.float32, **lora):
    settings = {"r": 4, "lora_alpha": 8, **lora}
    policy = load_policy(
        folder,
        tiny_tokenizer(),
        lora=None if lora.get("r") == 0 else lora_config(settings),
        model_kwargs={"dtype": dtype},
    )
    move(policy, seed)
    return policy


def move(policy, seed):
    """Gives what trains a push that changes every distribution."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in policy.trainable().values():
            p.add_(torch.randn_like(p) * 0.15)


def start(policy, folder, **options):
    engine = VLLMEngine(**{"max_num_seqs": 16, **options})
    engine.start(EngineContext(policy=policy, model_path=folder, max_model_len=64, sampling=SamplingParams()))
    return engine


def ask(group=4, rollout=0, prompts=PROMPTS):
    return [
        Request(prompt_ids=p, seeds=sample_seeds(0, rollout, i, group), uid=i) for i, p in enumerate(prompts)
    ]


def distance(policy, requests, out, sampling):
    """Returns |trainer - engine| over sampled tokens, in nats, and the same with the adapter off."""
    flat = [c for group in out for c in group]
    batch = RolloutBatch.pack(
        prompt_ids=[r.prompt_ids for r in requests],
        completions=flat,
        group_ids=[i for i, group in enumerate(out) for _ in group],
        advantages=torch.zeros(len(flat)),
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        truncation=sampling.truncation,
    )
    with torch.no_grad():
        scores = policy.logprobs(batch)
        rescored = batch if scores.log_kept is None else batch.rescored(scores.log_kept)
        gap = (scores.logprobs - rescored.sampler_logprobs).abs()
        if not policy.is_lora:
            return gap, None
        with policy.reference():
            return gap, (policy.logprobs(batch).logprobs - rescored.sampler_logprobs).abs()


KINDS = {
    "adapter": ("adapter", {}),
    "rslora as adapter": ("adapter", {"use_rslora": True}),
    "adapter on some modules": ("adapter", {"target_modules": ["q_proj", "down_proj"]}),
    "merge": ("merge", {}),
    "merge of some modules": ("merge", {"target_modules": ["k_proj", "up_proj"]}),
    "merge of DoRA": ("merge", {"use_dora": True}),
    "merge of a pattern": ("merge", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 1}}),
    "merge of PiSSA": ("merge", {"init_lora_weights": "pissa"}),
    "merge with whole modules": (
        "merge",
        {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    ),
    "full": ("full", {"r": 0}),
}


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
            engine.sync(policy, version)
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
        engine.sync(policy, 0)
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
            engine.sync(policy, 0)
            gap, off = distance(policy, ask(), engine.generate(ask(), sampling), sampling)
            assert gap.mean() < 0.08
            assert off.mean() > 5 * gap.mean()
        finally:
            engine.close()


def assert_served(policy, engine):
    sampling = SamplingParams(max_tokens=8)
    gap, off = distance(policy, ask(), engine.generate(ask(), sampling), sampling)
    assert gap.mean() < 2e-5
    assert off.mean() > 0.1


@pytest.fixture(scope="module")
def served(folder):
    """A policy and an engine that serves it; tests leave both as they are.

    It no longer decodes once another engine of the process has been closed: tests with their own come later.
    """
    policy = make_policy(folder)
    engine = start(policy, folder, sync="adapter")
    engine.sync(policy, 0)
    yield policy, engine
    engine.close()


def test_hf_and_vllm_agree(served):
    policy, engine = served
    hf = HFEngine()
    hf.sync(policy, 0)
    sampling = SamplingParams(max_tokens=10, temperature=0.0)
    theirs, ours = engine.generate(ask(1), sampling), hf.generate(ask(1), sampling)
    for a, b in zip(theirs, ours, strict=True):
        assert a[0].token_ids == b[0].token_ids
        assert a[0].finish_reason == b[0].finish_reason
        assert a[0].logprobs == pytest.approx(b[0].logprobs, abs=1e-4)


def test_a_rollout_is_a_function_of_weights_and_seeds(served):
    _, engine = served
    sampling = SamplingParams(max_tokens=10)

    def ids(requests):
        return [[c.token_ids for c in group] for group in engine.generate(requests, sampling)]

    first = ids(ask())
    assert ids(ask()) == first
    assert ids(ask()[::-1])[::-1] == first
    assert ids(ask(rollout=1)) != first
    many = ids(ask(group=8))
    assert all(len({tuple(c) for c in group}) > 4 for group in many)


def test_completions_end_at_an_end_token_or_the_limit(served):
    policy, engine = served
    out = engine.generate(ask(16), SamplingParams(max_tokens=12))
    flat = [c for group in out for c in group]
    assert {c.finish_reason for c in flat} == {"stop", "length"}
    ends = set(policy.eos_ids)
    for c in flat:
        assert len(c.token_ids) == len(c.logprobs) <= 12
        assert (c.token_ids[-1] in ends) == (c.finish_reason == "stop")
        assert not ends & set(c.token_ids[:-1])
        assert c.finish_reason == "stop" or len(c.token_ids) == 12


@pytest.mark.parametrize("options", [{"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.1}])
def test_truncated_sampling_is_rescored_to_the_whole_vocabulary(served, options):
    policy, engine = served
    sampling = SamplingParams(max_tokens=10, **options)
    gap, _ = distance(policy, ask(8), engine.generate(ask(8), sampling), sampling)
    assert gap.mean() < 1e-4


BAD = {
    "no tokens": ([], "prompt 3 of rollout 7 has no tokens"),
    "too long": ([5] * 60, "prompt 3 of rollout 7 has 60 tokens"),
    "outside of the vocabulary": ([5, 131], "prompt 3 of rollout 7 has token ids outside"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_prompt_that_cannot_run_is_named(served, case):
    _, engine = served
    ids, message = BAD[case]
    with pytest.raises(EngineError, match=message):
        engine.generate(
            [Request(prompt_ids=ids, seeds=[1], uid=3, rollout_index=7)], SamplingParams(max_tokens=8)
        )
    engine.generate(ask(), SamplingParams(max_tokens=2))  # and nothing of it is left behind


def test_a_dead_engine_is_an_engine_error(served, monkeypatch):
    _, engine = served

    def die(*args, **kwargs):
        raise RuntimeError("EngineCore encountered an issue")

    monkeypatch.setattr(engine._llm.llm_engine, "step", die)
    with pytest.raises(EngineError, match=r"could not generate: RuntimeError: EngineCore.*--ckpt_path last"):
        engine.generate(ask(), SamplingParams(max_tokens=2))
    monkeypatch.undo()


def test_groups_come_as_they_end_and_others_may_join(served):
    policy, engine = served
    sampling = SamplingParams(max_tokens=20)
    first, later = ask(4), ask(4, rollout=1)
    session = engine.session(sampling)
    session.add(first)
    ended, joined = [], False
    while session.busy:
        ended += session.step()
        if not joined:
            session.add(later)
            joined = True
    assert {id(r) for r, _ in ended} == {id(r) for r in (*first, *later)}
    alone = {id(r): group for r, group in zip(first, engine.generate(first, sampling), strict=True)}
    for request, completions in ended:
        if id(request) in alone:
            assert [c.token_ids for c in completions] == [c.token_ids for c in alone[id(request)]]
    session = engine.session(sampling)
    session.add(first)
    session.abort()
    assert not session.busy
    engine.sync(policy, 0)  # needs an engine in which nothing runs


def test_a_later_push_that_does_not_arrive_is_an_error(served, monkeypatch):
    from grpo_lightning.rollout import vllm_compat

    policy, engine = served
    places, stock = engine._slot.places, vllm_compat._foreach_copy_

    def lossy(to, of):
        stock(to, of)
        if to is places:
            to[5][3] += 1e-3

    monkeypatch.setattr(vllm_compat, "_foreach_copy_", lossy)
    with pytest.raises(EngineError, match="does not hold what was pushed"):
        engine.sync(policy, 1)
    monkeypatch.undo()
    engine.sync(policy, 0)
    assert_served(policy, engine)


def test_an_adapter_that_vllm_moved_or_dropped_is_laid_anew(served):
    policy, engine = served
    first = engine._slot
    module = first.buffers[0][0]
    module.lora_b_stacked = tuple(b.clone() for b in module.lora_b_stacked)
    engine.sync(policy, 1)
    assert engine._slot is not first
    second = engine._slot
    second.manager.remove_adapter(1)
    engine.sync(policy, 2)
    assert engine._slot is not second
    assert_served(policy, engine)
    third = engine._slot
    engine.sync(policy, 0)
    assert engine._slot is third


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
            engine.sync(policy, version)
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


def test_nothing_drifts_over_100_merges(folder):
    policy = make_policy(folder)
    base = {n: p.clone() for n, p in policy.named_parameters() if not p.requires_grad}
    engine = start(policy, folder, sync="merge")
    sampling = SamplingParams(max_tokens=10)
    try:
        for version in range(100):
            engine.sync(policy, version)
        assert all(torch.equal(p, base[n]) for n, p in policy.named_parameters() if n in base)
        gap, _ = distance(policy, ask(), engine.generate(ask(), sampling), sampling)
        assert gap.mean() < 2e-5
    finally:
        engine.close()


def test_a_module_without_a_place_is_an_error(served, monkeypatch):
    from grpo_lightning.rollout import vllm
    from grpo_lightning.rollout.weights import Adapter, adapter_of

    policy, engine = served

    def with_more(p):
        sent = adapter_of(p)
        name = "base_model.model.model.layers.0.self_attn.r_proj"
        a, b = torch.zeros(4, 128), torch.zeros(128, 4)
        return Adapter({**sent.tensors, f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, sent.config)

    monkeypatch.setattr(vllm, "adapter_of", with_more)
    with pytest.raises(EngineError, match=r"no place for the adapter of .*r_proj.*1 modules"):
        engine.sync(policy, 1)
    monkeypatch.undo()
    engine.sync(policy, 0)


def test_a_slot_that_is_not_what_vllm_would_make_of_it_is_an_error(folder, monkeypatch):
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    policy = make_policy(folder)
    engine = start(policy, folder, sync="adapter")
    stock = BaseLinearLayerWithLoRA.set_lora

    def sloppy(self, index, lora_a, lora_b):
        stock(self, index, lora_a, lora_b * 1.01)

    monkeypatch.setattr(BaseLinearLayerWithLoRA, "set_lora", sloppy)
    try:
        with pytest.raises(EngineError, match="does not hold what was pushed"):
            engine.sync(policy, 0)
        monkeypatch.undo()
        engine.sync(policy, 0)
        assert_served(policy, engine)
    finally:
        engine.close()


class Counted(TorchDispatchMode):
    """Counts what computes; views are free."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_a_push_is_a_handful_of_operations(folder):
    """However many layers there are: one by one their launches take longer than the copying (H200: 58 ms)."""
    policy = make_policy(folder, r=8)  # fills its slot
    engine = start(policy, folder, sync="adapter")
    try:
        engine.sync(policy, 0)
        assert len(engine._slot.places) == 28
        with Counted() as ops:
            engine.sync(policy, 1)
        assert ops.count < 10
    finally:
        engine.close()


def test_weights_written_alone_land_in_their_stacks(folder, monkeypatch):
    """As on CUDA, where vLLM does not repack: only what training changes is sent, straight into the model."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    from grpo_lightning.rollout import vllm_compat
    from grpo_lightning.rollout.weights import merged_weights

    monkeypatch.setattr(UnquantizedLinearMethod, "process_weights_after_loading", lambda self, layer: None)
    policy = make_policy(folder, target_modules=["k_proj", "up_proj"])
    engine = start(policy, folder, sync="merge")
    try:
        pairs = list(merged_weights(policy, torch.float32, None))
        assert {n.split(".")[-2] for n, _ in pairs} == {"k_proj", "up_proj"}
        (model,) = engine._llm.collective_rpc(vllm_compat._model)
        model.load_weights(iter(pairs))
        whole = dict(merged_weights(policy, torch.float32, model.packed_modules_mapping))
        for stack, parts in (
            ("self_attn.qkv_proj", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
            ("mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"]),
        ):
            for i in range(2):
                held = model.get_submodule(f"model.layers.{i}.{stack}").weight
                assert torch.equal(held, torch.cat([whole[f"model.layers.{i}.{p}.weight"] for p in parts]))
    finally:
        engine.close()


def test_a_regex_holds(folder):
    policy = make_policy(folder)
    sampling = SamplingParams(max_tokens=6, regex="[ab]{3}")
    engine = VLLMEngine(sync="merge", max_num_seqs=8)
    engine.start(EngineContext(policy=policy, model_path=folder, max_model_len=64, sampling=sampling))
    try:
        engine.sync(policy, 0)
        tokenizer = tiny_tokenizer()
        out = engine.generate(ask(2), sampling)
        assert all(c.finish_reason == "stop" for group in out for c in group)
        texts = [tokenizer.decode(c.token_ids[:-1]) for group in out for c in group]  # without the end token
        assert all(len(t) == 3 and set(t) <= set("ab") for t in texts), texts
    finally:
        engine.close()


def test_what_cannot_start_says_why(folder):
    policy = make_policy(folder, use_dora=True)
    with pytest.raises(ConfigError, match=r"sync 'adapter' .*use_dora.*take merge"):
        start(policy, folder, sync="adapter")
    plain = make_policy(folder)
    with pytest.raises(ConfigError, match=r"max_model_len is 32, .* make 64"):
        start(plain, folder, max_model_len=32)
    with pytest.raises(ConfigError, match="engine_kwargs sets seed"):
        start(plain, folder, engine_kwargs={"seed": 4})
    with pytest.raises(ConfigError, match=r"slots hold at most 512"):
        start(make_policy(folder, r=520), folder, sync="adapter")
    with pytest.raises(ConfigError, match=r"sync is 'adaptor' \(did you mean 'adapter'"):
        VLLMEngine(sync="adaptor")
    with pytest.raises(EngineError, match="could not start"):
        start(plain, "/nowhere")
