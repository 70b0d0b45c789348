"""peft's LoraConfig: made from a mapping, checked, compared. Imports peft only where one is made."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from grpo_lightning.errors import ConfigError, choices


def lora_config(lora: Any) -> Any:
    """Returns a LoraConfig; checks the names in a mapping, since peft's own message lists none."""
    if lora is None or not isinstance(lora, Mapping):
        return lora
    from dataclasses import fields

    from peft import LoraConfig

    allowed = [f.name for f in fields(LoraConfig)]
    for key in lora:
        if key not in allowed:
            raise ConfigError(f"model.lora has the key {choices(key, allowed)}")
    return LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **lora})


def check_lora(lora: Any) -> None:
    """Refuses what no engine serves, and says what costs exactness."""
    if lora.bias != "none":
        raise ConfigError(
            f"model.lora.bias is {lora.bias!r}; it must be 'none': no engine serves trained biases"
        )
    if lora.lora_dropout:
        rank_zero_warn(
            f"model.lora.lora_dropout is {lora.lora_dropout}: the ratio is not 1 on the first pass, and the "
            "gradient depends on how a rollout is split; 0 avoids both"
        )


def check_quantization(quantization: str | None, lora: Any) -> None:
    """Raises ConfigError if a quantised base cannot be loaded or trained."""
    if quantization is None:
        return
    if lora is None:
        raise ConfigError(
            f"model.quantization is {quantization!r} but model.lora is null: rounded weights do not train; "
            "set model.lora, e.g. {r: 16, lora_alpha: 32}"
        )
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.quantization is {quantization!r} but bitsandbytes is not installed: "
            "pip install 'grpo-lightning[qlora]'"
        )


def starts_as_base(lora: Any) -> bool:
    """Whether switching the adapter off gives the policy that training starts from."""
    return lora is not None and lora.init_lora_weights in (True, "gaussian")


def lora_identity(lora: Any) -> dict[str, Any] | None:
    """Returns what must not change between a checkpoint and the run that resumes it."""
    if lora is None:
        return None
    modules = lora.target_modules
    plain = sorted(modules) if isinstance(modules, set | list) else modules
    return {"r": lora.r, "lora_alpha": lora.lora_alpha, "target_modules": plain}
