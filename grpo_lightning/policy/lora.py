"""peft's LoraConfig: made from a mapping, checked, compared. Imports peft only where one is made."""

import json
import re
from collections.abc import Mapping
from importlib.util import find_spec
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lightning.pytorch.utilities import rank_zero_warn

from grpo_lightning.errors import ConfigError, choices
from grpo_lightning.utils.ranges import check_numbers

LARGEST_RANK = 65536
"""wider than any layer there is"""

BOOKKEEPING = frozenset(
    {
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "lora_dropout",  # of the training forward alone
        "runtime_config",
        "megatron_config",
        "megatron_core",
    }
)
"""fields of a LoraConfig that do not change which policy an adapter's weights are; all others do"""


def lora_config(lora: Any) -> Any:
    """Returns a LoraConfig; checks the names in a mapping, since peft's own message lists none."""
    if lora is None:
        return None
    if not isinstance(lora, Mapping):
        return _checked(lora)
    from dataclasses import fields

    from peft import LoraConfig

    allowed = [f.name for f in fields(LoraConfig)]
    for key in lora:
        if key not in allowed:
            raise ConfigError(f"model.lora has the key {choices(key, allowed)}")
    check_numbers("model.lora", lora)  # before peft takes them
    _check_values(lora, get_type_hints(LoraConfig))
    return _checked(LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **lora}))


def _checked(config: Any) -> Any:
    bounds = [
        ("r", config.r >= 1, "at least 1"),
        ("lora_alpha", config.lora_alpha > 0, "> 0: it scales the adapter by lora_alpha / r"),
        ("lora_dropout", 0 <= config.lora_dropout < 1, "in [0, 1)"),
    ]
    check_numbers("model.lora", vars(config), bounds)
    return config


def _check_values(lora: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Raises ConfigError for values that peft finds out about when the weights are loaded, or never."""
    for key, value in lora.items():
        if not _fits(value, hints[key]) and not str(value).startswith("pissa_niter_"):
            hint = str(hints[key]).replace("typing.", "")
            expected = hints[key].__name__ if isinstance(hints[key], type) else hint
            raise ConfigError(f"model.lora.{key} is {value!r:.100}; it must be {expected}")
    for key, ranks in (
        ("r", [lora.get("r", 8)]),
        ("rank_pattern", (lora.get("rank_pattern") or {}).values()),
    ):
        if not all(isinstance(rank, int) and 1 <= rank <= LARGEST_RANK for rank in ranks):
            raise ConfigError(
                f"model.lora.{key} is {lora[key]!r:.100}; a rank is a whole number in 1..{LARGEST_RANK}"
            )
    if not 0 <= lora.get("lora_dropout", 0) < 1:
        raise ConfigError(f"model.lora.lora_dropout is {lora['lora_dropout']}; it must be in [0, 1)")
    for key in ("target_modules", "exclude_modules"):
        if lora.get(key) == [] or (isinstance(lora.get(key), str) and not _is_pattern(lora[key])):
            raise ConfigError(
                f"model.lora.{key} is {lora[key]!r:.100}; it must be all-linear, a regular expression, or a "
                "list of names such as [q_proj, v_proj]"
            )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; numbers and rows are of one kind, classes pass."""
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if kind is Literal:
        return value in get_args(hint)
    if kind is list:
        inner = (*get_args(hint), Any)[0]
        return isinstance(value, list | tuple | set) and all(_fits(item, inner) for item in value)
    if kind in (int, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return not isinstance(kind, type) or kind not in (str, bool, dict, type(None)) or isinstance(value, kind)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


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
    """Returns what must not change between a checkpoint and the run that resumes it.

    As plain types, and without what is at its default: a field that a later peft adds changes nothing.
    """
    if lora is None:
        return None
    from peft import LoraConfig

    usual = LoraConfig().to_dict()
    values = {k: v for k, v in lora.to_dict().items() if k not in BOOKKEEPING and v != usual.get(k)}
    return {k: _plain(v) for k, v in values.items()}


def _plain(value: Any) -> Any:
    names = isinstance(value, list) and all(isinstance(x, str) for x in value)
    return json.loads(json.dumps(sorted(value) if names else value, default=sorted))
