"""Does a long run keep its size? Memory, file handles and threads of 1,000 steps of a tiny model.

    python tests/flat.py [--steps 1000]

The run has what long runs have: logger, sample tables, recordings, checkpoints, validation, alarms. It is
flat if, after a warm-up, the number of file handles and threads does not grow, and resident memory by less
than `GROWTH` MiB: the median of the last tenth against that of the tenth after the warm-up.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

GROWTH = 16.0
"""MiB"""
WARM_UP = 0.2
"""share of the steps"""
PAGE = os.sysconf("SC_PAGE_SIZE") / 2**20


class Watch(Callback):
    """Notes what the process holds at the end of every optimizer step."""

    def __init__(self) -> None:
        self.columns: dict[str, list[float]] = {"rss_mib": [], "handles": [], "threads": []}

    def on_train_batch_end(self, *_: Any) -> None:
        """Reads /proc."""
        rss = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
        found = (rss, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))
        for values, value in zip(self.columns.values(), found, strict=True):
            values.append(round(value, 2))


def run(folder: str, root: Path, steps: int) -> dict[str, list[float]]:
    """Returns rss, handles and threads of every step of a run in `root` with the model in `folder`."""
    from fits import data, module, rollout, trainer

    from grpo_lightning.callbacks import Health, SampleTable

    watch = Watch()
    saver = ModelCheckpoint(root / "checkpoints", every_n_train_steps=10, save_last=True)
    t = trainer(
        root,
        rollout(record_to=str(root / "record")),
        Health(),
        SampleTable(every_n_steps=20),
        saver,
        watch,
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=25,
        check_val_every_n_epoch=None,
    )
    t.fit(module(folder), data(validation_split=3))
    return watch.columns


def judge(columns: dict[str, list[float]]) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """Returns (after the warm-up, at the end) by column, and the columns that grew."""
    found, grew = {}, []
    for name, values in columns.items():
        first = int(WARM_UP * len(values))
        tenth = max(len(values) // 10, 1)
        early, late = values[first : first + tenth], values[-tenth:]
        found[name] = (median(early), median(late)) if name == "rss_mib" else (max(early), max(late))
        if found[name][1] > found[name][0] + (GROWTH if name == "rss_mib" else 0):
            grew.append(name)
    return found, grew


def main() -> int:
    """Runs, prints and writes the result; 1 if something grew."""
    from measure import save, setting
    from models import save_tiny

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="folder of the result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        columns = run(save_tiny(Path(root, "model")), Path(root, "run"), options.steps)
    found, grew = judge(columns)
    for name, (early, late) in found.items():
        print(f"{name}: {early:g} after the warm-up, {late:g} at the end")
    sampled = {name: values[:: max(options.steps // 100, 1)] for name, values in columns.items()}
    result = {"setting": setting(torch.device("cpu")), "steps": options.steps, "found": found, "grew": grew}
    print(save("flat", {**result, "sampled": sampled}, options.out))
    return bool(grew)


if __name__ == "__main__":
    sys.exit(main())
