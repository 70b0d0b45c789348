"""peft's LoraConfig: made from a mapping, checked, compared. Imports peft only where one is made."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from grpo_lightning.errors import ConfigError, choices

IDENTITY = (
    "r",
    "lora_alpha",
    "target_modules",
    "modules_to_save",
    "init_lora_weights",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
)
"""fields of a LoraConfig that decide which policy an adapter's weights are"""


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
    if str(lora.init_lora_weights).startswith("pissa_niter"):
        raise ConfigError(
            f"model.lora.init_lora_weights is {lora.init_lora_weights!r}, which draws the base's residual at "
            "random: no checkpoint could be resumed; take 'pissa'"
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
    if quantization != "nf4":
        raise ConfigError(f"model.quantization is {quantization!r}; it must be null or nf4")
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
    values = {name: getattr(lora, name, None) for name in IDENTITY}
    return {k: sorted(v) if isinstance(v, set | list) else v for k, v in values.items()}
