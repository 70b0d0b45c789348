"""The decoder's forward and backward as CUDA graphs, for models whose kernels end before Python has
launched the next.

A graph replays kernels at the addresses and sizes of its capture. So batches are filled up to few shapes
(`ops/attention/shape_buckets.py`), and what differs between batches of one shape is copied in before a
replay. The first batch of a shape runs without a graph: this compiles its kernels, which a capture cannot do,
and a shape that does not come again is not captured. It keeps only its layers' inputs and runs them again in
the backward. The same kernels run on the same sizes with and without a graph, so the results are equal bit
for bit. All graphs share one pool of memory: the activations of one micro-batch are there at a time, hence a
forward whose predecessor still waits for its backward runs without a graph too.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo_lightning.ops.attention.packed import PackedLayout
from grpo_lightning.ops.attention.shape_buckets import Shape
from grpo_lightning.ops.attention.shared_prompts import SharedPrompts

_RECOMPUTE = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
MOST = 32
"""graphs that are kept"""


class Graphs:
    """Replays a decoder; of what trains in it, only the values may change between replays.

    Args:
        decoder: of a transformers model.

    Attributes:
        captures: how many there have been.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.captures = 0
        self._decoder = decoder
        self._params = {n: p for n, p in decoder.named_parameters() if p.requires_grad}
        # frozen ones too: an engine that shares them may lay them elsewhere
        self._read = [*decoder.parameters(), *decoder.buffers()]
        self._known: set[Shape] = set()  # have run forward and backward without a graph
        self._captured: dict[Shape, _Captured] = {}  # the last one used at the end
        self._addresses: list[int] = []
        self._pool: Any = None
        self._running: Callable[[], Any] = lambda: None

    def hidden(self, ids: Tensor, positions: Tensor, layout: PackedLayout) -> Tensor:
        """Returns hidden states [T', H], which the next call may overwrite.

        The decoder is called for the first batch of a shape, and while the backward of a replay is to come.
        """
        addresses = [x.data_ptr() for x in self._read]
        if addresses != self._addresses:
            self.forget()
            self._addresses = addresses
        shape = _segments(layout).shape
        if shape is None:
            raise RuntimeError("graphs need a layout of one of few shapes")
        if shape not in self._known or self._running() is not None:
            with recomputed(self._decoder):
                hidden = decoded(self._decoder, ids, positions, layout)
            hidden.register_hook(lambda _: self._known.add(shape))  # its backward is about to run
            return hidden
        graph = self._captured.pop(shape, None) or self._capture(ids, positions, layout)
        self._captured[shape] = graph
        call = _Call(graph, (ids, positions, *_ends(layout)))
        self._running = weakref.ref(call)
        return _Replay.apply(call, *self._params.values())  # pyright: ignore[reportReturnType]

    def _capture(self, ids: Tensor, positions: Tensor, layout: PackedLayout) -> "_Captured":
        """Returns a new graph; the one that has waited longest goes where there are too many."""
        self.captures += 1
        if len(self._captured) == MOST:
            del self._captured[next(iter(self._captured))]
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        return _Captured(self._decoder, self._params, ids, positions, layout, self._pool)

    def forget(self) -> None:
        """Frees all graphs and their memory."""
        self._captured.clear()
        self._known.clear()
        self._pool, self._addresses = None, []
        self._running = lambda: None


def make_graphs(policy: Any, autocast: bool) -> Graphs | None:
    """Returns graphs of the decoder of a `Policy`, or None where it cannot be replayed, and says why."""
    config, decoder, chosen = policy.causal.config, policy.decoder, policy.prepared.chosen
    params = [p for p in decoder.parameters() if p.requires_grad]
    obstacles = {
        f"it runs padded, because {policy.padded_reason}": policy.padded_reason is not None,
        "attention over segments is off": not chosen["attention"],
        "layers are compiled": chosen["compile"],
        "it trains under autocast": autocast,
        "it trains without an adapter": not policy.is_lora,
        "its adapters are of several types": len({p.dtype for p in params}) != 1,
        "it drops out": policy.drops_out,
        "it has a sliding window": getattr(config, "sliding_window", None) is not None,
    }
    reasons = [reason for reason, holds in obstacles.items() if holds]
    if reasons:
        rank_zero_warn(f"model.kernels.graphs: the decoder runs without graphs ({', '.join(reasons)})")
        return None
    return Graphs(decoder)


