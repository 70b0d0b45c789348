"""Surrogates: the per-token objective, minimised. A row is a function that asks by name for what it needs.

Any of `AVAILABLE` may be a parameter; most need `(ratio, advantages, logprobs, options)`. `options` is
annotated with a dataclass: for ours one that `LossConfig` inherits, so that its fields are keys of
`model.loss`; for yours any, whose fields are the keys of `model.loss.params`. The rows are in `surrogates/`.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from torch import Tensor

from grpo_lightning.errors import ConfigError, choices
from grpo_lightning.utils.imports import import_object
from grpo_lightning.utils.ranges import Bound, check_numbers

AVAILABLE = (
    "ratio",  # [N] of the ratio level
    "advantages",  # [N]
    "logprobs",  # [N] with gradient
    "log_ratio",  # [N] clamped, token level
    "old_logprobs",  # [N]
    "correction",  # [N] sampler correction, 1 where there is none
    "selected",  # [N] bool, the covariance selection of the optimizer step
    "segments",  # sums per completion and group
    "options",  # of the surrogate: the dataclass that it annotates this with
    "config",  # the whole LossConfig
)


@dataclass(frozen=True, slots=True)
class Surrogate:
    """A row of `SURROGATES`."""

    function: Callable[..., Tensor]
    wants: tuple[str, ...]
    levels: tuple[str, ...]
    formula: str
    paper: str
    options: type | None = None
    """dataclass that the function annotates `options` with"""
    defaults: Mapping[str, float] = field(default_factory=dict[str, float])
    required: tuple[str, ...] = ()
    """options of ours that have no sensible default; yours have none in their dataclass"""
    folds_correction: bool = False
    """multiplies the sampler correction itself"""
    still_at_zero: bool = False
    """has no gradient where the advantage is 0, so that groups without signal need not run"""
    meant_per_token: bool = False
    """published with the token's own ratio"""
    whole_groups: bool = False
    """returns one number for all groups, which must not be cut; divided by the optimizer step's groups"""
    completion_advantages: bool = False
    """needs one advantage for each completion"""
    needs_old: bool = False
    """needs log-probabilities from before the first update, for the whole optimizer step"""
    picks_at_random: bool = False
    """selects at random among tokens of high covariance, not the highest"""

    def __call__(self, **inputs: Any) -> Tensor:
        """Returns l [N], or a scalar with `whole_groups`.

        Raises:
            ConfigError: the function returned another shape, which would be spread over all tokens.
        """
        if self.options is not None:
            inputs["options"] = self.options_of(inputs["config"])
        out = self.function(**{name: inputs[name] for name in self.wants})
        wanted = () if self.whole_groups else tuple(inputs["logprobs"].shape)
        shape = getattr(out, "shape", None)
        if shape is None or tuple(shape) != wanted:
            found = type(out).__name__ if shape is None else f"shape {tuple(shape)}"
            name = getattr(self.function, "__name__", "the surrogate")
            raise ConfigError(
                f"model.loss: {name} returned {found}, expected shape {wanted}: one value per token; leave "
                "sums and means to model.loss.aggregation"
            )
        return out

    @property
    def ours(self) -> bool:
        """Whether the function is the library's own, so that kernels may compute it in its place."""
        return getattr(self.function, "__module__", "").startswith("grpo_lightning.")

    def options_of(self, config: Any) -> Any:
        """Returns what the function gets as `options`: the config where it has them, else made of `params`.

        A class of yours that inherits one of ours takes those fields from the config.

        Raises:
            ConfigError: `model.loss.params` has a name or a value that the dataclass does not take.
        """
        assert self.options is not None
        params: dict[str, Any] = config.params
        if isinstance(config, self.options):
            return config
        ours = [kind for kind in self.options.__mro__ if is_dataclass(kind) and isinstance(config, kind)]
        shared: dict[str, Any] = {f.name: getattr(config, f.name) for kind in ours for f in fields(kind)}
        names = [f.name for f in fields(self.options) if f.name not in shared]
        if unknown := set(params) - set(names):
            raise ConfigError(f"model.loss.params has {choices(min(unknown), names)}")
        try:
            made: Any = self.options(**shared, **params)
            bounds: list[Bound] = made.bounds() if "bounds" in vars(self.options) else []
        except Exception as error:  # whatever somebody else's class raises
            raise ConfigError(f"model.loss.params: {str(error) or type(error).__name__}") from error
        values = {f.name: getattr(made, f.name) for f in fields(self.options)}
        check_numbers("model.loss.params", values, bounds, may_be_infinite=values)
        return made


SURROGATES: dict[str, Surrogate] = {}
ALL_LEVELS = ("token", "sequence", "sequence_token")


def register_surrogate(
    name: str, *, levels: tuple[str, ...] = ALL_LEVELS, formula: str = "", paper: str = "", **flags: Any
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Returns a decorator that adds a function of `AVAILABLE` names, returning [N], to the table.

    Args:
        name: key in the table.
        levels: ratio levels that make sense with it.
        formula: of l, for the documentation.
        paper: arXiv id.
        flags: further fields of `Surrogate`.

    Raises:
        ConfigError: the function asks for something that is not available.
    """

    def add(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        SURROGATES[name] = _row(name, function, levels, formula, paper, **flags)
        return function

    return add


def find_surrogate(name: str, key: str = "model.loss.name") -> Surrogate | None:
    """Returns a row of `SURROGATES`, or one made of your own function where `name` is an import path.

    Args:
        name: of the row, or the path.
        key: what an error names.

    Raises:
        ConfigError: nothing can be imported by that path, or it asks for something that is not available.
    """
    if "." in name and name not in SURROGATES and name not in _OWN:
        function: Callable[..., Tensor] = import_object(name, key)
        _OWN[name] = _row(name, function, ALL_LEVELS, "", "")
    return SURROGATES.get(name) or _OWN.get(name)


_OWN: dict[str, Surrogate] = {}
"""your own functions by import path, each imported once"""


def _row(name: str, function: Callable[..., Tensor], *row: Any, **flags: Any) -> Surrogate:
    wants = tuple(inspect.signature(function).parameters)
    for want in wants:
        if want not in AVAILABLE:
            raise ConfigError(f"surrogate {name!r} asks for the argument {choices(want, AVAILABLE)}")
    return Surrogate(function, wants, *row, options=_options(name, function), **flags)


def _options(name: str, function: Callable[..., Tensor]) -> type | None:
    """Returns the dataclass that a function annotates `options` with; None where it does not ask for them."""
    asked = inspect.signature(function).parameters.get("options")
    if asked is None:
        return None
    kind = asked.annotation
    if isinstance(kind, str):  # from __future__ import annotations
        kind = vars(sys.modules[function.__module__]).get(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        return kind
    raise ConfigError(
        f"surrogate {name!r} asks for options without saying which: annotate them with a dataclass of its "
        "module, whose fields are then the keys of model.loss.params"
    )
