"""Which kernels run, and a loaded model prepared for them.

Modules are exchanged by the table in `patching.py`: each becomes an instance of a subclass of its own class,
so that saving, switching off and merging stay peft's. Decoder layers are compiled. `PatchedModel.plain` runs
the model as it was.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from grpo_lightning.errors import ConfigError, choices, hinted
from grpo_lightning.kernels.patching import ModulePatcher
from grpo_lightning.packing.geometry import SequenceLayout

CHOICES = ("auto", "on", "off")
AUTO = {
    "head": True,
    "attention": True,
    "lora": True,
    "qkv": True,
    "swiglu": True,
    "norm": True,
    "rotary": True,
    "compile": False,  # nothing over the kernels above, for a minute of warm-up
    "loss": True,
    "graphs": False,  # their memory stays taken between steps
}
"""what `auto` takes on CUDA: a kernel is True once benchmarks/results shows what it gains"""

TRITON = ("head", "loss")
"""what needs CUDA, or Triton's interpreter"""

CUDA_ONLY = ("graphs",)

WORTH_SHARING = 1.2
"""how many times the tokens there must be without sharing; below, a second call of attention costs more"""


@hinted
@dataclass(frozen=True)
class KernelConfig:
    """Which fast paths run; each is `auto`, `on` or `off`, and off computes the same in plain torch.

    Args:
        head: the Triton kernel of the LM head's log-probabilities.
        attention: flash attention over segments, a prompt once per group (half types on CUDA).
        lora: a LoRA layer as one op, in the base's type with fp32 masters.
        qkv: the adapters of q, k and v read x once, and write its gradient into one buffer.
        swiglu: gate and up likewise, and silu(gate) up as one kernel each way.
        norm: RMSNorm as one kernel each way.
        rotary: the rotary embeddings of q and k as one kernel each way.
        compile: torch.compile of every decoder layer, once for all lengths.
        loss: the Triton kernel of the loss, its gradient and its statistics in one launch.
        graphs: the decoder's forward and backward as CUDA graphs, one per shape, of batches filled up to few
            shapes, captured when a shape comes for the second time. For models so small that a GPU waits for
            launches; the activations of one micro-batch stay allocated between steps, and
            `rollout.micro_batches: auto` is `accumulate_grad_batches`.
        shared_prompts: a prompt goes through the model once for its group. `auto` copies it before every
            completion where attention runs as segments and sharing saves less than a sixth of the tokens.
    """

    head: str | bool = "auto"
    attention: str | bool = "auto"
    lora: str | bool = "auto"
    qkv: str | bool = "auto"
    swiglu: str | bool = "auto"
    norm: str | bool = "auto"
    rotary: str | bool = "auto"
    compile: str | bool = "auto"
    loss: str | bool = "auto"
    graphs: str | bool = "auto"
    shared_prompts: str | bool = "auto"

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            if isinstance(value, bool):  # what YAML makes of an unquoted on or off
                value = "on" if value else "off"
                object.__setattr__(self, key, value)
            if value not in CHOICES:
                raise ConfigError(f"model.kernels.{key} is {choices(value, CHOICES)}")

    def chosen(self, device: torch.device) -> dict[str, bool]:
        """Returns which kernels run on `device`."""
        given = asdict(self)
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        for key in (*TRITON, *CUDA_ONLY):
            there = device.type == "cuda" or (interpreted and key in TRITON)
            if given[key] == "on" and not there:
                raise ConfigError(
                    f"model.kernels.{key} is 'on', but the model is on {device.type}; take auto or off"
                )
        return {
            key: on and device.type == "cuda" if given[key] == "auto" else given[key] == "on"
            for key, on in AUTO.items()
        }

    def shares(self, shape: SequenceLayout, segments: bool) -> bool:
        """Returns whether prompts stand once for their group in a forward of `shape`."""
        worth = not segments or shape.sharing >= WORTH_SHARING
        return worth if self.shared_prompts == "auto" else self.shared_prompts == "on"


class PatchedModel:
    """A model whose layers have been exchanged as `chosen` says.

    Args:
        model: a transformers model, wrapped by peft or not.
        decoder: its decoder, the layers of which are compiled.
        chosen: of `KernelConfig.chosen`; nothing is exchanged by default.
        autocast: whether training runs under autocast, which the LoRA op does not cover.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: nn.Module,
        chosen: dict[str, bool] | None = None,
        autocast: bool = False,
    ) -> None:
        self.chosen = chosen or dict.fromkeys(AUTO, False)
        self._exchange = ModulePatcher(model, self.chosen, autocast)
        layers: Any = getattr(decoder, "layers", [])
        self._compiled: list[nn.Module] = list(layers) if self.chosen["compile"] else []
        if self.chosen["compile"] and not self._compiled:
            rank_zero_warn(
                f"model.kernels.compile: {type(decoder).__name__} has no list of layers to compile"
            )
        for layer in self._compiled:
            layer.compile(dynamic=True)

    def restore(self) -> None:
        """Undoes the exchange for good."""
        self._exchange.forget()
        for layer in self._compiled:
            layer._compiled_call_impl = None
        self._compiled = []
        self.chosen = dict.fromkeys(AUTO, False)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Runs everything as it was loaded."""
        chosen, self.chosen = self.chosen, dict.fromkeys(AUTO, False)
        self._exchange.undo()
        try:
            with self.eager():
                yield
        finally:
            self.chosen = chosen
            self._exchange.swap()

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Runs layers uncompiled: decoding token by token would compile them again and again."""
        calls = [layer._compiled_call_impl for layer in self._compiled]
        for layer in self._compiled:
            layer._compiled_call_impl = None
        try:
            yield
        finally:
            for layer, call in zip(self._compiled, calls, strict=True):
                layer._compiled_call_impl = call
