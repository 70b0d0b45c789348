"""Recipes: the names papers gave to a surrogate, a ratio level, an aggregation and an advantage together."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A row of `RECIPES`; every part can be overridden in `LossConfig`."""

    surrogate: str
    ratio_level: str = "token"
    aggregation: str
    advantage: str = "group_norm"
    defaults: Mapping[str, float] = field(default_factory=dict[str, float])
    paper: str = ""
    note: str = ""


RECIPES: dict[str, Recipe] = {
    "grpo": Recipe(
        surrogate="ppo_clip",
        aggregation="sequence_mean",
        paper="2402.03300",
        note="the original: every completion weighs the same, so tokens of long completions weigh less",
    ),
    "bnpo": Recipe(
        surrogate="ppo_clip",
        aggregation="microbatch_token_mean",
        note="mean over the tokens of the local micro-batch, as TRL defines it; depends on the packing",
    ),
    "dr_grpo": Recipe(
        surrogate="ppo_clip",
        aggregation="constant",
        advantage="group_mean",
        paper="2503.20783",
        note="no length bias and no division by the group's spread",
    ),
    "dapo": Recipe(
        surrogate="ppo_clip",
        aggregation="token_mean",
        defaults={"clip_high": 0.28},
        paper="2503.14476",
        note="every token weighs the same; more room upwards than downwards",
    ),
}
