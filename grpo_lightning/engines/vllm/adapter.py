"""A LoRA adapter inside vLLM's linear layers, computed as the trainer's own op computes it.

vLLM's adapter slots serve many adapters at a time: they are looked up per token, and each result is rounded
before it is added. One adapter for all tokens needs neither. Two thin products and the base's own, which adds
to them in fp32, are what `ops/lora_linear.py` does, captured in the engine's decode graphs like any layer.

Imported by vLLM itself, which is told the worker's name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import (
    Tensor,
    _foreach_copy_,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.nn.functional import linear
from vllm.model_executor.layers.linear import (  # pyright: ignore[reportMissingImports]
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

from grpo_lightning.engines.base import AdaptedModule
from grpo_lightning.engines.vllm.compat import packed_modules, renamed
from grpo_lightning.engines.vllm.shared_base import take_offered
from grpo_lightning.errors import EngineError

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker  # pyright: ignore[reportMissingImports]
else:
    from vllm.v1.worker.gpu_worker import Worker  # pyright: ignore[reportMissingImports]

NOT_HELD = "vLLM's linear layers do not hold the adapter that was sent; report this with your versions"


class AdapterWorker(Worker):
    """vLLM's worker, whose model has room for one adapter before its graphs are captured."""

    def load_model(self, **kwargs: Any) -> None:
        """Loads the model, takes a base that is offered, and adds the adapter of `additional_config`."""
        super().load_model(**kwargs)
        take_offered(self.model_runner.get_model())
        ranks = self.vllm_config.additional_config["adapter"]
        self.adapter = Adapter.inside(self.model_runner.get_model(), ranks)


class AdaptedLinear(LinearMethodBase):
    """A linear method that adds scaling x A^T B^T to what another computes.

    Args:
        inner: the layer's own method.
        a: [R, K], the A of all parts of the layer over one another.
        b: [O, R], the B of each part in its rows and columns.
        scaling: of all of R, or one number per row of A.
        rows: [O] fp32, what outputs are scaled by before the bias (DoRA), or None.
    """

    def __init__(
        self, inner: Any, a: Tensor, b: Tensor, scaling: float | Tensor, rows: Tensor | None = None
    ) -> None:
        super().__init__()
        self.inner, self.a, self.b, self.scaling, self.rows = inner, a, b, scaling, rows
        self.plain = isinstance(inner, UnquantizedLinearMethod) and a.is_cuda

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """Makes the layer's own weights."""
        self.inner.create_weights(layer, *args, **kwargs)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Repacks the layer's own weights."""
        self.inner.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns rows (x W^T + scaling x A^T B^T) + bias, [..., O] for x [..., K]."""
        flat = x.reshape(-1, x.shape[-1])
        given, bias = bias, None if self.rows is not None else bias
        if isinstance(self.scaling, float):
            h = flat.new_empty(len(flat), len(self.a)).addmm_(flat, self.a.T, beta=0, alpha=self.scaling)
        else:
            h = linear(flat, self.a) * self.scaling
        if self.plain:  # rounded once: the large product adds to the small one on its way out
            y = linear(h, self.b, bias).addmm_(flat, layer.weight.T)
        else:
            y = self.inner.apply(layer, flat, bias).addmm_(h, self.b.T)
        if self.rows is not None:
            y = (y * self.rows).to(y.dtype)
            y = y if given is None else y + given
        return y.view(*x.shape[:-1], -1)


class Part(NamedTuple):
    """Where the adapter of one module of the checkpoint goes."""

    layer: Any
    row: int
    rows: int
    rank: int
    scaling: float
    scaled: bool


@dataclass(frozen=True, slots=True)
class Adapter:
    """The adapter of a loaded model."""

    places: Mapping[str, AdaptedModule]
    """views of what the layers hold, by the checkpoint's names of modules"""

    @classmethod
    def inside(cls, model: Any, ranks: Mapping[str, tuple[int, float, bool]]) -> "Adapter":
        """Returns room for an adapter, all zeros, in the layers of `model`.

        Args:
            model: vLLM's.
            ranks: of `adapter_ranks`.

        Raises:
            EngineError: a module is not a linear layer of the model, or a part of one.
        """
        found = {name: _part(model, name, *given) for name, given in ranks.items()}
        lost = sorted(name for name, part in found.items() if part is None)
        if lost:
            raise EngineError(
                f"vLLM's {type(model).__name__} has no linear layer for the adapter of {', '.join(lost[:4])}"
                f"{' ...' if len(lost) > 4 else ''} ({len(lost)} modules); leave them out of "
                "model.lora.target_modules, or take rollout.engine.sync merge"
            )
        layers: dict[Any, dict[str, Part]] = {}
        for name, part in found.items():
            if part is not None:
                layers.setdefault(part.layer, {})[name] = part
        places: dict[str, AdaptedModule] = {}
        for layer, parts in layers.items():
            places |= _adapt(layer, parts)
        return cls(places)

    def write(self, tensors: Mapping[str, AdaptedModule]) -> None:
        """Makes the layers hold `tensors`, rounded to the engine's type.

        Raises:
            EngineError: they do not hold them afterwards, to the bit.
        """
        if tensors.keys() != self.places.keys():
            raise EngineError(NOT_HELD)
        for fields in (("a", "b"), ("rows",)):
            held = [t for m in self.places.values() for f in fields if (t := getattr(m, f)) is not None]
            sent = [t for n in self.places for f in fields if (t := getattr(tensors[n], f)) is not None]
            if held:
                _foreach_copy_(held, sent)
            if held and not torch.equal(_flat(held), _flat(sent).to(held[0].dtype)):  # NaN differs too
                raise EngineError(NOT_HELD)


