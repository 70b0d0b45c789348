"""What an engine gets of the policy's weights: the adapter alone, the adapter merged into its base, or all.

Nothing here changes the policy: a merge is computed beside the frozen base, and no rounding drifts into
it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grpo_lightning.engines.base import AdaptedModule, NamedWeight, SyncKind
from grpo_lightning.policy.policy import Policy

PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""values of `init_lora_weights` that leave the base as it was loaded"""
MERGED_AT_ONCE = 256 << 20
"""bytes of fp32 weights that are merged in one product"""


@dataclass(frozen=True, slots=True)
class PolicyWeights:
    """The `WeightSource` of a policy whose weights are whole on this rank."""

    policy: Policy

    def adapter(self) -> dict[str, AdaptedModule]:
        """Returns what trains of each adapted linear layer; A and B are the policy's own tensors."""
        return adapter_of(self.policy)

    def tensors(
        self,
        kind: SyncKind,
        dtype: torch.dtype,
        *,
        stacked: Mapping[str, list[str]] | None = None,
        first: bool = False,
    ) -> Iterator[NamedWeight]:
        """Yields (name, weight) of what a sync of this kind sends, as `WeightSource` says."""
        if kind == "adapter":
            return beside_adapter(self.policy, dtype, stacked, first)
        if kind == "merge":
            return merged_weights(self.policy, dtype, stacked)
        return all_weights(self.policy, dtype)


def lora_layers(policy: Policy) -> Iterator[tuple[str, Any]]:
    """Yields the adapted linear layers by the name they have without peft."""
    from peft.tuners.lora import LoraLayer

    return ((n, m) for n, m in _adapted(policy) if isinstance(m, LoraLayer) and "default" in m.lora_A)


def _adapted(policy: Policy) -> Iterator[tuple[str, nn.Module]]:
    """Yields what peft put in place of the model's own modules, by their names.

    Does not look inside: most modules of an adapted model are there, and a walk over all takes as long as
    the copying of a small adapter.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for leaf, child in module.named_children():
            if isinstance(child, LoraLayer | ModulesToSaveWrapper):
                yield prefix + leaf, child
            else:
                yield from walk(f"{prefix}{leaf}.", child)

    return walk("", policy.causal)


def adapter_ranks(policy: Policy) -> dict[str, tuple[int, float, bool]]:
    """Returns rank, scaling and whether outputs are scaled (DoRA) of each adapted layer, by its name."""
    return {
        name: (layer.r["default"], float(layer.scaling["default"]), bool(layer.use_dora.get("default")))
        for name, layer in lora_layers(policy)
    }


def adapter_of(policy: Policy) -> dict[str, AdaptedModule]:
    """Returns what trains of each adapted layer, by its name; A and B are the policy's own tensors."""
    return {
        name: AdaptedModule(
            layer.lora_A["default"].weight.detach(),
            layer.lora_B["default"].weight.detach(),
            _row_scales(layer) if layer.use_dora.get("default") else None,
        )
        for name, layer in lora_layers(policy)
    }


def beside_adapter(
    policy: Policy, dtype: torch.dtype, stacked: Mapping[str, list[str]] | None, first: bool
) -> Iterator[NamedWeight]:
    """Yields what an engine with the adapter holds otherwise than it loaded: (name, weight), often nothing.

    Modules that train as a whole (`modules_to_save`), and before the `first` rollout the base where making
    the adapter has changed it (PiSSA). Arguments as of `merged_weights`.
    """
    from peft.tuners.lora import LoraLayer

    touched = dict(_adapted(policy))
    config: Any = policy.model.peft_config["default"]  # pyright: ignore
    base_too = first and config.init_lora_weights not in PLAIN_INITS
    names = [name for name, module in touched.items() if base_too or not isinstance(module, LoraLayer)]
    for name, module in _modules(policy, touched, names, stacked):
        source = module.get_base_layer() if isinstance(module, LoraLayer) else module
        for leaf, value in _as_trained(source, whole=True):
            yield f"{name}.{leaf}", value.to(dtype)


def merged_weights(
    policy: Policy, dtype: torch.dtype, stacked: Mapping[str, list[str]] | None
) -> Iterator[NamedWeight]:
    """Yields (name, weight) of every module that training changes: W + s B A in fp32, rounded once.

    Args:
        policy: an adapter on an unquantised base.
        dtype: the engine's.
        stacked: the engine's module -> its parts, e.g. {qkv_proj: [q_proj, k_proj, v_proj]}, where these have
            to come together, biases included: left out, the others would stay as they happen to lie in memory
            (NaN without an error on some engines). None where each weight may come alone.
    """
    touched = dict(_adapted(policy))
    if stacked is None:
        plain = {name: module for name, module in touched.items() if _is_plain(module)}
        yield from _merged_together(plain, dtype)
        touched = {name: module for name, module in touched.items() if name not in plain}
    for name, module in _modules(policy, touched, touched, stacked):
        for leaf, value in _as_trained(module, whole=stacked is not None):
            yield f"{name}.{leaf}", value.to(dtype)