def decoded(
    decoder: Any,
    ids: Tensor,
    positions: Tensor,
    layout: PackedLayout,
    instead: dict[str, Tensor] | None = None,
) -> Tensor:
    """Returns the hidden states [T, H] of one packed row; `instead` of parameters of these names."""
    kwargs = {"input_ids": ids[None], "position_ids": positions[None], "use_cache": False, "layout": layout}
    out = functional_call(decoder, instead, (), kwargs) if instead else decoder(**kwargs)
    return out.last_hidden_state[0]


@contextmanager
def recomputed(decoder: nn.Module) -> Iterator[None]:
    """Keeps of a forward inside the layers' inputs only; the backward, also outside, runs each layer again.

    The activations of a call without a graph would lie beside those that the graphs' pool has room for.
    """
    layers = [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    layers = [m for m in layers if not m.gradient_checkpointing]
    for layer in layers:
        layer.gradient_checkpointing = True
        setattr(layer, "_gradient_checkpointing_func", _RECOMPUTE)  # noqa: B010 - a function
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = False


def _segments(layout: PackedLayout) -> SharedPrompts:
    if layout.shared is None:
        raise RuntimeError("graphs need attention over segments (model.kernels.attention)")
    return layout.shared


def _ends(layout: PackedLayout) -> tuple[Tensor, ...]:
    """Returns what of a layout differs between batches of one shape."""
    s = _segments(layout)
    return s.self_attention.query, s.prefix_attention.query, s.prefix_attention.key


class _Captured:
    """One shape: its inputs, the graphs of both directions and what these leave behind."""

    def __init__(
        self,
        decoder: nn.Module,
        params: dict[str, nn.Parameter],
        ids: Tensor,
        positions: Tensor,
        layout: PackedLayout,
        pool: Any,
    ) -> None:
        self.inputs = [x.clone() for x in (ids, positions, *_ends(layout))]
        ids, positions, ends, query, key = self.inputs
        segments = _segments(layout)
        segments = replace(
            segments,
            self_attention=segments.self_attention._replace(query=ends, key=ends),
            prefix_attention=segments.prefix_attention._replace(query=query, key=key),
        )
        # without bounds, nothing can go group by group by what only this batch's host knows
        layout = replace(layout, bounds=None, shared=segments)
        # Aliases, since autograd ties a parameter to the stream of a graph that is still alive somewhere.
        alias = {n: p.detach().requires_grad_() for n, p in params.items()}

        def decode() -> Tensor:
            return decoded(decoder, ids, positions, layout, alias)

        def gradients(hidden: Tensor, dhidden: Tensor) -> Tensor:
            found = torch.autograd.grad(hidden, list(alias.values()), dhidden)
            return torch.cat([g.flatten() for g in found])

        with torch.enable_grad():
            self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with _uncollected():
                with torch.cuda.graph(self.forward, pool=pool):
                    hidden = decode()
                self.dhidden = torch.zeros_like(hidden)
                with torch.cuda.graph(self.backward, pool=pool):
                    self.gradients = gradients(hidden, self.dhidden)
        self.hidden = hidden.detach()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keeps Python's collector from freeing what CUDA does not let go of during a capture: other graphs."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


class _Call:
    """One forward; alive until its backward has run or can run no more."""

    def __init__(self, graph: _Captured, inputs: tuple[Tensor, ...]) -> None:
        self.graph, self.inputs = graph, inputs


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *params: Tensor) -> Tensor:
        for static, x in zip(call.graph.inputs, call.inputs, strict=True):
            static.copy_(x)
        call.graph.forward.replay()
        ctx.call = call
        ctx.shapes = [p.shape for p in params]
        return call.graph.hidden.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden: Tensor) -> tuple[Tensor | None, ...]:
        graph: _Captured = ctx.call.graph
        ctx.call = None
        graph.dhidden.copy_(dhidden)
        graph.backward.replay()
        # a copy: gradients outlive the next replay
        parts = graph.gradients.clone().split([s.numel() for s in ctx.shapes])
        return None, *(g.view(s) for g, s in zip(parts, ctx.shapes, strict=True))
