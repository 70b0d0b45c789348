"""Where checkpoints are, and which of them is the newest that is sound."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from grpo_lightning.errors import CheckpointError, ConfigError
from grpo_lightning.utils.checked_files import Seal, peek, verify

AUTO = "auto"


class Found(NamedTuple):
    """The newest sound checkpoint, and those that come before it or say nothing of their age."""

    file: Path | None
    step: int
    skipped: list[str]


def newest(folders: Iterable[Path], fit: bool = True) -> Found:
    """Looks through folders.

    Newer is what a later launch wrote, and of one launch what it wrote at a later step, by what the files say
    themselves: their times change with a copy.

    Args:
        folders: of checkpoints.
        fit: pass over those without the optimizer's state.
    """
    seen: list[tuple[Seal, Path]] = []
    skipped: list[str] = []
    for file in sorted(f for folder in folders for f in folder.glob("*.ckpt")):
        if file.is_symlink() and not file.exists():
            skipped.append(f"{file} is a link to {file.readlink()}, which is gone")
            continue
        try:
            seal = peek(file)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        if seal.resumable or not fit:
            seen.append((seal, file))
    for seal, file in sorted(seen, key=_age, reverse=True):
        try:
            verify(file)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        return Found(file, seal.step, skipped)
    return Found(None, 0, skipped)


def _age(found: tuple[Seal, Path]) -> tuple[int, int, bool]:
    seal, file = found
    return seal.launch, seal.step, file.stem.startswith(ModelCheckpoint.CHECKPOINT_NAME_LAST)


def resolve_last(trainer: pl.Trainer, fit: bool = True, asked: str = "last") -> Path | None:
    """Returns what `--ckpt_path last` means: the newest sound checkpoint of this run's folders.

    Warns of damaged ones it passes over.

    Args:
        trainer: with its callbacks.
        fit: the optimizer's state is needed.
        asked: `last`, or `auto`, which is None where the folders hold no checkpoint at all, sound or not.

    Raises:
        ConfigError: there is no checkpoint.
        CheckpointError: there are some, and all are damaged.
    """
    folders = checkpoint_folders(trainer)
    requeued = trainer._checkpoint_connector._hpc_resume_path  # what SLURM's requeue left
    if requeued is not None:
        folders.append(Path(requeued).parent)
    found = newest(folders, fit)
    if found.file is not None:
        for reason in found.skipped:
            rank_zero_warn(f"--ckpt_path {asked}: {reason}")
        if found.skipped:
            rank_zero_warn(f"--ckpt_path {asked}: taking {found.file} of step {found.step}")
        return found.file
    if found.skipped:
        raise CheckpointError(f"--ckpt_path {asked}: no checkpoint is sound: {'; '.join(found.skipped)}")
    where = " and ".join(map(str, folders)) or "any folder: no ModelCheckpoint is configured"
    if asked == AUTO and not any(True for folder in folders for _ in folder.glob("*.ckpt")):
        rank_zero_info(f"--ckpt_path auto: there is no checkpoint in {where}; starting from step 0")
        return None
    others = newest({f for folder in folders for f in folder.parent.parent.glob("*/checkpoints")}, fit)
    hint = "" if others.file is None else f"; the newest of the runs beside it is {others.file}"
    raise ConfigError(
        f"--ckpt_path {asked}: there is no checkpoint in {where}{hint}; name a file, or take auto, which "
        "starts from step 0 where there is none"
    )


def checkpoint_folders(trainer: pl.Trainer) -> list[Path]:
    """Returns the folders that a Trainer's callbacks write checkpoints into.

    Raises:
        ConfigError: one is remote.
    """
    folders: dict[Path, None] = {}
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            # From its dirpath, the logger, or default_root_dir; only the callback knows.
            folder: Any = callback._ModelCheckpoint__resolve_ckpt_dir(trainer)  # pyright: ignore
        else:
            folder = getattr(callback, "dirpath", None)
        if folder is not None:
            folders[local_path(folder)] = None
    return list(folders)


def local_path(path: Any) -> Path:
    """Returns a path of this machine.

    Raises:
        ConfigError: it is a URL.
    """
    if "://" in str(path):
        raise ConfigError(
            f"{path} is remote; checkpoints live in local or mounted folders, where a rename makes a file "
            "whole: give a local path, and copy what you want elsewhere"
        )
    return Path(path)


def remedy(file: Path) -> str:
    """Returns, for an error about a checkpoint, which sound one there is beside it."""
    found = newest([file.parent], fit=False)
    return "" if found.file is None else f"; sound is {found.file} of step {found.step}"
