"""What an architecture does to its logits after the LM head, read from its config."""

import re
from typing import Any

CAP = re.compile(r"(final_|output_)?logits?_soft_?cap(ping)?")
SCALE = re.compile(r"logits?_.*(scale|scaling|multiplier)|lm_head_multiplier")
DIVIDES = ("logits_scaling", "logits_mup_width_multiplier")
"""scales that most architectures divide by"""


def logit_changes(config: Any) -> list[dict[str, Any]]:
    """Returns arguments of `fused_linear_logprobs` that may be the architecture's; likeliest first.

    A config names a scale but not whether logits are multiplied or divided by it: Granite divides by
    `logits_scaling`, HyperCLOVA X multiplies. What is right is what gives the model's own logits.
    """
    text = config.get_text_config()
    values = {name: getattr(text, name) for name in dir(type(text)) if _acts(name)} | {
        name: value for name, value in vars(text).items() if _acts(name)
    }
    numbers = {n: float(v) for n, v in values.items() if isinstance(v, int | float) and v not in (0, True)}
    caps = [{"softcap": v} for n, v in numbers.items() if CAP.fullmatch(n)]
    scales = [
        {"logit_scale": s}
        for n, v in numbers.items()
        if SCALE.fullmatch(n)
        for s in ((1 / v, v) if n in DIVIDES else (v, 1 / v))
    ]
    return [scale | cap for cap in (*caps, {}) for scale in (*scales, {})]


def _acts(name: str) -> bool:
    return bool(CAP.fullmatch(name) or SCALE.fullmatch(name))
