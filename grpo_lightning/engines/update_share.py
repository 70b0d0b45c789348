"""How much of what training has changed is left in the weights that an engine serves.

A weight of 16 bits lies on a grid. A change of less than half a step of it is rounded away: merged into bf16,
0.5 % of the update arrives after one step at a learning rate of 5e-6 (SmolLM2-135M, r 32).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from grpo_lightning.engines.weight_sync import lora_layers, merged_weight
from grpo_lightning.policy.policy import Policy

ROWS = 64
"""of a weight that are looked at"""
LEAST = 0.9
"""a smaller share is warned of"""


@dataclass(slots=True)
class UpdateShare:
    """<served - start, trained - start> / |trained - start|^2, over some rows of a few layers.

    Args:
        kind: of sync.
        dtype: of the engine.
        layers: what is looked at: adapted layers, or parameters where all weights train.
        start: rows of the parameters as they were loaded; adapted layers have their base.
    """

    kind: str
    dtype: torch.dtype
    layers: Mapping[str, Any]
    start: Mapping[str, Tensor]
    warned: bool = field(default=False)

    @classmethod
    def of(cls, policy: Policy, kind: str, dtype: torch.dtype) -> "UpdateShare | None":
        """Returns what measures `kind`, or None where the engine's type has 32 bits and nothing is lost."""
        if dtype.itemsize > 2:
            return None
        if kind == "full":
            found: list[tuple[str, Any]] = [(n, p) for n, p in policy.trainable().items() if p.ndim == 2]
        else:
            found = list(lora_layers(policy))
        few = dict(found[i] for i in sorted({0, len(found) // 2, len(found) - 1}) if found)
        start = {n: p.detach()[:ROWS].float().clone() for n, p in few.items()} if kind == "full" else {}
        return cls(kind, dtype, few, start)

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Returns `sync/update_arrived`; nothing before the first update. Warns once if it is small."""
        pairs = [self._pair(name, layer) for name, layer in self.layers.items()]
        exact = sum((e * e).sum() for e, _ in pairs)
        arrived = sum((e * s).sum() for e, s in pairs)
        whole, part = torch.stack([torch.as_tensor(exact), torch.as_tensor(arrived)]).tolist()
        if not whole:
            return {}
        share = part / whole
        if share < LEAST and not self.warned:
            self.warned = True
            way = "take sync: adapter" if self.kind == "merge" else "it grows as training goes on"
            rank_zero_warn(
                f"rollout.engine.sync {self.kind!r} rounds weights to {self.dtype}: {share:.0%} of an update "
                f"reaches the engine, which samples from an older policy ({way}); see sync/update_arrived"
            )
        return {"sync/update_arrived": share}

    def _pair(self, name: str, layer: Any) -> tuple[Tensor, Tensor]:
        """Returns some rows of what training has changed, in fp32, and of what the engine shows of it."""
        if self.kind == "full":
            start, now = self.start[name].to(layer.device), layer.detach()[:ROWS].float()
            return now - start, now.to(self.dtype).float() - start.to(self.dtype).float()
        if self.kind == "merge":
            base, merged = layer.get_base_layer().weight.detach()[:ROWS].float(), merged_weight(layer)[:ROWS]
            return merged - base, merged.to(self.dtype).float() - base
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight[:ROWS]
        served = b.to(self.dtype).float() @ a.to(self.dtype).float()
        return b.float() @ a.float(), served
