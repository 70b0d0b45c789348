"""`AdapterCheckpointIO`: whole checkpoints or none, and beside each the same adapter in peft's format.

A checkpoint and its adapter's folder have two names, and no file system renames both at once. So the
checkpoint is the truth and the adapter follows from it: the old adapter goes, the checkpoint is replaced, the
new adapter comes. Wherever this stops, an adapter that is there is its checkpoint's, and one that is missing
is written again from the checkpoint when the next run starts (`repair`).
"""

import os
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from grpo_lightning.checkpoints.newest import checkpoint_folders, local_path, remedy
from grpo_lightning.checkpoints.run_lock import RunLock
from grpo_lightning.errors import CheckpointError, ConfigError, GRPOError
from grpo_lightning.utils.atomic_files import (
    failures_named,
    moved_away,
    remove_strays,
    removed_after,
    sync_file,
    sync_folder,
    temporary,
)
from grpo_lightning.utils.checked_files import Seal, load_sealed, peek, read_seal, write_sealed


class AdapterCheckpointIO(TorchCheckpointIO):
    """Writes `<name>.ckpt` atomically, and beside it `<name>-adapter/`, for peft, vLLM and transformers.

    Give it to the Trainer as a plugin; `grpo-lightning` does so by itself. A file under its final name is
    whole: it is written under another one in the same folder, verified, brought to the disk, renamed. What is
    read is verified by its checksum, and never runs code.
    """

    def __init__(self) -> None:
        self.locks: dict[Path, RunLock | None] = {}
        """the folders of this run's ModelCheckpoints; None until there is something to keep others out of"""
        self._launch = self._resumed = 0
        self._saved: Path | None = None

    def guard(self, folder: Path) -> None:
        """Makes this run the only one that writes into a folder, once it exists, and tidies up there.

        Raises:
            ConfigError: another run does.
        """
        self.locks.setdefault(folder, None)
        if folder.is_dir():
            self._lock(folder)

    def _lock(self, folder: Path) -> None:
        if folder in self.locks and self.locks[folder] is None:
            with failures_named(folder, folder):
                self.locks[folder] = RunLock(folder)
            remove_strays(folder)
            repair(folder)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Writes the checkpoint and, if it holds an adapter, the adapter's folder.

        Raises:
            CheckpointError: it could not be written; what was there before is as it was.
            ConfigError: `path` is remote, or `storage_options` are given, or another run writes there.
        """
        if storage_options is not None:
            raise ConfigError("save_checkpoint: storage_options are not taken; checkpoints are local files")
        file = local_path(path)
        new, new_adapter = temporary(file), temporary(adapter_folder(file))
        with removed_after(new, new_adapter), failures_named(file, new):
            file.parent.mkdir(parents=True, exist_ok=True)
            self._lock(file.parent)
            with new.open("xb") as out:
                seal = write_sealed(checkpoint, out, self._seal(checkpoint))
            if seal.adapter:
                write_adapter_of(checkpoint, new_adapter, seal)
            publish(new, file, new_adapter if seal.adapter else None)
        self._saved = file

    def _seal(self, checkpoint: dict[str, Any]) -> Seal:
        self._launch = self._launch or max(time.time_ns(), self._resumed + 1)
        return Seal(
            self._launch,
            step=checkpoint.get("global_step", 0),
            resumable="optimizer_states" in checkpoint,
            adapter="adapter_config" in checkpoint.get("grpo_lightning", {}),
        )

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Returns a checkpoint whose checksum is right; it is read as if `weights_only` were true.

        Raises:
            CheckpointError: it is missing or damaged; names a sound one in the same folder.
            ConfigError: `path` is remote.
        """
        file = local_path(path)
        try:
            loaded = load_sealed(file, map_location)
            self._resumed = max(self._resumed, peek(file).launch)
        except CheckpointError as error:
            raise CheckpointError(f"--ckpt_path: {error}{remedy(file)}") from error
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        """Removes both; only warns if that fails, since nothing is lost.

        A link to it is led to the newest first: Lightning removes the old one before it renews `last`.
        """
        file = local_path(path)
        try:
            for link in file.parent.glob("*.ckpt"):
                if self._saved and link.is_symlink() and link != file and link.resolve() == file.resolve():
                    point(link, self._saved)
            with moved_away(adapter_folder(file)):
                if file.is_dir() and not file.is_symlink():
                    shutil.rmtree(file)
                elif os.path.lexists(file):
                    os.unlink(file)
                    sync_folder(file.parent)
        except OSError as error:
            rank_zero_warn(f"{file} could not be removed: {error.strerror}")

    def teardown(self) -> None:
        """Ends a run: others may write where it wrote."""
        for lock in self.locks.values():
            if lock is not None:
                lock.release()
        self.locks.clear()
        self._launch = self._resumed = 0


