"""`LossConfig`: a recipe's name and what is changed about it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from grpo_lightning.errors import ConfigError, choices
from grpo_lightning.importing import import_object
from grpo_lightning.losses.aggregations import AGGREGATIONS
from grpo_lightning.losses.kl import KL_ESTIMATORS
from grpo_lightning.losses.ratios import RATIO_LEVELS
from grpo_lightning.losses.recipes import RECIPES, Recipe
from grpo_lightning.losses.surrogates import SURROGATES, register_surrogate

COMMON_DEFAULTS: Mapping[str, float] = {"clip_low": 0.2, "clip_high": 0.2}


@dataclass(frozen=True)
class LossConfig:
    """Which loss is minimised; what is left at null is the recipe's.

    Args:
        name: a recipe (grpo, bnpo, dr_grpo, dapo) or your own surrogate as `pkg.mod.func` or `file.py:func`.
        surrogate: per-token objective.
        ratio_level: token, sequence or sequence_token.
        aggregation: how tokens are weighed: sequence_mean, token_mean, constant, sequence_sum, prompt_mean.
        clip_low: the ratio is clipped below at 1 - clip_low.
        clip_high: the ratio is clipped above at 1 + clip_high.
        dual_clip: cap on the ratio where the advantage is negative; must exceed 1 + clip_high.
        kl_coef: weight of the KL divergence from the reference policy; 0 computes no reference.
        kl_estimator: per-token estimator of that divergence.
        kl_bias_correction: multiply it by the ratio, which makes its gradient unbiased (2512.02556).
        entropy_coef: weight of the entropy bonus.
        params: free parameters of your own surrogate, found as `config.params`.
    """

    name: str = "dapo"
    surrogate: str | None = None
    ratio_level: str | None = None
    aggregation: str | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_bias_correction: bool = True
    entropy_coef: float = 0.0
    params: dict[str, float] = field(default_factory=dict[str, float])

    def __post_init__(self) -> None:
        resolved = self.resolve()
        if resolved is self:
            self._check()

    def resolve(self) -> "LossConfig":
        """Returns the config with every null that the recipe fills filled; itself if there is none.

        Raises:
            ConfigError: `name` is not a recipe, or a value cannot work.
        """
        recipe = self.recipe
        parts = {name: getattr(recipe, name) for name in ("surrogate", "ratio_level", "aggregation")}
        defaults = {**COMMON_DEFAULTS, **recipe.defaults, **parts}
        missing = {key: value for key, value in defaults.items() if getattr(self, key) is None}
        return replace(self, **missing) if missing else self

    @property
    def recipe(self) -> Recipe:
        """The row of `RECIPES`; made from the imported function where `name` is a user's own surrogate."""
        if self.name not in RECIPES:
            if "." not in self.name:
                raise ConfigError(f"model.loss.name is {choices(self.name, RECIPES)}")
            if self.name not in SURROGATES:
                function: Callable[..., object] = import_object(self.name, "model.loss.name")
                register_surrogate(self.name)(function)  # pyright: ignore[reportArgumentType]  # checked by name
            return Recipe(surrogate=self.name, aggregation="token_mean", note="a user's own surrogate")
        return RECIPES[self.name]

    @property
    def dead_groups_are_still(self) -> bool:
        """Whether a group whose advantages are all 0 has a gradient of exactly 0."""
        return self.kl_coef == 0 and self.entropy_coef == 0

    def _check(self) -> None:
        tables = {
            "surrogate": SURROGATES,
            "ratio_level": RATIO_LEVELS,
            "aggregation": AGGREGATIONS,
            "kl_estimator": KL_ESTIMATORS,
        }
        for key, table in tables.items():
            if (value := getattr(self, key)) not in table:
                raise ConfigError(f"model.loss.{key} is {choices(value, table)}")
        assert self.clip_low is not None
        assert self.clip_high is not None
        bounds: tuple[tuple[str, bool, str], ...] = (
            ("clip_low", 0 <= self.clip_low < 1, "in [0, 1)"),
            ("clip_high", self.clip_high >= 0, ">= 0"),
            (
                "dual_clip",
                self.dual_clip is None or self.dual_clip > 1 + self.clip_high,
                f"null or above 1 + clip_high = {1 + self.clip_high:g}, or it would also cut positive "
                f"advantages",
            ),
            ("kl_coef", self.kl_coef >= 0, ">= 0"),
        )
        for key, holds, allowed in bounds:
            if not holds:
                raise ConfigError(f"model.loss.{key} is {getattr(self, key)}; it must be {allowed}")
        if self.ratio_level not in (levels := SURROGATES[str(self.surrogate)].levels):
            raise ConfigError(
                f"model.loss.ratio_level is {choices(self.ratio_level, levels)} for {self.surrogate!r}"
            )
