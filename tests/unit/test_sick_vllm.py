"""What the detector's benchmark does to an engine's weights on a GPU, on a model that is named like one."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from sick_vllm import HELD, spoil

SIZES = {"qkv_proj": (24, 16), "o_proj": (16, 16), "gate_up_proj": (64, 16), "down_proj": (16, 32)}


def engine():
    torch.manual_seed(0)
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList()
    for _ in range(3):
        layer = nn.Module()
        for name, (rows, columns) in SIZES.items():
            layer.add_module(name, nn.Linear(columns, rows, bias=False))
        layer.rotary_emb = nn.Module()
        layer.rotary_emb.register_buffer("cos_sin_cache", torch.randn(32, 4))
        model.model.layers.append(layer)
    model.config = SimpleNamespace(hidden_size=16, num_attention_heads=4, num_key_value_heads=1, head_dim=4)
    return SimpleNamespace(model_runner=SimpleNamespace(model=model))


@pytest.mark.parametrize(
    ("sickness", "count"),
    [
        ("a layer missing", 2),
        ("q and k exchanged", 3),
        ("wrong rope base", 3),
        ("in fp8", 12),
        ("in 4 bit", 12),
    ],
)
@torch.no_grad()
def test_each_is_written_once_and_again_after_a_sync(sickness, count):
    worker, spoiled = engine(), {}
    before = {n: x.clone() for n, x in worker.model_runner.model.state_dict().items()}
    assert spoil(worker, sickness, spoiled) == count
    after = worker.model_runner.model.state_dict()
    assert sum(not torch.equal(before[n], x) for n, x in after.items()) == count
    left = {n: x.clone() for n, x in after.items()}
    assert spoil(worker, sickness, spoiled) == 0
    assert all(torch.equal(left[n], x) for n, x in worker.model_runner.model.state_dict().items())
    worker.model_runner.model.load_state_dict(before)
    assert spoil(worker, sickness, spoiled) == count
    assert sickness in HELD


@torch.no_grad()
def test_rows_of_q_and_k_change_places():
    worker = engine()
    w = worker.model_runner.model.model.layers[0].qkv_proj.weight
    before = w.clone()
    spoil(worker, "q and k exchanged", {})
    assert torch.equal(w[:4], before[16:20])
    assert torch.equal(w[16:20], before[:4])
    assert torch.equal(w[4:16], before[4:16])
    assert torch.equal(w[20:], before[20:])