def put_adapter(worker: Any, tensors: Mapping[str, AdaptedModule]) -> Mapping[str, AdaptedModule]:
    """Puts an adapter into the engine of an `AdapterWorker`; returns what it holds now, by module."""
    worker.adapter.write(tensors)
    return worker.adapter.places


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _part(model: Any, name: str, rank: int, scaling: float, scaled: bool) -> Part | None:
    """Returns where the adapter of the checkpoint's module `name` goes, or None."""
    parent, _, leaf = renamed(model, name).rpartition(".")
    try:
        owner = model.get_submodule(parent)
    except AttributeError:
        return None
    stacks = {p: (stack, i) for stack, parts in packed_modules(model).items() for i, p in enumerate(parts)}
    stack, i = stacks.get(leaf, (leaf, None))
    layer: Any = getattr(owner, stack, None)
    if not isinstance(getattr(layer, "quant_method", None), LinearMethodBase):
        return None
    sizes = layer.output_sizes if i is not None else [layer.output_size]
    return Part(layer, sum(sizes[: i or 0]), sizes[i or 0], rank, scaling, scaled)


def _adapt(layer: Any, parts: Mapping[str, Part]) -> dict[str, AdaptedModule]:
    """Gives `layer` room for the adapters of its `parts`; returns views of it by module."""
    total = sum(p.rank for p in parts.values())
    like = {"dtype": layer.params_dtype, "device": next(layer.parameters()).device}
    a = torch.zeros(total, layer.input_size, **like)
    b = torch.zeros(layer.output_size, total, **like)
    rows = (
        torch.ones(layer.output_size, device=like["device"])
        if any(p.scaled for p in parts.values())
        else None
    )
    each = torch.tensor([p.scaling for p in parts.values() for _ in range(p.rank)], **like)
    scaling = next(iter(parts.values())).scaling if len({p.scaling for p in parts.values()}) == 1 else each
    layer.quant_method = AdaptedLinear(layer.quant_method, a, b, scaling, rows)
    places, at = {}, 0
    for name, p in parts.items():
        own = slice(p.row, p.row + p.rows)
        places[name] = AdaptedModule(
            a[at : at + p.rank], b[own, at : at + p.rank], None if rows is None else rows[own]
        )
        at += p.rank
    return places
