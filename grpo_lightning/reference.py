"""The reference policy of a KL term, where it is not simply the adapter switched off."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grpo_lightning.errors import ConfigError


@dataclass(frozen=True)
class ReferenceConfig:
    """A reference that follows the policy: ref <- ema_alpha policy + (1 - ema_alpha) ref.

    It is a mean of what trains. With an adapter that is its factors A and B, whose mean is exactly the
    policy's for ema_alpha 1, and otherwise what the averaged factors give.

    Args:
        ema_alpha: share of the policy in the new reference; 1 copies it.
        ema_every: optimizer steps between two updates.
    """

    ema_alpha: float = 0.6
    ema_every: int = 512

    def __post_init__(self) -> None:
        if not 0 < self.ema_alpha <= 1 or self.ema_every < 1:
            raise ConfigError(
                f"model.reference has ema_alpha {self.ema_alpha} and ema_every {self.ema_every}; "
                "it must be 0 < ema_alpha <= 1 and ema_every >= 1"
            )


class WeightCopy:
    """A copy of the weights that train; takes their place while the reference policy runs."""

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in params.items()}

    @contextmanager
    def in_place_of(self, params: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Exchanges storages, not values: nothing is copied."""
        self._exchange(params)
        try:
            yield
        finally:
            self._exchange(params)

    def _exchange(self, params: Mapping[str, nn.Parameter]) -> None:
        for name, p in params.items():
            p.data, self.weights[name] = self.weights[name], p.data

    def mix(self, params: Mapping[str, nn.Parameter], alpha: float) -> None:
        """Moves the copy towards the weights, by the share `alpha`."""
        with torch.no_grad():
            for name, p in params.items():
                self.weights[name].lerp_(p.detach(), alpha)

    def follow(self, params: Mapping[str, nn.Parameter]) -> None:
        """Brings the copy to the device and type of the weights."""
        self.weights = {n: w.to(params[n].device, params[n].dtype) for n, w in self.weights.items()}
