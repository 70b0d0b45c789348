"""How a run is stopped: all ranks leave together, with one checkpoint of the last completed boundary.

A rollout is abandoned, since the next run makes the same one again. What a checkpoint at that moment would
get wrong (Lightning has counted and drawn the batch) is taken from a note of the last optimizer step's end.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch.distributed import ReduceOp, all_reduce

from grpo_lightning.callbacks.ranks import RankWatch, await_ranks
from grpo_lightning.engines.process_guard import random_state, restore_random_state
from grpo_lightning.errors import EngineError, GRPOError
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.utils.signals import (
    Stopped,
    at_once,
    check,
    defer,
    deferred,
    ignore,
    listen,
    receive,
    received,
    resume_hint,
)

if TYPE_CHECKING:
    from grpo_lightning.callbacks.rollout import RolloutCallback

FILE = "stopped.ckpt"
"""beside the checkpoints of ModelCheckpoint; each stop replaces the one before"""
FAILED = 1000
"""more than any signal: a rank has failed"""


@dataclass(frozen=True, slots=True)
class Boundary:
    """What changes between the end of an optimizer step and the next one, besides weights and optimizer."""

    step: int
    loops: dict[str, Any]
    data: dict[str, Any]
    random: dict[str, Any]
    micro_batches: list[RolloutBatch]
    num_tokens: float
    policy_check: dict[str, Any]


class Stopping:
    """Stops the run of one RolloutCallback."""

    def __init__(self) -> None:
        self._boundary: Boundary | None = None
        self._watch: RankWatch | None = None
        self._listens = False
        self._first_step = 0
        self._restored: dict[str, Any] | None = None

    def attach(self, trainer: pl.Trainer) -> None:
        """Takes the signals over; Lightning's handlers would wait for a rollout to end, and exit with 0."""
        if not self._listens:
            listen()
            self._listens = True
        trainer._signal_connector.register_signal_handlers = _leave_to_us

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the loops of the checkpoint that is resumed; by the start of training Lightning counts on."""
        self._restored = deepcopy(checkpoint["loops"])

    def begin(self, trainer: pl.Trainer, rollout: "RolloutCallback") -> None:
        """Says that training starts: from here on there is something to lose."""
        defer()
        self._watch = RankWatch.of(trainer)
        self.note(trainer, rollout)
        self._first_step = trainer.global_step

    def note(self, trainer: pl.Trainer, rollout: "RolloutCallback") -> None:
        """Notes the end of an optimizer step, or the start of training."""
        data = getattr(trainer, "datamodule", None)
        loops = self._restored or deepcopy(trainer._checkpoint_connector._get_loops_state_dict())
        self._restored = None
        if not loops["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]:
            # A restart adds 1 for the step it is saved in; before the first there is none.
            loops["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] = -1
        self._boundary = Boundary(
            step=trainer.global_step,
            loops=loops,
            data={} if data is None else deepcopy(data.state_dict()),
            random=random_state(),
            micro_batches=rollout._micro_batches,
            num_tokens=rollout._metrics.num_tokens,
            policy_check=rollout.policy_check.state_dict(),
        )

    @contextmanager
    def saving(self, trainer: pl.Trainer, rollout: "RolloutCallback") -> Iterator[None]:
        """Surrounds a rollout: where a signal or the end of its engine leaves it, the boundary is saved."""
        try:
            yield
        except Stopped as stop:
            with deferred():
                self._stop(trainer, rollout, stop)
            raise
        except EngineError as error:
            if trainer.world_size > 1 or self._boundary is None or self._boundary.step == self._first_step:
                raise  # ranks that are well may wait elsewhere; or nothing has been trained
            try:
                path = self._save(trainer, rollout, self._folder(trainer))
            except Exception as also:
                error.add_note(f"no checkpoint could be saved: {type(also).__name__}: {also}")
                raise error from also
            if path is None:
                raise
            raise EngineError(f"{error}\nsaved {path}; resume with: {resume_hint(path)}") from error

    def agree(self, trainer: pl.Trainer) -> None:
        """Raises Stopped on all ranks if a signal has come to any; every rank calls it at the same point."""
        signum = _highest(trainer, received() or 0)
        if signum:
            receive(signum)
            raise Stopped(signum)

    def evaluate(self, trainer: pl.Trainer, rollout: "RolloutCallback", work: Callable[[], None]) -> None:
        """Does a batch of validation; several ranks, which may have unequal batches, leave at its end."""
        if trainer.world_size == 1 or self._boundary is None:
            with self.saving(trainer, rollout), at_once():
                work()
        elif received() is None:
            try:
                with at_once():
                    work()
            except Stopped:
                return

    def after_evaluation(self, trainer: pl.Trainer, rollout: "RolloutCallback") -> None:
        """Leaves if a signal has come to any rank meanwhile."""
        with self.saving(trainer, rollout):
            self.agree(trainer)

    def on_exception(self, trainer: pl.Trainer, exception: BaseException) -> None:
        """Tells the other ranks of a failure, and leaves none behind."""
        if self._watch is not None and not isinstance(exception, Stopped):
            self._watch.tell_failure()
        self.end()
        await_ranks(trainer)

    def end(self) -> None:
        """Gives the signals back."""
        self._restored = None
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        if self._listens:
            ignore()
            self._listens = False

    def _stop(self, trainer: pl.Trainer, rollout: "RolloutCallback", stop: Stopped) -> None:
        slurm = _requeues(trainer) if self._boundary is not None else None
        path = self._save(trainer, rollout, self._folder(trainer) if slurm is None else slurm)
        if not trainer.is_global_zero:
            return
        step = "" if self._boundary is None else f" after optimizer step {self._boundary.step}"
        if path is not None:
            text = f"stopped{step}; saved {path}\nresume with: {resume_hint(path)}"
        elif self._boundary is None:
            text = "stopped; nothing was being trained"
        else:
            text = f"stopped{step}; the Trainer has no ModelCheckpoint, so nothing was saved"
        print(text, file=sys.stderr, flush=True)
        if slurm is not None:
            _requeue()

    def _folder(self, trainer: pl.Trainer) -> Path | None:
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        return None if folder is None else Path(folder, FILE)

    def _save(self, trainer: pl.Trainer, rollout: "RolloutCallback", path: Path | None) -> Path | None:
        """Writes the checkpoint of the boundary, on all ranks; returns where, or None without a place."""
        at = self._boundary
        if at is None or path is None:
            return None
        rollout._micro_batches, rollout._metrics.num_tokens = at.micro_batches, at.num_tokens
        rollout.policy_check.load_state_dict(at.policy_check)
        restore_random_state(at.random)
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        checkpoint["loops"] = at.loops
        if at.data:
            checkpoint[type(trainer.datamodule).__qualname__] = at.data  # pyright: ignore
        trainer.strategy.save_checkpoint(checkpoint, path)
        trainer.strategy.barrier("stopped")
        return path


@contextmanager
def together(trainer: pl.Trainer) -> Iterator[None]:
    """Surrounds what every rank does alone in a rollout: if one is stopped or fails, none goes on.

    Raises:
        Stopped: a signal has come to any rank.
        GRPOError: another rank has failed.
    """
    failure: BaseException | None = None
    try:
        with at_once():
            yield
            check()
    except (Exception, Stopped) as error:
        failure = error
    failed = isinstance(failure, Exception)
    worst = _highest(trainer, FAILED if failed else received() or 0)
    if failed:
        assert failure is not None
        raise failure
    if worst == FAILED:
        raise GRPOError("another rank has failed in this rollout; its message says why")
    if worst:
        receive(worst)
        raise failure or Stopped(worst)


def _highest(trainer: pl.Trainer, number: int) -> int:
    """Returns the highest number of all ranks."""
    if trainer.world_size == 1:
        return number
    shared = torch.tensor([number], device=trainer.strategy.root_device)
    all_reduce(shared, ReduceOp.MAX)
    return int(shared)


def _leave_to_us() -> None:
    """Stands in for Lightning's registration of signal handlers."""


def _requeues(trainer: pl.Trainer) -> Path | None:
    """Returns where a SLURM job that is put into the queue again looks for a checkpoint; None elsewhere."""
    environment = trainer._accelerator_connector.cluster_environment
    if not (isinstance(environment, SLURMEnvironment) and environment.auto_requeue):
        return None
    return Path(trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir))


def _requeue() -> None:
    """Puts this SLURM job into the queue again."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID")
    task = f"{job}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if job else os.environ.get("SLURM_JOB_ID", "")
    done = subprocess.run(["scontrol", "requeue", task], check=False)
    said = "is in the queue again" if done.returncode == 0 else f"could not be requeued: {done.returncode}"
    print(f"SLURM job {task} {said}", file=sys.stderr, flush=True)
