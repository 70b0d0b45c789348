"""`LossConfig`: a recipe's name and what is changed about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from grpo_lightning.errors import ConfigError, choices, hinted
from grpo_lightning.losses.adaptive import AdaptiveEntropy, AdaptiveKL
from grpo_lightning.losses.aggregations import AGGREGATIONS
from grpo_lightning.losses.corrections import LEVELS, CorrectionConfig
from grpo_lightning.losses.kl import KL_ESTIMATORS
from grpo_lightning.losses.ratios import RATIO_LEVELS
from grpo_lightning.losses.recipes import RECIPES, Recipe
from grpo_lightning.losses.surrogate_table import SURROGATES, Surrogate, find_surrogate
from grpo_lightning.losses.surrogates.clipped import CispoOptions, DroOptions, SapoOptions
from grpo_lightning.losses.surrogates.completions import FipoOptions, GmpoOptions, RealOptions, VespoOptions
from grpo_lightning.losses.surrogates.covariance import CovarianceOptions
from grpo_lightning.losses.surrogates.divergence import DppoOptions
from grpo_lightning.losses.surrogates.options import SurrogateOptions
from grpo_lightning.utils.ranges import Bound, check_numbers, not_negative

COMMON_DEFAULTS: Mapping[str, float | str] = {
    "clip_low": 0.2,
    "clip_high": 0.2,
    "kl_estimator": "k3",
    "kl_in": "loss",
}


@hinted
@dataclass(frozen=True)
class LossConfig(
    FipoOptions,
    CispoOptions,
    SapoOptions,
    VespoOptions,
    GmpoOptions,
    DppoOptions,
    CovarianceOptions,
    DroOptions,
    RealOptions,
):
    """Which loss is minimised; what is left at null is the recipe's. Surrogates' own options are inherited.

    Args:
        name: a recipe (see `RECIPES`) or your own surrogate as `pkg.mod.func` or `file.py:func`.
        surrogate: per-token objective.
        ratio_level: token, sequence or sequence_token.
        aggregation: how tokens are weighed: sequence_mean, token_mean, constant, sequence_sum, prompt_mean.
        kl_coef: weight of the KL divergence from the reference policy; 0 computes no reference.
        kl_in: loss, or reward: each completion's reward loses kl_coef times the sum of k1 over its tokens.
        kl_estimator: k1, k2, k3, k1_straight or k3_straight.
        kl_bias_correction: multiply k1 or k3 by the ratio, which makes its gradient unbiased (2512.02556).
        adaptive_kl: lets kl_coef follow the KL divergence; null keeps it.
        entropy_coef: weight of the entropy bonus.
        adaptive_entropy: lets that weight follow the entropy; null keeps it.
        top_entropy_quantile: share of tokens, those of highest entropy, that train (2506.01939); 1 is all.
            Those within 1e-4 nats of the edge train too: rounding decides nothing.
        off_policy_threshold: completions with A < 0 whose policy has moved further, in nats per token, are
            left out; null is off.
        correction: importance weights between the engine's policy and the trainer's.
        params: options of your own surrogate: the fields of the dataclass that it annotates `options` with.
    """

    name: str = "dapo"
    surrogate: str | None = None
    ratio_level: str | None = None
    aggregation: str | None = None
    kl_coef: float = 0.0
    kl_in: str | None = None
    kl_estimator: str | None = None
    kl_bias_correction: bool = True
    adaptive_kl: AdaptiveKL | None = None
    entropy_coef: float = 0.0
    adaptive_entropy: AdaptiveEntropy | None = None
    top_entropy_quantile: float = 1.0
    off_policy_threshold: float | None = None
    correction: CorrectionConfig = CorrectionConfig()  # noqa: RUF009 - frozen
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
        key = "model.loss.surrogate" if self.surrogate else "model.loss.name"
        surrogate = find_surrogate(self.surrogate or recipe.surrogate, key)
        defaults = {**COMMON_DEFAULTS, **recipe.defaults, **parts}
        if surrogate is not None:
            strange = [k for k in (*surrogate.defaults, *surrogate.required) if not hasattr(self, k)]
            if strange:
                raise ConfigError(
                    f"surrogate {self.surrogate or self.name!r} is registered with a default or requirement "
                    f"for {strange[0]!r}, which is no key of model.loss; give the field of its options a "
                    "default instead"
                )
            defaults = {**surrogate.defaults, **defaults}
        missing = {key: value for key, value in defaults.items() if getattr(self, key) is None}
        return replace(self, **missing) if missing else self

    @property
    def recipe(self) -> Recipe:
        """The row of `RECIPES`; one with the mean over tokens where `name` is a user's own surrogate."""
        if self.name not in RECIPES:
            if "." not in self.name:
                raise ConfigError(f"model.loss.name is {choices(self.name, RECIPES)}")
            return Recipe(surrogate=self.name, aggregation="token_mean", note="a user's own surrogate")
        return RECIPES[self.name]

    @property
    def surrogate_row(self) -> Surrogate:
        """The row of `SURROGATES`, or the user's own."""
        row = find_surrogate(self.surrogate or self.recipe.surrogate)
        assert row is not None  # checked when the config was made
        return row

    @property
    def zero_variance_groups_have_no_gradient(self) -> bool:
        """Whether a group whose advantages are all 0 has a gradient of exactly 0, there or not."""
        alone = self.kl_loss_coef == 0 and not self.has_entropy_bonus
        return self.surrogate_row.still_at_zero and alone and self.split_invariant

    @property
    def split_invariant(self) -> bool:
        """Whether the gradient does not depend on how an optimizer step is cut into micro-batches."""
        return AGGREGATIONS[str(self.aggregation)].split_invariant

    @property
    def kl_loss_coef(self) -> float:
        """Weight of the KL term of the loss; 0 where it is in the reward."""
        return self.kl_coef if self.kl_in == "loss" else 0.0

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether the entropy may carry a gradient in some step."""
        return self.entropy_coef != 0 or self.adaptive_entropy is not None

    @property
    def needs_old_pass(self) -> bool:
        """Whether something is chosen from the old policy's numbers of the whole optimizer step."""
        return self.surrogate_row.needs_old or self.top_entropy_quantile < 1

    @property
    def needs_completion_advantages(self) -> str | None:
        """What needs one advantage for each completion, or None where each token may have its own."""
        if self.ratio_level == "sequence":
            return "ratio_level 'sequence'"
        return f"surrogate {self.surrogate!r}" if self.surrogate_row.completion_advantages else None

    def cautions(self) -> list[str]:
        """Returns what is allowed but seldom meant, a sentence each."""
        aggregation = AGGREGATIONS[str(self.aggregation)]
        by_token = aggregation.per_token
        cases = [
            (
                not self.split_invariant,
                f"model.loss.aggregation {self.aggregation!r} depends on how a rollout is split into "
                "micro-batches; token_mean does not",
            ),
            (
                self.ratio_level == "sequence" and by_token,
                f"model.loss.ratio_level 'sequence' with aggregation {self.aggregation!r} weighs long "
                "completions more; GSPO takes sequence_mean",
            ),
            (
                self.ratio_level == "sequence_token" and self.surrogate_row.meant_per_token,
                f"model.loss.ratio_level 'sequence_token' is not what {self.surrogate!r} was published with; "
                "token is",
            ),
        ]
        return [text for holds, text in cases if holds]

    def _check(self) -> None:
        if find_surrogate(str(self.surrogate)) is None:
            raise ConfigError(f"model.loss.surrogate is {choices(self.surrogate, SURROGATES)}")
        tables = {
            "ratio_level": RATIO_LEVELS,
            "aggregation": AGGREGATIONS,
            "kl_estimator": KL_ESTIMATORS,
        }
        for key, table in tables.items():
            if (value := getattr(self, key)) not in table:
                raise ConfigError(f"model.loss.{key} is {choices(value, table)}")
        check_numbers("model.loss", self, self.bounds(), may_be_infinite=INFINITE)
        row = self.surrogate_row
        if row.options is not None:
            row.options_of(self)
        reads = "config" in row.wants or (row.options is not None and not isinstance(self, row.options))
        if self.params and not reads:
            raise ConfigError(
                f"model.loss.params is {self.params!r}, but surrogate {self.surrogate!r} reads none; remove "
                "it, or name a surrogate of your own that annotates `options` with a dataclass"
            )
        if self.ratio_level not in (levels := self.surrogate_row.levels):
            raise ConfigError(
                f"model.loss.ratio_level is {choices(self.ratio_level, levels)} for {self.surrogate!r}"
            )

    def bounds(self) -> list[Bound]:
        """Returns what each option has to be, those of surrogates among them."""
        k1_alone = KL_ESTIMATORS[str(self.kl_estimator)].needs_correction and not self.kl_bias_correction
        whole = self.surrogate_row.whole_groups
        weights = self.correction
        weighted = weights.active and weights != CorrectionConfig()
        masked = weighted or self.off_policy_threshold is not None or self.top_entropy_quantile < 1
        return [
            *(bound for kind in OPTIONS for bound in kind.bounds(self)),
            *not_negative(self, "kl_coef", "entropy_coef"),
            ("kl_in", self.kl_in in ("loss", "reward"), "loss or reward"),
            ("kl_estimator", not (self.kl_loss_coef and k1_alone), "k2, k3 or used with kl_bias_correction"),
            ("kl_coef", self.kl_coef > 0 or self.adaptive_kl is None, "> 0 for adaptive_kl to act on"),
            ("top_entropy_quantile", 0 < self.top_entropy_quantile <= 1, "in (0, 1]"),
            (
                "surrogate",
                not (whole and masked),
                "another: masks and weights by token do not fit a loss of whole groups",
            ),
            (
                "correction",
                not (self.surrogate_row.folds_correction and weights.active)
                or LEVELS[weights.level].per_token,
                f"of level token: {self.surrogate} takes it into the weight of the whole completion itself",
            ),
            *(
                (key, (getattr(self, key) or 0) > 0, f"given, > 0, for {self.surrogate}")
                for key in self.surrogate_row.required
            ),
        ]


OPTIONS: tuple[type[SurrogateOptions], ...] = tuple(
    kind for kind in LossConfig.__mro__[1:] if issubclass(kind, SurrogateOptions) and "bounds" in vars(kind)
)
"""what `LossConfig` inherits: the options of surrogates, a class each"""
INFINITE = (*(name for kind in OPTIONS for name in kind.may_be_infinite), "off_policy_threshold", "params")
"""options that infinity switches off; a user's own may be anything but nan"""
LossConfig.may_be_infinite = INFINITE