def _modules(
    policy: Policy,
    touched: Mapping[str, nn.Module],
    names: Iterable[str],
    stacked: Mapping[str, list[str]] | None,
) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules `names`, and with `stacked` the other parts of their stacks."""
    for name in names if stacked is None else _with_siblings(names, stacked):
        try:
            yield name, touched[name] if name in touched else policy.causal.get_submodule(name)
        except AttributeError:  # an architecture without this part
            continue


def _is_plain(module: Any) -> bool:
    """Returns whether W + s B A is all that a module stands for."""
    from peft.tuners.lora import LoraLayer

    turned = getattr(module, "fan_in_fan_out", False)
    return isinstance(module, LoraLayer) and not turned and not module.use_dora.get("default")


def _merged_together(layers: Mapping[str, Any], dtype: torch.dtype) -> Iterator[NamedWeight]:
    """Yields the weights of plain layers, those of one shape as one product: launches cost more than FLOP."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, layer in layers.items():
        weight, rank = layer.get_base_layer().weight, layer.r["default"]
        alike.setdefault((weight.shape, weight.dtype, rank, layer.scaling["default"]), []).append(name)
    for (shape, *_, scaling), names in alike.items():
        count = max(1, MERGED_AT_ONCE // (4 * shape.numel()))
        for own in (names[i : i + count] for i in range(0, len(names), count)):
            merged, b, a = (
                torch.stack([pick(layers[name]).detach() for name in own]).float()
                for pick in (
                    lambda m: m.get_base_layer().weight,
                    lambda m: m.lora_B["default"].weight,
                    lambda m: m.lora_A["default"].weight,
                )
            )
            weights = merged.baddbmm_(b, a, alpha=scaling).to(dtype)
            yield from zip((f"{name}.weight" for name in own), weights.unbind(), strict=True)


def _with_siblings(names: Iterable[str], stacked: Mapping[str, list[str]]) -> list[str]:
    """Returns `names` and the other parts of the stacks they belong to, each once, stacks together."""
    found: dict[str, None] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        parts = next((parts for parts in stacked.values() if leaf in parts), [leaf])
        found.update(dict.fromkeys(f"{parent}.{part}" if parent else part for part in parts))
    return list(found)


def _as_trained(module: nn.Module, whole: bool) -> Iterator[NamedWeight]:
    """Yields the module's parameters by name as the policy computes with them; fp32 where merged."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(module, LoraLayer):
        base: Any = module.get_base_layer()
        yield "weight", merged_weight(module)
        if whole and base.bias is not None:  # it never trains: see `check_lora`
            yield "bias", base.bias.detach()
        return
    source = module.modules_to_save["default"] if isinstance(module, ModulesToSaveWrapper) else module
    for leaf, p in source.named_parameters():
        yield leaf, p.detach()


def _plain_merge(layer: Any) -> Tensor:
    base = layer.get_base_layer().weight
    a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
    product = (a.T, b.T) if layer.fan_in_fan_out else (b, a)
    return base.to(torch.float32, copy=True).addmm_(*product, alpha=layer.scaling["default"])


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """Returns the fp32 weight [O, K] that an adapted linear layer stands for; DoRA's is rescaled by row."""
    weight = _plain_merge(layer)
    if not layer.use_dora.get("default"):
        return weight
    outputs = weight.T if layer.fan_in_fan_out else weight
    outputs = outputs * _row_scales(layer, outputs)[:, None]
    return outputs.T if layer.fan_in_fan_out else outputs


@torch.no_grad()
def _row_scales(layer: Any, outputs: Tensor | None = None) -> Tensor:
    """Returns DoRA's magnitudes over the norms of the merged rows, [O] fp32."""
    if outputs is None:
        weight = _plain_merge(layer)
        outputs = weight.T if layer.fan_in_fan_out else weight
    return layer.lora_magnitude_vector["default"].weight.float() / outputs.norm(dim=1)


def all_weights(policy: Policy, dtype: torch.dtype) -> Iterator[NamedWeight]:
    """Yields every weight once, in the engine's type, without a second copy of the model."""
    for name, p in policy.causal.named_parameters():  # a tied head comes as its embedding
        yield name, p.detach().to(dtype)
