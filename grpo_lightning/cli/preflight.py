"""What is refused before anything is written: values that no part of ours reads, and what `setup` sees."""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from grpo_lightning.callbacks.rollout import RolloutCallback
from grpo_lightning.data.loader import check_enough
from grpo_lightning.errors import ConfigError
from grpo_lightning.modules.strategies import check_strategy, unsupported
from grpo_lightning.policy.finite_checks import build_optimizer

PROCESSES = 8
"""processes of one CPU that may always be asked for, however few cores there are"""


CLUSTER = {
    "MASTER_ADDR",
    "SLURM_JOB_ID",
    "LSB_JOBID",
    "KUBERNETES_PORT",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
}
"""variables of the environment by which the processes of several nodes find each other"""


def _seed(value: Any, config: Mapping[str, Any]) -> str | None:
    return None if isinstance(value, bool) or 0 <= value < 2**32 else "a number from 0 to 4294967295"


def _devices(value: Any, config: Mapping[str, Any]) -> str | None:
    most = max(PROCESSES, os.cpu_count() or 1)
    count = int(value) if str(value).strip().lstrip("+").isdigit() else 1
    if config.get("trainer.accelerator") == "cpu" and count > most:
        return f"at most {most} on this CPU, where each is a process"
    return None


def _nodes(value: Any, config: Mapping[str, Any]) -> str | None:
    plugins = " ".join(str(v) for k, v in config.items() if k.startswith("trainer.plugins"))
    if value < 1:
        return "at least 1"
    if value > 1 and not CLUSTER & set(os.environ) and "Environment" not in plugins:
        return "1 here: nodes find each other by MASTER_ADDR and NODE_RANK, which are not set"
    return None


def _accumulated(value: Any, config: Mapping[str, Any]) -> str | None:
    return None if value >= 1 else "at least 1"


def _strategy(value: Any, config: Mapping[str, Any]) -> str | None:
    return unsupported(str(value))


def _checkpoint(value: Any, config: Mapping[str, Any]) -> str | None:
    known = (
        str(value) in ("last", "auto", "best", "hpc")
        or "://" in str(value)
        or str(value).startswith("registry")
    )
    try:
        there = known or Path(value).exists()
    except (OSError, ValueError):
        there = False
    return None if there else "last, auto, or a checkpoint that exists"


RULES: dict[str, Callable[[Any, Mapping[str, Any]], str | None]] = {
    "seed_everything": _seed,
    "trainer.devices": _devices,
    "trainer.num_nodes": _nodes,
    "trainer.strategy": _strategy,
    "trainer.strategy.class_path": _strategy,
    "trainer.accumulate_grad_batches": _accumulated,
    "ckpt_path": _checkpoint,
}
"""option -> what it must be, or None if it is that already; for what would hang or end in a riddle"""


def check_values(parser: Any, config: Mapping[str, Any]) -> None:
    """Raises ConfigError for what the parser lets pass: null, nan, a value for a section, what RULES refuse.

    Arguments of classes are theirs to judge.

    Args:
        parser: of the command.
        config: dotted option -> value.
    """
    options = {a.dest: a for a in parser._actions if not a.dest.endswith(".help")}
    sections = {key[:end] for key in options for end, letter in enumerate(key) if letter == "."}
    for key, value in config.items():
        if key in sections and value is not None and not isinstance(value, Mapping):
            inside = ", ".join(k.removeprefix(f"{key}.") for k in options if k.startswith(f"{key}."))
            raise ConfigError(f"{key} is {value!r:.100}; it must be a mapping with any of {inside}")
        if value is None and not _takes_null(options.get(key)):
            raise ConfigError(f"{key} is null; leave it out, or give it a value: {options[key]._typehint}")
        if isinstance(value, float) and math.isnan(value) and ".init_args." not in key:
            raise ConfigError(f"{key} is nan; it must be a number")
    for key, rule in RULES.items():
        if (value := config.get(key)) is not None and (allowed := rule(value, config)):
            raise ConfigError(f"{key} is {value!r:.200}; it must be {allowed}")


def _takes_null(option: Any) -> bool:
    hint = getattr(option, "_typehint", None)
    return hint in (None, Any) or option.default is None or type(None) in get_args(hint)


def rehearse(trainer: pl.Trainer, module: Any, data: Any, stage: str) -> None:
    """Checks data, rollout and model as the Trainer will, but before a logger makes its folder.

    What is read, tokenised and loaded is kept: the Trainer's own calls find it done. Weights are loaded here
    only where one process trains; the ranks of several load theirs at the same time, later.
    """
    check_strategy(trainer)
    if getattr(trainer.strategy, "_start_method", None) == "spawn":
        raise ConfigError(
            "trainer.strategy starts ranks by spawn, to which a command's objects cannot be sent; take ddp"
        )
    trainer.strategy.connect(module)
    module.trainer = data.trainer = trainer
    trainer.datamodule = data  # pyright: ignore[reportAttributeAccessIssue]
    data.setup(stage)
    if stage == "fit":
        data._check_trainer()
    if stage == "fit" and (prompts := data._prompts.get("train")) is not None:
        check_enough(len(prompts), data.prompts_per_rollout)
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(callback, RolloutCallback):
            callback.setup(trainer, module, stage)
            if check := getattr(callback.engine, "check", None):
                check(callback.sampling)
    module.setup(stage)
    if stage == "fit":
        build_optimizer(module.make_optimizer, module.make_scheduler, [torch.nn.Parameter(torch.zeros(2, 2))])
    if type(trainer.strategy) is SingleDeviceStrategy:
        sharded, precision = trainer.strategy.model_sharded_context(), trainer.precision_plugin
        with trainer.strategy.tensor_init_context(), sharded, precision.module_init_context():
            module.configure_model()
