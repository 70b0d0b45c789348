"""Which way the weights of a policy can reach an engine: its adapter, the adapter merged, or all weights."""

import re
from collections.abc import Mapping
from typing import Any, cast

from grpo_lightning.engines.base import SyncKind
from grpo_lightning.engines.weight_sync import PLAIN_INITS, lora_layers
from grpo_lightning.errors import ConfigError, choices
from grpo_lightning.policy.policy import Policy

KINDS = ("auto", "adapter", "merge", "full")
SENT = re.compile(r"\.(lora_[AB]|lora_magnitude_vector)\.default\.weight$|\.modules_to_save\.default\.")
"""names of what trains beside a frozen base and reaches an engine"""


def choose_kind(policy: Policy, asked: str) -> SyncKind:
    """Returns how weights reach the engine: `adapter`, `merge` or `full`.

    `auto` sends the adapter of a policy that has one: a merge rounds small updates away.

    Raises:
        ConfigError: the policy cannot be sent that way; names why, and the way that works.
    """
    if asked not in KINDS:
        raise ConfigError(f"rollout.engine.sync is {choices(asked, KINDS)}")
    kind = ("adapter" if policy.is_lora else "full") if asked == "auto" else asked
    all_train = None if policy.is_lora else "model.lora is null: all weights train"
    reasons: Mapping[str, str | None] = {
        "adapter": all_train or why_not_sent(policy),
        "merge": all_train
        or ("the base is in 4 bit, and a merge would round it again" if is_quantized(policy) else None)
        or why_not_sent(policy),
        "full": "only an adapter trains, the base never changes" if policy.is_lora else None,
    }
    if reasons[kind] is None:
        return cast(SyncKind, kind)
    way_out = [k for k, reason in reasons.items() if reason is None]
    remedy = f"take {way_out[0]}" if way_out else "change model.lora, or use grpo_lightning.engines.HFEngine"
    raise ConfigError(f"rollout.engine.sync {kind!r} does not work here: {reasons[kind]}; {remedy}")


def is_quantized(policy: Policy) -> bool:
    """Returns whether the base is kept in fewer bits than it computes in."""
    return getattr(policy.causal.config, "quantization_config", None) is not None


def why_not_sent(policy: Policy) -> str | None:
    """Returns what of this adapter no engine is sent, or None."""
    from peft.tuners.lora import LoraLayer

    config: Any = policy.model.peft_config["default"]  # pyright: ignore
    for name in ("target_parameters", "layer_replication"):
        if getattr(config, name, None):
            return f"no engine is sent model.lora.{name} ({getattr(config, name)!r})"
    if is_quantized(policy) and (config.use_dora or config.init_lora_weights not in PLAIN_INITS):
        key = "use_dora" if config.use_dora else "init_lora_weights"
        return f"model.lora.{key} ({getattr(config, key)!r}) needs an unquantised base"
    if _unties(policy):
        return (
            "embedding and head are one tensor in the checkpoint and in the engine, and one of them trains: "
            f"model.lora.modules_to_save is {config.modules_to_save!r}"
        )
    for name, layer in lora_layers(policy):
        variant = layer.lora_variant.get("default")
        if variant is not None and not layer.use_dora["default"]:
            return f"{name} computes {type(variant).__name__}"
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


def _unties(policy: Policy) -> bool:
    """Returns whether a head that is its model's embedding has got weights of its own."""
    ends = policy.causal.get_input_embeddings(), policy.causal.get_output_embeddings()
    tied = getattr(policy.causal.config.get_text_config(), "tie_word_embeddings", False)
    return tied and len({m.weight.data_ptr() for m in ends}) > 1
