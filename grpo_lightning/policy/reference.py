"""The reference policy of a KL term, where it is not simply the adapter switched off."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grpo_lightning.errors import ConfigError, hinted
from grpo_lightning.utils.ranges import check_numbers


@hinted
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
        check_numbers("model.reference", self)
        if not 0 < self.ema_alpha <= 1 or self.ema_every < 1:
            raise ConfigError(
                f"model.reference has ema_alpha {self.ema_alpha} and ema_every {self.ema_every}; "
                "it must be 0 < ema_alpha <= 1 and ema_every >= 1"
            )


class WeightCopy:
    """A copy of the weights that train; takes their place while the reference policy runs.

    Args:
        params: what trains.
        dtype: of the copy; a mean that moves in small steps needs fp32. None is the type of what trains.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype
        self.weights: dict[str, Tensor] = {
            name: p.detach().clone().to(dtype or p.dtype) for name, p in params.items()
        }

    @contextmanager
    def in_place_of(self, params: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Exchanges storages; nothing is copied where the types agree."""
        own = {name: p.data for name, p in params.items()}
        for name, p in params.items():
            p.data = self.weights[name].to(p.dtype)
        try:
            yield
        finally:
            for name, p in params.items():
                p.data = own[name]

    def mix(self, params: Mapping[str, nn.Parameter], alpha: float) -> None:
        """Moves the copy towards the weights, by the share `alpha`."""
        with torch.no_grad():
            for name, p in params.items():
                self.weights[name].lerp_(p.detach().to(self.weights[name].dtype), alpha)

    def follow(self, params: Mapping[str, nn.Parameter]) -> None:
        """Brings the copy to the device of the weights, and to their type unless it has its own."""
        self.weights = {
            n: w.to(params[n].device, self._dtype or params[n].dtype) for n, w in self.weights.items()
        }
