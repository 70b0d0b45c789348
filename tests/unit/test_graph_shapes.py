"""When a shape runs without a graph, when its graph is captured, and which graphs are kept."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from grpo_lightning.kernels import cuda_graphs as module
from grpo_lightning.kernels.cuda_graphs import Graphs
from grpo_lightning.ops.attention.packed import PackedLayout
from grpo_lightning.packing.geometry import SequenceLayout


class Decoder(nn.Module):
    """Like one of transformers'; counts its calls."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("frequencies", torch.ones(1))
        self.calls = 0

    def forward(self, input_ids, position_ids, use_cache, layout):
        self.calls += 1
        return SimpleNamespace(last_hidden_state=self.weight * input_ids[..., None])


@pytest.fixture
def decoder(monkeypatch):
    """A decoder whose graphs replay nothing: what is captured runs at once."""
    graph = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return Decoder()


def without_graph(decoder, graphs):
    """Returns how often the decoder ran for itself."""
    return decoder.calls - graphs.captures


def call(graphs, prompt):
    """Returns the hidden states of a batch of another shape for every thousand tokens of its prompt."""
    sequences = SequenceLayout.of([prompt], [3, 3], [0, 0])
    layout = PackedLayout.of(sequences, torch.zeros(0), torch.zeros(0), segments=True, filled=True)
    rows = torch.zeros(layout.shared.shape.rows)
    return graphs.hidden(rows, rows, layout)


def step(graphs, prompt):
    call(graphs, prompt).sum().backward()


def test_a_shape_is_captured_when_it_comes_again(decoder):
    graphs = Graphs(decoder)
    seen = []
    for prompt in (50, 60, 70, 1500, 80, 1600, 1700, 50):
        step(graphs, prompt)
        seen.append((without_graph(decoder, graphs), graphs.captures))
    assert seen == [(1, 0), (1, 1), (1, 1), (2, 1), (2, 1), (2, 2), (2, 2), (2, 2)]


def test_a_shape_without_a_backward_has_not_been_seen(decoder):
    """Its kernels are not all compiled."""
    graphs = Graphs(decoder)
    call(graphs, 50)
    call(graphs, 50)
    assert (without_graph(decoder, graphs), graphs.captures) == (2, 0)
    step(graphs, 50)
    step(graphs, 50)
    assert (without_graph(decoder, graphs), graphs.captures) == (3, 1)


def test_a_forward_before_the_backward_of_a_replay_calls_the_decoder(decoder):
    graphs = Graphs(decoder)
    step(graphs, 50)
    first = call(graphs, 50)
    assert without_graph(decoder, graphs) == 1
    second = call(graphs, 50)
    assert without_graph(decoder, graphs) == 2
    (first.sum() + second.sum()).backward()
    step(graphs, 50)
    assert (without_graph(decoder, graphs), graphs.captures) == (2, 1)


def test_the_graphs_used_last_are_kept(decoder, monkeypatch):
    monkeypatch.setattr(module, "MOST", 2)
    graphs = Graphs(decoder)
    for prompt in (50, 50, 1500, 1500, 50, 2500, 2500):
        step(graphs, prompt)
    assert (without_graph(decoder, graphs), graphs.captures, len(graphs._captured)) == (3, 3, 2)
    step(graphs, 50)
    assert (without_graph(decoder, graphs), graphs.captures, len(graphs._captured)) == (3, 3, 2)
    step(graphs, 1500)  # of which the graph is gone
    assert (without_graph(decoder, graphs), graphs.captures, len(graphs._captured)) == (3, 4, 2)


@pytest.mark.parametrize("name", ["weight", "frozen", "frequencies"])
def test_tensors_at_other_addresses_need_other_graphs(decoder, name):
    """An engine that shares the base may lay its weights elsewhere."""
    graphs = Graphs(decoder)
    step(graphs, 50)
    step(graphs, 50)
    getattr(decoder, name).data = torch.ones(1)
    step(graphs, 50)
    assert (without_graph(decoder, graphs), graphs.captures) == (2, 1)
    assert graphs._captured == {}
    step(graphs, 50)
    assert (without_graph(decoder, graphs), graphs.captures) == (2, 2)
