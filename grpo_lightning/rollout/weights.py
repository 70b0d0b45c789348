"""What an engine gets of the policy's weights: the adapter alone, the adapter merged into its base, or all.

Nothing here changes the policy: a merge is computed beside the frozen base, and no rounding drifts into
it.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grpo_lightning.errors import ConfigError, choices
from grpo_lightning.policy import Policy

Named = tuple[str, Tensor]
"""a weight and its name in the checkpoint"""

KINDS = ("auto", "adapter", "merge", "full")
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""values of `init_lora_weights` that leave the base as it was loaded"""
MERGED_AT_ONCE = 256 << 20
"""bytes of fp32 weights that are merged in one product"""
SENT = re.compile(r"\.(lora_[AB]|lora_magnitude_vector)\.default\.weight$|\.modules_to_save\.default\.")
"""names of what trains beside a frozen base and reaches an engine"""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter: peft's tensors without the adapter's name, and its config."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]


def choose_kind(policy: Policy, asked: str) -> str:
    """Returns how weights reach the engine: `adapter`, `merge` or `full`.

    `auto` merges into an unquantised base, where decoding then runs at full speed, and sends the adapter to
    one in 4 bit, which has no exact merge.

    Raises:
        ConfigError: the policy cannot be sent that way; names why, and the way that works.
    """
    if asked not in KINDS:
        raise ConfigError(f"rollout.engine.sync is {choices(asked, KINDS)}")
    quantized = is_quantized(policy)
    default = "full" if not policy.is_lora else "adapter" if quantized else "merge"
    kind = default if asked == "auto" else asked
    reasons: Mapping[str, str | None] = {
        "adapter": "model.lora is null: all weights train" if not policy.is_lora else why_no_adapter(policy),
        "merge": (
            "model.lora is null: all weights train"
            if not policy.is_lora
            else "the base is in 4 bit, and a merge would round it again"
            if quantized
            else why_no_merge(policy)
        ),
        "full": "only an adapter trains, the base never changes" if policy.is_lora else None,
    }
    if reasons[kind] is None:
        return kind
    way_out = [k for k, reason in reasons.items() if reason is None]
    remedy = f"take {way_out[0]}" if way_out else "change model.lora, or use grpo_lightning.rollout.HFEngine"
    raise ConfigError(f"rollout.engine.sync {kind!r} does not work here: {reasons[kind]}; {remedy}")


def is_quantized(policy: Policy) -> bool:
    """Returns whether the base is kept in fewer bits than it computes in."""
    return getattr(policy.causal.config, "quantization_config", None) is not None


def why_no_adapter(policy: Policy) -> str | None:
    """Returns what vLLM's LoRA slots cannot hold of this adapter, or None."""
    config: Any = policy.model.peft_config["default"]  # pyright: ignore
    cases = {
        "use_dora": config.use_dora,
        "modules_to_save": bool(config.modules_to_save),
        "rank_pattern": bool(config.rank_pattern),
        "alpha_pattern": bool(config.alpha_pattern),
        "layer_replication": bool(config.layer_replication),
        "target_parameters": bool(getattr(config, "target_parameters", None)),
        "init_lora_weights": config.init_lora_weights not in PLAIN_INITS,
    }
    found = next((name for name, holds in cases.items() if holds), None)
    if found is not None:
        return f"vLLM's adapters have no model.lora.{found} ({getattr(config, found)!r})"
    return _not_sent(policy)


def why_no_merge(policy: Policy) -> str | None:
    """Returns what of this adapter `merged_weights` does not compute, or None."""
    config: Any = policy.model.peft_config["default"]  # pyright: ignore
    if getattr(config, "target_parameters", None):
        return f"it covers no model.lora.target_parameters ({config.target_parameters!r})"
    for name, layer in lora_layers(policy):
        variant = layer.lora_variant.get("default")
        if variant is not None and not layer.use_dora["default"]:
            return f"{name} computes {type(variant).__name__}"
    return _not_sent(policy)


