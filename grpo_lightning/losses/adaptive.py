"""Weights that follow what they control, from optimizer step to optimizer step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grpo_lightning.errors import ConfigError, hinted
from grpo_lightning.utils.ranges import check_numbers

if TYPE_CHECKING:
    from grpo_lightning.losses.config import LossConfig


@hinted
@dataclass(frozen=True)
class AdaptiveEntropy:
    """Raises the weight of the entropy bonus while the entropy is at or below a target, lowers it above.

    Args:
        target: entropy, a mean over the tokens of an optimizer step, in nats.
        delta: change of the weight per optimizer step (2505.22312).
        min: lowest weight.
        max: highest weight.
    """

    target: float = 0.2
    delta: float = 0.005
    min: float = 0.0
    max: float = 1.0

    def __post_init__(self) -> None:
        check_numbers("model.loss.adaptive_entropy", self)
        if not 0 <= self.min <= self.max or self.delta <= 0:
            raise ConfigError(
                f"model.loss.adaptive_entropy has min {self.min}, max {self.max}, delta {self.delta}; "
                "it must be 0 <= min <= max and delta > 0"
            )

    def step(self, coefficient: float, entropy: float) -> float:
        """Returns the weight after an optimizer step whose mean entropy was `entropy`."""
        change = self.delta if entropy <= self.target else -self.delta
        return min(max(coefficient + change, self.min), self.max)

    def applies(self, last_entropy: float | None) -> bool:
        """Whether the bonus acts in a step, given the entropy of the step before; never in the first."""
        return last_entropy is not None and last_entropy <= self.target


@hinted
@dataclass(frozen=True)
class AdaptiveKL:
    """Raises `kl_coef` while the KL divergence is above a target, lowers it below (1909.08593, section 2.2).

    coef <- coef (1 + gain clip(KL / target - 1, -0.2, 0.2)), once per optimizer step.

    Args:
        target: KL divergence from the reference, a mean over the tokens of an optimizer step, in nats.
        gain: how fast the weight follows; other trainers call its inverse the horizon, in steps.
    """

    target: float
    gain: float = 0.1

    def __post_init__(self) -> None:
        check_numbers("model.loss.adaptive_kl", self)
        if self.target <= 0 or not 0 < self.gain <= 1:
            raise ConfigError(
                f"model.loss.adaptive_kl has target {self.target} and gain {self.gain}; "
                "it must be target > 0 and 0 < gain <= 1"
            )

    def step(self, coefficient: float, kl: float) -> float:
        """Returns the weight after an optimizer step whose mean divergence was `kl`."""
        return coefficient * (1 + self.gain * min(max(kl / self.target - 1, -0.2), 0.2))


class Coefficients:
    """The weights of the KL term and of the entropy bonus, as they stand in this optimizer step."""

    def __init__(self, loss: "LossConfig") -> None:
        self._loss = loss
        self.kl = loss.kl_coef
        self._entropy = loss.entropy_coef
        self._last_entropy: float | None = None

    @property
    def entropy(self) -> float:
        """Weight of the entropy bonus."""
        adaptive = self._loss.adaptive_entropy
        return self._entropy if adaptive is None or adaptive.applies(self._last_entropy) else 0.0

    def metrics(self) -> dict[str, float]:
        """Returns what is logged of them."""
        out = {"entropy_coef": self.entropy} if self._loss.has_entropy_bonus else {}
        return out if self._loss.adaptive_kl is None else {**out, "kl_coef": self.kl}

    def step(self, metrics: Mapping[str, float]) -> None:
        """Adapts them to the means of the optimizer step that ends."""
        if self._loss.adaptive_entropy is not None and "entropy" in metrics:
            self._last_entropy = metrics["entropy"]
            self._entropy = self._loss.adaptive_entropy.step(self._entropy, self._last_entropy)
        if self._loss.adaptive_kl is not None and "kl" in metrics:
            self.kl = self._loss.adaptive_kl.step(self.kl, metrics["kl"])

    def state_dict(self) -> dict[str, float | None]:
        """Returns what a resumed run goes on from."""
        return {"kl": self.kl, "entropy": self._entropy, "last_entropy": self._last_entropy}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Takes over what adapts; a fixed weight stays as configured."""
        if self._loss.adaptive_kl is not None:
            self.kl = state["kl"] or 0.0
        if self._loss.adaptive_entropy is not None:
            self._entropy, self._last_entropy = state["entropy"] or 0.0, state["last_entropy"]
