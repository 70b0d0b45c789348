"""A resume is the run that its command describes: options of now, state of then."""

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from grpo_lightning.checkpoints.newest import AUTO, resolve_last
from grpo_lightning.errors import ConfigError
from grpo_lightning.utils.untrusted import PlainCheckpoints, check_local, read_plain_checkpoints

if TYPE_CHECKING:
    from grpo_lightning.modules.policy_module import PolicyModule

GROWN = {"amsgrad": "max_exp_avg_sq", "centered": "grad_avg", "momentum": "momentum_buffer"}
"""options that, switched on, need a state which a run without them has not gathered"""
SCHEDULED = ("lr", "momentum", "betas")
"""options that a schedule is computed from"""


def built(optimizer: Any) -> dict[str, Any]:
    """Returns class and options of an optimizer as plain types, as they are right after it was made."""
    return {"class": _class_of(optimizer), "groups": [_options(group) for group in optimizer.param_groups]}


def built_schedule(scheduler: Any) -> dict[str, Any] | None:
    """Returns class and options of a schedule as plain text, as they are right after it was made."""
    if scheduler is None:
        return None
    return {"class": _class_of(scheduler), "state": repr(sorted(_plain(scheduler.state_dict()).items()))}


def describe(module: "PolicyModule") -> dict[str, Any]:
    """Returns what this run's config says of optimizer and schedule; makes both to read them."""
    optimizer, scheduler, start = _made(module)
    del optimizer
    return {"optimizer": start, "schedule": built_schedule(scheduler)}


def take_over_optimizer(module: "PolicyModule", checkpoint: dict[str, Any], then: Mapping[str, Any]) -> None:
    """Changes optimizer and schedule in `checkpoint` to what the run's config of now asks for.

    Moments and step counts stay. Options that the config of now sets to another value than that of then take
    the new one; everything else is as saved, so an unchanged config resumes to the last bit. If the schedule
    or what it starts from has changed, it is computed anew from step 0 to the step of the checkpoint: the
    learning rate is that of a run which had the new config from its start.

    Args:
        module: of this run, its weights loaded.
        checkpoint: as Lightning is going to restore it.
        then: what `describe` returned when it was saved.

    Raises:
        ConfigError: the optimizer is of another class, has other groups, or needs state that was not kept.
    """
    if not checkpoint.get("optimizer_states"):
        return
    state = checkpoint["optimizer_states"][0]
    optimizer, scheduler, now = _made(module)
    _check_fits(then["optimizer"], now, state)
    pairs = list(zip(then["optimizer"]["groups"], now["groups"], strict=True))
    changes = [{k: v for k, v in new.items() if k not in old or not _same(old[k], v)} for old, new in pairs]
    rescheduled = then["schedule"] != built_schedule(scheduler) or (
        scheduler is not None and any(key in change for change in changes for key in SCHEDULED)
    )
    step = _scheduled_steps(checkpoint) if rescheduled else None
    if step is not None:
        _advance(scheduler, step)
        changes = [_options(group) for group in optimizer.param_groups]
        checkpoint["lr_schedulers"] = [] if scheduler is None else [scheduler.state_dict()]
    for group, change in zip(state["param_groups"], changes, strict=True):
        group.update(change)
    for line in _report(then, now, step, state["param_groups"]):
        rank_zero_info(line)


def _made(module: "PolicyModule") -> tuple[Any, Any, dict[str, Any]]:
    """Returns an optimizer and a schedule of the run's config, and what `built` says before the schedule."""
    optimizer: Any = module.make_optimizer(module.policy.trainable().values())  # pyright: ignore
    start = built(optimizer)
    scheduler = None if module.make_scheduler is None else module.make_scheduler(optimizer)
    return optimizer, scheduler, start