def _not_sent(policy: Policy) -> str | None:
    from peft.tuners.lora import LoraLayer

    for name, module in policy.causal.named_modules():
        if isinstance(module, LoraLayer) and not module.lora_A:
            return f"{name} is a {type(module).__name__}; only linear layers are sent"
    return next(
        (
            f"{n} trains, which is not sent"
            for n, p in policy.causal.named_parameters()
            if p.requires_grad and not SENT.search(n)
        ),
        None,
    )


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


def adapter_of(policy: Policy) -> Adapter:
    """Returns the adapter by the names peft saves it under; the tensors are the policy's own.

    Only of policies that `why_no_adapter` finds nothing against.
    """
    tensors = {
        f"base_model.model.{name}.{part}.weight": getattr(layer, part)["default"].weight
        for name, layer in lora_layers(policy)
        for part in ("lora_A", "lora_B")
    }
    config = policy.model.peft_config["default"].to_dict()  # pyright: ignore
    targets = config["target_modules"]
    return Adapter(tensors, {**config, "target_modules": targets if isinstance(targets, str) else [*targets]})


def merged_weights(
    policy: Policy, dtype: torch.dtype, fused: Mapping[str, list[str]] | None
) -> Iterator[Named]:
    """Yields (name, weight) of every module that training changes: W + s B A in fp32, rounded once.

    Args:
        policy: an adapter on an unquantised base.
        dtype: the engine's.
        fused: the engine's module -> its parts, e.g. {qkv_proj: [q_proj, k_proj, v_proj]}, where these have
            to come together, biases included: left out, the others would stay as they happen to lie in memory
            (NaN without an error on some engines). None where each weight may come alone.
    """
    touched = dict(_adapted(policy))
    if fused is None:
        plain = {name: module for name, module in touched.items() if _is_plain(module)}
        yield from _merged_together(plain, dtype)
        touched = {name: module for name, module in touched.items() if name not in plain}
    for name in touched if fused is None else _with_siblings(touched, fused):
        try:
            module = touched[name] if name in touched else policy.causal.get_submodule(name)
        except AttributeError:  # an architecture without this part
            continue
        for leaf, value in _as_trained(module, whole=fused is not None):
            yield f"{name}.{leaf}", value.to(dtype)


def _is_plain(module: Any) -> bool:
    """Returns whether W + s B A is all that a module stands for."""
    from peft.tuners.lora import LoraLayer

    turned = getattr(module, "fan_in_fan_out", False)
    return isinstance(module, LoraLayer) and not turned and not module.use_dora.get("default")


def _merged_together(layers: Mapping[str, Any], dtype: torch.dtype) -> Iterator[Named]:
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


def _with_siblings(names: Iterable[str], fused: Mapping[str, list[str]]) -> list[str]:
    """Returns `names` and the other parts of the stacks they belong to, each once, stacks together."""
    found: dict[str, None] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        parts = next((parts for parts in fused.values() if leaf in parts), [leaf])
        found.update(dict.fromkeys(f"{parent}.{part}" if parent else part for part in parts))
    return list(found)


def _as_trained(module: nn.Module, whole: bool) -> Iterator[Named]:
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


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """Returns the fp32 weight [O, K] that an adapted linear layer stands for; DoRA's is rescaled by row."""
    base = layer.get_base_layer().weight
    a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
    product = (a.T, b.T) if layer.fan_in_fan_out else (b, a)
    weight = base.to(torch.float32, copy=True).addmm_(*product, alpha=layer.scaling["default"])
    if not layer.use_dora.get("default"):
        return weight
    magnitude = layer.lora_magnitude_vector["default"].weight.float()  # per output
    outputs = weight.T if layer.fan_in_fan_out else weight
    outputs = outputs * (magnitude / outputs.norm(dim=1))[:, None]
    return outputs.T if layer.fan_in_fan_out else outputs


def all_weights(policy: Policy, dtype: torch.dtype) -> Iterator[Named]:
    """Yields every weight once, in the engine's type, without a second copy of the model."""
    for name, p in policy.causal.named_parameters():  # a tied head comes as its embedding
        yield name, p.detach().to(dtype)
