"""`SampleTable`: what the model wrote, on the screen and on disk."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from grpo_lightning.errors import ConfigError, hinted
from grpo_lightning.types import PromptBatch
from grpo_lightning.utils.telemetry import BestEffort


@hinted
class SampleTable(Callback):
    """Prints a table of sampled completions and writes all of them to parquet.

    Args:
        every_n_steps: optimizer steps between two tables.
        rows: completions per table: best and worst of each prompt by reward, then the others.
        unique_prompts: show each prompt once, with its best completion.
        width: characters of a prompt or completion that are shown.
        folder: where completions-<step>.parquet files go, inside trainer.default_root_dir; null writes none.
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        rows: int = 4,
        unique_prompts: bool = False,
        width: int = 60,
        folder: str | None = "completions",
    ) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"SampleTable.every_n_steps is {every_n_steps}; it must be at least 1")
        self.every_n_steps, self.rows, self.unique_prompts = every_n_steps, rows, unique_prompts
        self.width, self.folder = width, folder
        self._shown, self._written = BestEffort("SampleTable"), BestEffort("SampleTable")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Shows the rollout that the step just made was trained on."""
        last = isinstance(batch, PromptBatch) and batch.micro_batch + 1 == batch.micro_batches
        if not last or not batch.samples or trainer.global_step % self.every_n_steps:
            return
        step = trainer.global_step
        if self.folder is not None:
            path = Path(trainer.default_root_dir, self.folder)
            path /= f"completions-{step:06d}-rank{trainer.global_rank}.parquet"
            with self._written.attempt(f"write {path}", "without that file"):
                write_samples(path, batch.samples)
        if trainer.is_global_zero:
            with self._shown.attempt("print samples", "without that table"):
                show(f"step {step}", batch.samples, self.rows, self.width, self.unique_prompts)


def write_samples(path: Path, samples: Mapping[str, Sequence[Any]]) -> None:
    """Writes samples to parquet; columns of several types, which it does not take, as text, and says so."""
    import pyarrow as pa

    from grpo_lightning.engines.replay import write_parquet

    columns = dict(samples)
    for name, values in samples.items():
        try:
            pa.array(values)
        except pa.ArrowException:
            columns[name] = [None if v is None else str(v) for v in values]
            # The text never changes, so that Python shows it once per run.
            warnings.warn(
                f"SampleTable writes column {name!r} as text: parquet takes no values of several types, nor "
                "arbitrary objects",
                stacklevel=2,
            )
    write_parquet(path, columns)


def show(
    title: str, samples: Mapping[str, Sequence[Any]], rows: int, width: int, unique: bool = False
) -> None:
    """Prints up to `rows` samples; numbers to three digits, texts cut to `width` characters."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in samples:
        table.add_column(name, justify="left" if name in ("prompt", "completion") else "right")
    for i in _chosen(samples["prompt"], samples["reward"], rows, unique):
        table.add_row(*(_cell(samples[name][i], width) for name in samples))
    Console().print(table)


def _chosen(prompts: Sequence[str], rewards: Sequence[float], rows: int, unique: bool) -> list[int]:
    """Returns which are shown: best and worst of each prompt, or the best alone; then the others."""
    of_prompt: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        of_prompt.setdefault(prompt, []).append(i)
    first: list[int] = []
    for members in of_prompt.values():
        scored = [i for i in members if rewards[i] == rewards[i]] or members
        best, worst = max(scored, key=rewards.__getitem__), min(reversed(scored), key=rewards.__getitem__)
        first += [best] if unique or best == worst else [best, worst]
    rest = [] if unique else [i for i in range(len(prompts)) if i not in first]
    return [*first, *rest][:rows]


def _cell(value: Any, width: int) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    text = repr(str(value))[1:-1].replace("[", r"\[")
    return text if len(text) <= width else "…" + text[-(width - 1) :]