def _check_fits(then: Mapping[str, Any], now: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    if then["class"] != now["class"]:
        raise ConfigError(
            f"--ckpt_path: model.optimizer is {then['class']} in the checkpoint and {now['class']} in this "
            "run, whose moments are others; set it as in the checkpoint"
        )
    sizes = [len(group["params"]) for group in state["param_groups"]]
    if len(now["groups"]) != len(sizes):
        raise ConfigError(
            f"--ckpt_path: model.optimizer has {len(sizes)} groups of weights in the checkpoint and "
            f"{len(now['groups'])} in this run; group them as in the checkpoint"
        )
    kept = {name for own in state["state"].values() for name in own}
    for old, new in zip(then["groups"], now["groups"], strict=True):
        for option, needed in GROWN.items():
            if new.get(option) and not old.get(option) and kept and needed not in kept:
                raise ConfigError(
                    f"--ckpt_path: model.optimizer's {option} is {old.get(option)} in the checkpoint, which "
                    f"has no {needed}, and {new[option]} in this run; set it as in the checkpoint"
                )


def _scheduled_steps(checkpoint: Mapping[str, Any]) -> int:
    """Returns how often the schedule had been stepped: once per optimizer step."""
    saved = checkpoint.get("lr_schedulers") or [{}]
    return int(saved[0].get("last_epoch", checkpoint["global_step"]))


def _advance(scheduler: Any, steps: int) -> None:
    if scheduler is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch wants an optimizer step before each
        for _ in range(steps):
            scheduler.step()


def _report(
    then: Mapping[str, Any], now: Mapping[str, Any], schedule_step: int | None, groups: list[dict[str, Any]]
) -> list[str]:
    """Returns which options changed, and the learning rate if the schedule is computed anew."""
    lines = []
    for i, (old, new) in enumerate(zip(then["optimizer"]["groups"], now["groups"], strict=True)):
        where = "" if len(groups) == 1 else f" of group {i}"
        lines += [
            f"resume: the optimizer's {key}{where} is now {new[key]}, was {old.get(key)}"
            for key in new
            if key not in old or not _same(old[key], new[key])
        ]
    if schedule_step is not None:
        rates = ", ".join(f"{float(group['lr']):.3g}" for group in groups)
        lines.append(f"resume: new schedule; the learning rate at optimizer step {schedule_step} is {rates}")
    return lines


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _plain(v) for k, v in group.items() if k not in ("params", "param_names")}


def _plain(value: Any) -> Any:
    """Returns `value` as what `weights_only=True` loads, and what compares as a whole."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else list(map(_plain, value))
    if hasattr(value, "tolist"):  # tensors and numpy's numbers
        return value.tolist()
    return value if isinstance(value, bool | int | float | str | None) else _class_of(value)


def _same(a: Any, b: Any) -> bool:
    return a == b or (a != a and b != b)


def _class_of(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


class AsksForCheckpoints(PlainCheckpoints, pl.LightningModule):
    """A module whose Trainer takes `ckpt_path` at its word; Lightning starts anew where there is no last."""

    @pl.LightningModule.trainer.setter
    def trainer(self, trainer: Any) -> None:
        """Takes the Trainer, before it looks for a checkpoint."""
        pl.LightningModule.trainer.fset(self, trainer)  # pyright: ignore[reportOptionalCall]
        if isinstance(trainer, pl.Trainer):
            connector: Any = trainer._checkpoint_connector
            connector._parse_ckpt_path = partial(_parse_ckpt_path, connector)
            read_plain_checkpoints(trainer)


def _parse_ckpt_path(connector: Any, state_fn: Any, ckpt_path: Any, **given: Any) -> Any:
    """Stands in for Lightning's: `last`, `auto` and files are looked for here, all else by Lightning."""
    check_local(ckpt_path)
    if ckpt_path in ("last", AUTO):
        found = resolve_last(connector.trainer, state_fn == TrainerFn.FITTING, ckpt_path)
        return None if found is None else str(found)
    path = None if ckpt_path in (None, "best", "hpc") else Path(ckpt_path)
    if path is not None and not path.exists():
        what = f"{path} is a link to {path.readlink()}" if path.is_symlink() else path
        raise ConfigError(f"--ckpt_path: there is no such file: {what}; name an existing one")
    return type(connector)._parse_ckpt_path(connector, state_fn, ckpt_path, **given)