def guard_folders(trainer: pl.Trainer, stage: str) -> None:
    """Makes a fit the only one that writes into its folders of checkpoints, before anything is loaded.

    Raises:
        ConfigError: a folder is remote, or another run writes there; on all ranks.
        CheckpointError: a folder cannot be written to; on all ranks.
    """
    io = trainer.strategy.checkpoint_io
    if stage != "fit" or trainer.fast_dev_run or not isinstance(io, AdapterCheckpointIO):  # pyright: ignore
        return
    refused: GRPOError | None = None
    if trainer.is_global_zero:
        try:
            for folder in checkpoint_folders(trainer):
                io.guard(folder)
        except GRPOError as error:
            refused = error
    if (told := trainer.strategy.broadcast(refused)) is not None:
        raise told
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback._link_checkpoint = replace_link
            _save_between_steps(callback)


def _save_between_steps(callback: ModelCheckpoint) -> None:
    """Keeps a callback from saving in the middle of an optimizer step, whose gradient would be lost.

    By itself it does so after the first micro-batch of a resumed run, by the clock (`train_time_interval`,
    which now waits for the end of the step), and after a validation in the middle of a step.
    """

    def unless_accumulating(hook: Any, trainer: pl.Trainer, *args: Any) -> None:
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            hook(trainer, *args)

    for name in ("on_train_batch_end", "on_validation_end"):
        stock = getattr(type(callback), name).__get__(callback)
        setattr(callback, name, partial(unless_accumulating, stock))


def replace_link(trainer: pl.Trainer, filepath: str, linkpath: str) -> None:
    """Lets `last` point to another checkpoint, and its adapter with it.

    Lightning removes the old link first, and has none until the new one is made.
    """
    file, link = Path(filepath), Path(linkpath)
    if trainer.is_global_zero and file.absolute() != link.absolute():
        point(link, file)
    trainer.strategy.barrier()


def point(link: Path, file: Path) -> None:
    """Makes a link to a checkpoint, and one to its adapter."""
    new, new_adapter = temporary(link), temporary(adapter_folder(link))
    with removed_after(new, new_adapter), failures_named(link, new):
        new.symlink_to(os.path.relpath(file, link.parent))
        if adapter := adapter_folder(file).is_dir():
            new_adapter.symlink_to(os.path.relpath(adapter_folder(file), link.parent))
        publish(new, link, new_adapter if adapter else None)


def adapter_folder(path: Any) -> Path:
    """Returns where the adapter of a checkpoint lives."""
    file = Path(path)
    return file.with_name(f"{file.stem}-adapter")


def publish(new: Path, file: Path, new_adapter: Path | None) -> None:
    """Gives a checkpoint and its adapter their names, in the order that keeps them a pair."""
    with moved_away(adapter_folder(file)):
        os.replace(new, file)
        sync_folder(file.parent)
    if new_adapter is not None:
        os.rename(new_adapter, adapter_folder(file))
        sync_folder(file.parent)


def repair(folder: Path) -> list[Path]:
    """Writes again each adapter that is missing, or is another checkpoint's; returns their folders."""
    written: list[Path] = []
    for file in folder.glob("*.ckpt"):
        adapter = adapter_folder(file)
        try:
            seal = read_seal(file)
            if seal is None or not seal.adapter or checkpoint_of(adapter) == seal.sha256:
                continue
            checkpoint = load_sealed(file)
        except CheckpointError:  # whoever reads the checkpoint says so
            continue
        new = temporary(adapter)
        with removed_after(new), failures_named(adapter, new):
            write_adapter_of(checkpoint, new, seal)
            with moved_away(adapter):
                os.rename(new, adapter)
                sync_folder(folder)
        written.append(adapter)
    return written


def checkpoint_of(adapter: Path) -> str | None:
    """Returns the checksum of the checkpoint that an adapter belongs to; None where there is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(adapter / "adapter_model.safetensors", "pt") as weights:
            return (weights.metadata() or {}).get("checkpoint")
    except (OSError, SafetensorError):
        return None


def write_adapter_of(checkpoint: Mapping[str, Any], folder: Path, seal: Seal) -> None:
    """Writes the adapter that a checkpoint holds into a new folder, and brings it to the disk."""
    ours = checkpoint["grpo_lightning"]
    own = {"checkpoint": seal.sha256}
    write_adapter(folder, checkpoint["state_dict"], ours["adapter_config"], ours["adapter_names"], own)


def write_adapter(
    folder: Path,
    state_dict: Mapping[str, Tensor],
    config: str,
    names: Mapping[str, str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes peft's two files and brings them to the disk.

    Args:
        folder: is made if it is missing.
        state_dict: of a module; what trains is enough.
        config: peft's adapter_config.json.
        names: peft's name of a tensor -> the policy's: `Policy.adapter_names`.
        metadata: of the file of weights, besides its format.

    Raises:
        OSError: it could not be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    written = set[str]()
    for name, own in names.items():
        if (tensor := state_dict.get(f"policy.{own}")) is not None:
            tensor = tensor.detach().cpu().contiguous()
            tensors[name] = tensor.clone() if own in written else tensor  # tied: a file holds no aliases
            written.add(own)
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    try:
        save_file(tensors, weights, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        raise OSError(f"{weights.name}: {error}") from error
    settings.write_text(config)
    sync_file(weights)
    sync_file(settings)
    sync_folder(folder)
