"""What `rollout.record_to` asks for: a parquet file of each rollout; a failure to write it ends no run."""

from pathlib import Path

import lightning.pytorch as pl

from grpo_lightning.engines.replay import record
from grpo_lightning.rollout.collector import Rollout
from grpo_lightning.utils.telemetry import BestEffort


class Recorder:
    """Writes rollouts for `ReplayEngine`.

    Args:
        folder: null writes none.
    """

    def __init__(self, folder: str | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._writes = BestEffort("rollout.record_to")

    def write(self, trainer: pl.Trainer, rollout: Rollout) -> None:
        """Writes this rank's rollout."""
        if self.folder is not None:
            with self._writes.attempt(f"write to {self.folder}", "without that rollout's file"):
                record(self.folder, trainer.global_rank, rollout.requests, rollout.completions)
