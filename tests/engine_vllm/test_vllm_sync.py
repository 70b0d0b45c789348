"""How weights reach the real vLLM: written exactly, where they belong, in a handful of operations."""

from types import SimpleNamespace

import pytest
import torch
from serving import ask, assert_served, distance, make_policy, start
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_lightning.engines import EngineContext, VLLMEngine
from grpo_lightning.engines.weight_sync import PolicyWeights
from grpo_lightning.errors import ConfigError, EngineError
from grpo_lightning.types import SamplingParams

pytestmark = pytest.mark.vllm


def test_nothing_drifts_over_100_merges(folder):
    policy = make_policy(folder)
    base = {n: p.clone() for n, p in policy.named_parameters() if not p.requires_grad}
    engine = start(policy, folder, sync="merge")
    sampling = SamplingParams(max_tokens=10)
    try:
        for version in range(100):
            engine.sync(PolicyWeights(policy), version)
        assert all(torch.equal(p, base[n]) for n, p in policy.named_parameters() if n in base)
        gap, _ = distance(policy, ask(), engine.generate(ask(), sampling), sampling)
        assert gap.mean() < 2e-5
    finally:
        engine.close()


def test_layers_that_do_not_hold_what_was_sent_are_an_error(folder, monkeypatch):
    from grpo_lightning.engines.vllm import adapter as vllm_adapter

    policy = make_policy(folder)
    engine = start(policy, folder, sync="adapter")
    stock = vllm_adapter._foreach_copy_

    def lossy(to, of):
        stock(to, of)
        to[5][3] += 1e-3

    try:
        engine.sync(PolicyWeights(policy), 0)
        monkeypatch.setattr(vllm_adapter, "_foreach_copy_", lossy)
        with pytest.raises(EngineError, match="do not hold the adapter that was sent"):
            engine.sync(PolicyWeights(policy), 1)
        monkeypatch.undo()
        next(iter(policy.trainable().values())).data[0, 0] = float("nan")
        with pytest.raises(EngineError, match="do not hold the adapter that was sent"):
            engine.sync(PolicyWeights(policy), 1)
        next(iter(policy.trainable().values())).data[0, 0] = 0.5
        engine.sync(PolicyWeights(policy), 1)
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
    policy = make_policy(folder)
    engine = start(policy, folder, sync="adapter")
    stacked = sum("lora_B" in n and "o_proj" not in n and "down" not in n for n in policy.trainable())
    try:
        engine.sync(PolicyWeights(policy), 0)
        with Counted() as ops:
            engine.sync(PolicyWeights(policy), 1)
        assert ops.count < 16 + stacked  # the B of a stack's parts lie apart, and are read one by one
    finally:
        engine.close()


def test_weights_written_alone_land_in_their_stacks(folder, monkeypatch):
    """As on CUDA, where vLLM does not repack: only what training changes is sent, straight into the model."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    from grpo_lightning.engines.vllm import compat as vllm_compat
    from grpo_lightning.engines.weight_sync import merged_weights

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


def test_a_module_without_a_layer_is_an_error(folder, monkeypatch):
    from grpo_lightning.engines.vllm import arguments as vllm_options
    from grpo_lightning.engines.weight_sync import adapter_ranks

    def with_more(policy):
        return {**adapter_ranks(policy), "model.layers.0.self_attn.r_proj": (4, 2.0, False)}

    monkeypatch.setattr(vllm_options, "adapter_ranks", with_more)
    with pytest.raises(EngineError, match=r"no linear layer for the adapter of .*r_proj.*1 modules"):
        start(make_policy(folder), folder, sync="adapter")


@pytest.mark.parametrize("kind", ["adapter", "merge", "full"])
def test_the_share_of_a_small_update_that_arrives(folder, kind, recwarn):
    """Adam's first step at 5e-6: nothing of a merge into bf16 is left, all of an adapter."""
    policy = make_policy(folder, dtype=torch.bfloat16, r=0 if kind == "full" else 4)
    for p in policy.trainable().values():
        p.data = p.data.float()
    if kind == "full":
        policy.precision = lambda: torch.autocast("cpu", torch.bfloat16)
    engine = start(policy, folder, sync=kind)
    try:
        if kind != "full":
            for name, p in policy.trainable().items():
                p.data = torch.zeros_like(p) if "lora_B" in name else 0.05 * torch.randn_like(p)
        engine.sync(PolicyWeights(policy), 0)
        assert engine.sync_metrics == {}  # nothing has changed yet
        for p in policy.trainable().values():
            p.data += 5e-6 * torch.randn_like(p).sign()
        engine.sync(PolicyWeights(policy), 1)
        share = engine.sync_metrics["sync/update_arrived"]
        assert (share > 0.99) == (kind == "adapter")
        assert (share < 0.5) == (kind != "adapter")
        warnings = [str(w.message) for w in recwarn if "reaches the engine" in str(w.message)]
        assert len(warnings) == (kind != "adapter")
        assert all(f"sync '{kind}' rounds weights to torch.bfloat16" in w for w in warnings)
    finally:
        engine.close()


REFUSED = {
    "writes into the engine's weights": {"sync": "merge"},
    "moves the engine's weights away": {"sleep": "weights"},
    "repacks its weights on a CPU": {"device": "cpu"},
    r"base is in torch.float32 and the engine in torch.bfloat16": {"base": torch.float32},
}


@pytest.mark.parametrize("message", [None, *REFUSED])
def test_a_base_that_cannot_be_shared_is_refused_before_the_start(message):
    case = REFUSED.get(message, {})
    causal = SimpleNamespace(
        device=torch.device(case.get("device", "cuda")), dtype=case.get("base", torch.bfloat16)
    )
    policy = SimpleNamespace(causal=causal, compute_dtype=torch.bfloat16)
    given = {"sync": case.get("sync", "adapter"), "sleep": case.get("sleep", "off")}
    if message is None:
        assert VLLMEngine(**given, share_base="on")._shares_base(policy)
        assert not VLLMEngine(**given, share_base="off")._shares_base(policy)
        return
    assert not VLLMEngine(**given)._shares_base(policy)
    with pytest.raises(ConfigError, match=message):
        VLLMEngine(**given, share_base="on")._shares_base(policy)


def test_a_base_that_was_to_be_shared_and_is_not_leaves_no_engine(folder, monkeypatch):
    from grpo_lightning.engines.vllm import adapter as vllm_adapter

    monkeypatch.setattr(vllm_adapter, "take_offered", lambda model: None)
    monkeypatch.setattr(VLLMEngine, "_shares_base", lambda self, policy: True)
    engine = VLLMEngine(max_num_seqs=16, share_base="on")
    policy = make_policy(folder)
    context = EngineContext(policy=policy, model_path=folder, max_model_len=64, sampling=SamplingParams())
    with pytest.raises(ConfigError, match="no weight of the engine equals the trainer's"):
        engine.start(context)
    assert engine._llm is None
