"""Which strategies of Lightning train here: those that keep the weights whole, and average gradients."""

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy

from grpo_lightning.errors import ConfigError

INSTEAD = "ddp, by name or as DDPStrategy with init_args"
UNSUPPORTED = {
    "modelparallel": "weights in shards (FSDP2, tensor parallel) are not supported",
    "fsdp": "weights in shards are not supported",
    "deepspeed": "weights in shards are not supported",
    "xla": "kernels and engines need an NVIDIA GPU or a CPU",
}
"""part of a strategy's name -> why it does not train here"""


def unsupported(name: str) -> str | None:
    """Returns what to take in place of the strategy of that name or class path; None where it may train."""
    last = name.rpartition(".")[2].lower()
    return next((f"{INSTEAD}: {why}" for part, why in UNSUPPORTED.items() if part in last), None)


def check_strategy(trainer: pl.Trainer) -> None:
    """Raises ConfigError for a strategy that would train something else, or nothing.

    An unknown one may leave every rank with its own gradients.
    """
    strategy = trainer.strategy
    known = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy))
    if not known or isinstance(strategy, SingleDeviceXLAStrategy):
        name = type(strategy).__name__
        allowed = unsupported(name) or f"{INSTEAD}, or a subclass of it"
        raise ConfigError(f"trainer.strategy is {name}; it must be {allowed}")
