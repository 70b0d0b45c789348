"""Which strategies of Lightning train here: those that keep the weights whole, and average gradients."""

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy

from grpo_lightning.errors import ConfigError

TRAINS = SingleDeviceStrategy, DDPStrategy
OTHERS = DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy
"""subclasses of those above that do something else"""
INSTEAD = "ddp, by name or as DDPStrategy with init_args"
UNSUPPORTED = {
    "modelparallel": "weights in shards (FSDP2, tensor parallel) are not supported",
    "fsdp": "weights in shards are not supported",
    "deepspeed": "weights in shards are not supported",
    "xla": "kernels and engines need an NVIDIA GPU or a CPU",
}
"""part of the name of one of Lightning's strategies -> why it does not train here"""


def unsupported(name: str) -> str | None:
    """Returns what to take in place of Lightning's strategy of that name; None where it may train."""
    package, _, last = name.lower().rpartition(".")
    if package and not package.startswith("lightning."):  # a user's own: `check_strategy` sees its class
        return None
    return next((f"{INSTEAD}: {why}" for part, why in UNSUPPORTED.items() if part in last), None)


def check_strategy(trainer: pl.Trainer) -> None:
    """Raises ConfigError for a strategy that would train something else, or nothing.

    An unknown one may leave every rank with its own gradients.
    """
    strategy = trainer.strategy
    if isinstance(strategy, OTHERS) or not isinstance(strategy, TRAINS):
        kinds = [kind.__name__ for kind in type(strategy).__mro__]
        allowed = next(filter(None, map(unsupported, kinds)), f"{INSTEAD}, or a subclass of it")
        raise ConfigError(f"trainer.strategy is {kinds[0]}; it must be {allowed}")
