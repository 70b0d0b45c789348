"""How weights reach the real vLLM: written exactly, where they belong, in a handful of operations."""

import pytest
import torch
from serving import ask, assert_served, distance, make_policy, start
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_lightning.errors import EngineError
from grpo_lightning.samples import SamplingParams

pytestmark = pytest.mark.vllm


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
