"""Checkpointing with inputs in host memory: the same gradients; what is moved comes back in order."""

import pytest
import torch
from models import random_rollout, tiny_llama
from tiny import tiny_tokenizer

from grpo_lightning.ops.offload import Offloader
from grpo_lightning.policy.loading import _offload
from grpo_lightning.policy.policy import Policy


class Layer(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = torch.nn.Linear(64, 64)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_are_the_same(device):
    layers = [Layer(i).to(device) for i in range(4)]
    x = torch.randn(100, 64, device=device, requires_grad=True)
    found = []
    for offloader in (None, Offloader(smallest=1024)):
        for layer in layers:
            layer.zero_grad()
        x.grad = None
        y = x
        for layer in layers:
            y = layer(y) if offloader is None else offloader.checkpoint(layer, y)
        y.square().sum().backward()
        found.append([x.grad.clone(), *(layer.linear.weight.grad.clone() for layer in layers)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert offloader.moved == 4 * 100 * 64 * 4
    assert offloader._away == []


def test_small_tensors_and_parameters_stay():
    offloader = Offloader(smallest=1 << 20)
    offloader.checkpoint(Layer(0), torch.randn(10, 64, requires_grad=True)).sum().backward()
    assert offloader.moved == 0


def test_a_graph_that_is_dropped_leaves_nothing():
    offloader = Offloader(smallest=1)
    y = offloader.checkpoint(Layer(0), torch.randn(10, 64, requires_grad=True))
    del y
    assert all(ref() is None for ref in offloader._away)
    offloader.checkpoint(Layer(0), torch.randn(10, 64, requires_grad=True)).sum().backward()


def test_every_layer_of_a_model_uses_it(monkeypatch):
    b, found, moved = random_rollout(seed=1), [], []
    for offload in (False, True):
        model = tiny_llama()
        if offload:
            monkeypatch.setattr(Offloader, "_out", lambda self, x: moved.append(x.shape) or x)
            model.train()
            model._set_gradient_checkpointing(True, torch.utils.checkpoint.checkpoint)
            _offload(model)
        policy = Policy(model, tiny_tokenizer())
        policy.logprobs(b).logprobs.sum().backward()
        found.append({n: p.grad for n, p in policy.trainable().items()})
    for name, g in found[0].items():
        torch.testing.assert_close(found[1][name], g, atol=1e-5, rtol=1e-5)
    assert sum(shape == (1, b.num_tokens, 32) for shape in moved) == 2
