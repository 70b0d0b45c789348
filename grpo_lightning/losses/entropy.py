"""An entropy bonus whose weight follows the entropy (2505.22312)."""

from dataclasses import dataclass

from grpo_lightning.errors import ConfigError


@dataclass(frozen=True)
class AdaptiveEntropy:
    """Raises the weight of the entropy bonus while the entropy is at or below a target, lowers it above.

    Args:
        target: entropy, a mean over the tokens of an optimizer step, in nats.
        delta: change of the weight per optimizer step.
        min: lowest weight.
        max: highest weight.
    """

    target: float = 0.2
    delta: float = 0.005
    min: float = 0.0
    max: float = 1.0

    def __post_init__(self) -> None:
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
