"""Activation checkpointing that keeps a layer's input in host memory until the backward asks for it.

What is left on the device is the input of one layer at a time instead of one per layer. Copies run on a
stream of their own: out while the next layer computes, back while the layer above is in its backward.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SMALLEST = 1 << 20
"""bytes below which a tensor stays where it is: masks, positions"""


class Offloader:
    """Takes the place of `torch.utils.checkpoint.checkpoint` in every layer of one model.

    Args:
        smallest: bytes below which a tensor is not moved.
    """

    def __init__(self, smallest: int = SMALLEST) -> None:
        self.smallest = smallest
        self.moved = 0
        """bytes moved out so far"""
        self._away: list[
            weakref.ref[_Away]
        ] = []  # in the order of the forward; a dropped graph drops its own
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs `function` and forgets what it saved; its inputs wait in host memory."""
        kwargs.pop("use_reentrant", None)
        with torch.autograd.graph.saved_tensors_hooks(self._out, self._back):
            return checkpoint(function, *args, use_reentrant=False, **kwargs)

    def _out(self, x: Tensor) -> "Tensor | _Away":
        if x.numel() * x.element_size() < self.smallest or isinstance(x, torch.nn.Parameter):
            return x
        away = _Away(x, self._stream(x.device))
        self.moved += x.numel() * x.element_size()
        self._away.append(weakref.ref(away))
        return away

    def _back(self, kept: "Tensor | _Away") -> Tensor:
        if not isinstance(kept, _Away):
            return kept
        here = kept.here()
        # The backward runs from the last layer to the first: the one below is wanted next.
        while self._away and self._away.pop()() is not kept:
            pass
        below = self._away[-1]() if self._away else None
        if below is not None:
            below.fetch()
        return here

    def _stream(self, device: torch.device) -> "torch.cuda.Stream | None":
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class _Away:
    """A tensor in host memory."""

    def __init__(self, x: Tensor, stream: "torch.cuda.Stream | None") -> None:
        self.device, self.stream = x.device, stream
        self.fetched: Tensor | None = None
        self.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=stream is not None)
        if stream is None:
            self.host.copy_(x)
            return
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self.host.copy_(x, non_blocking=True)
        x.record_stream(stream)  # its memory may be used again only after the copy

    def fetch(self) -> None:
        """Starts to bring it back."""
        if self.fetched is not None or self.stream is None:
            return
        with torch.cuda.stream(self.stream):
            self.fetched = self.host.to(self.device, non_blocking=True)

    def here(self) -> Tensor:
        """Returns it on its device."""
        self.fetch()
        if self.fetched is None or self.stream is None:
            return self.host.clone()
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        self.fetched.record_stream(current)
        return self.fetched
