"""Rotary embeddings whose frequencies depend on the longest row of a call: `longrope` and `dynamic`.

transformers takes their factors anew in each call, so that a completion's log-probabilities depend on the
rows beside it. Up to the length that the model was first trained for there is one set of factors. A run with
longer sequences takes those of its longest one for all, as vLLM does (`max_model_len` decides there).
"""

from typing import Any

import torch
from torch import nn

from grpo_lightning.errors import ConfigError

_FIXED = "fixed"


def rope_limit(config: Any) -> int | None:
    """Returns up to how many tokens the factors are the same for all, or None where they always are."""
    text = config.get_text_config()
    given = getattr(text, "rope_parameters", None) or {}
    sets = [given] if "rope_type" in given else [v for v in given.values() if isinstance(v, dict)]
    limits = []
    for rope in sets:
        if rope.get("rope_type") == "longrope":
            limits.append(rope.get("original_max_position_embeddings", text.max_position_embeddings))
        elif "dynamic" in rope.get("rope_type", ""):
            limits.append(text.max_position_embeddings)
    return min(limits, default=None)


def fix_rope(model: nn.Module, longest: int) -> None:
    """Takes the factors of a sequence of `longest` tokens for all from now on.

    Raises:
        ConfigError: the factors are `dynamic`, which engines take in different ways, or are not where
            transformers keeps them.
    """
    found: dict[Any, Any] = {m: m.rope_type for m in model.modules() if hasattr(m, "rope_type")}
    kinds = {kind for own in found.values() for kind in (own.values() if isinstance(own, dict) else [own])}
    if "longrope" not in kinds or any("dynamic" in kind for kind in kinds):
        raise ConfigError(too_long(model, longest) + ", or another model")
    for module, own in found.items():
        at: Any = next(module.buffers())
        position = torch.tensor([[longest - 1]], device=at.device)
        for layer in own if isinstance(own, dict) else [None]:
            with torch.no_grad():
                module(at.new_zeros(1), position, **({} if layer is None else {"layer_type": layer}))
        setattr(module, "rope_type", dict.fromkeys(own, _FIXED) if isinstance(own, dict) else _FIXED)  # noqa: B010


def too_long(model: Any, longest: int) -> str:
    """Returns what is wrong with a sequence of `longest` tokens and what to do."""
    return (
        f"a prompt and its completion make {longest} tokens, but beyond {rope_limit(model.config)} the "
        f"rotary embeddings of {type(model).__name__} depend on the longest row of a batch: lower "
        "rollout.sampling.max_tokens or data.max_prompt_tokens"
    )
