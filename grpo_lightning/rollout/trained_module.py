"""What a rollout uses of the LightningModule that it feeds, checked before weights are loaded."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from grpo_lightning.errors import ConfigError
from grpo_lightning.losses import Coefficients, LossConfig
from grpo_lightning.metrics.reduce import Stat
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.policy.policy import Policy


class TrainsOnRollouts(Protocol):
    """A LightningModule that `RolloutCallback` can feed. `PolicyModule` has the first four names.

    Attributes:
        policy: what is trained; loaded by `configure_model`.
        model_path: what `from_pretrained` takes, for engines with a copy of the weights.
        tokenizer: loaded without the weights.
        device: of Lightning.
        loss: what decides which groups are dropped, which advantages are made, and what is scored before.
        coefficients: of the KL term in the reward.
        step_stats: of the last optimizer step, over all ranks; `sampling/kl_engine_trainer` is read.
        step_gaps: by micro-batch of that step, of `policy.verification.engine_gap` or None.
    """

    policy: Policy
    loss: LossConfig
    coefficients: Coefficients
    step_stats: Mapping[str, Stat]
    step_gaps: list[Tensor | None]

    @property
    def model_path(self) -> str: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def device(self) -> Any: ...

    def score(self, batch: RolloutBatch, *, old: bool) -> RolloutBatch:
        """Returns a micro-batch with the log-probabilities that are taken before it trains."""
        ...


def check_module(module: object) -> None:
    """Raises ConfigError, naming what is missing, unless a LightningModule is a `TrainsOnRollouts`."""
    wanted = {*TrainsOnRollouts.__annotations__, "model_path", "tokenizer", "device", "score"}
    missing = sorted(wanted.difference(dir(module)))  # getattr would load a tokenizer
    if missing:
        raise ConfigError(
            f"{type(module).__name__} cannot train on rollouts: it has no {', '.join(missing)}; "
            "take GRPOModule, or derive from PolicyModule and add what `TrainsOnRollouts` lists"
        )
