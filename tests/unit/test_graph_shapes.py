"""Which shapes CUDA graphs fill batches up to, what becomes of them over many, and over a checkpoint."""

import torch
from fits import module
from models import save_tiny
from torch import nn

from grpo_lightning.graphs import MOST, Graphs
from grpo_lightning.ops.filling import Region, Shape


def shape(n):
    return Shape(*[Region(64 * n, 8, 64)] * 4)


def test_the_shapes_used_last_are_kept():
    shapes = [shape(1), shape(2)]
    graphs = Graphs(nn.Linear(2, 2), shapes)
    graphs._captured = {shape(1): "one", shape(2): "two"}
    graphs._use(shape(1))
    assert shapes == [shape(2), shape(1)]
    for n in range(3, MOST + 2):
        graphs._use(shape(n))
    assert len(shapes) == MOST
    assert shapes[0] == shape(1)
    assert graphs._captured == {shape(1): "one"}
    graphs.forget()
    assert graphs._captured == {}
    assert len(shapes) == MOST


def test_a_checkpoint_remembers_shapes(tmp_path):
    """So that a resumed run fills its batches as the run before would have."""
    folder = save_tiny(tmp_path / "model")
    before, after = module(folder), module(folder)
    before.configure_model(), after.configure_model()
    before.policy.graph_shapes += [shape(2), shape(1)]
    checkpoint = {"state_dict": before.state_dict()}
    before.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "c")
    after.on_load_checkpoint(torch.load(tmp_path / "c", weights_only=True))
    assert after.policy.graph_shapes == [shape(2), shape(1)]
    assert isinstance(after.policy.graph_shapes[0].whole, Region)
    del checkpoint["grpo_lightning"]["graph_shapes"]  # of a version that kept none
    after.on_load_checkpoint(checkpoint)
    assert after.policy.graph_shapes == []
