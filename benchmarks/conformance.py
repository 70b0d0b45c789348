"""Our losses beside TRL's and Liger's own code, on the same numbers. One page, one JSON file.

    python -m venv .venv-peers
    .venv-peers/bin/python -m pip install -c constraints/cpu.txt -c constraints/peers.txt trl liger-kernel
    .venv-peers/bin/python benchmarks/conformance.py

Value and gradient of every combination of options, the logged metrics, and the advantages. Ends with 1 where
a difference has no reason in peers/verdicts.py, or a reason has no difference. The peers are no dependency of
the package, and this environment needs neither lightning nor a GPU.
"""

from __future__ import annotations

import datetime
import logging
import math
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout's own package, not an installed one

import torch
from peers import liger_loss, page, trl_loss
from peers.cases import GROUP, PROMPTS, Case, covering_seeds, random_case
from peers.cells import Cell, extras, grid
from peers.ours import our_loss
from peers.verdicts import (
    ADVANTAGE_REASONS,
    LIGER_REASONS,
    METRIC_REASONS,
    TRL_REASONS,
    Reason,
    Row,
    judge,
)

from grpo_lightning.advantages import RewardTable, compute_advantages
from grpo_lightning.errors import ConfigError

HERE = Path(__file__).parent
T = TypeVar("T")
EXACT, SINGLE = 1e-6, 1e-5
"""largest difference that is called equal, in float64 and in float32; relative above 1"""
ROWS = range(PROMPTS * GROUP)
HALVES = [list(ROWS[:8]), list(ROWS[8:])]
PARTS = [list(ROWS[:3]), list(ROWS[3:10]), list(ROWS[10:])]


@dataclass(frozen=True)
class Split:
    """How a rollout is cut: by TRL into micro-batches and optimizer steps, by us into `rows`."""

    name: str
    micro_batches: int
    optimizer_steps: int
    rows: list[list[int]]


SPLITS = (
    Split("whole", 1, 1, [list(ROWS)]),
    Split("halves", 2, 1, HALVES),
    Split("other parts", 2, 1, PARTS),
    Split("two steps", 1, 2, HALVES),
)


def gap(ours: Any, theirs: Any) -> float:
    """Returns the largest difference, relative to the peer's number where that is above 1."""
    a, b = torch.as_tensor(ours, dtype=torch.float64), torch.as_tensor(theirs, dtype=torch.float64)
    out = ((a - b).abs() / b.abs().clamp(min=1)).max().item()
    return out if math.isfinite(out) else math.inf  # NaN would get lost in a maximum


def accepted(build: Callable[[], T], error: type[Exception]) -> T | None:
    """Returns what is built, or None where the combination of options is an error."""
    try:
        return build()
    except error:
        return None


def compare_trl(cell: Cell, cases: list[Case], metrics: dict[tuple[Cell, str], float]) -> list[Row]:
    """Returns one row per split; adds the differences of the metrics of the whole."""
    config = accepted(cell.ours, ConfigError)
    rows: list[Row] = []
    for split in SPLITS:
        if split.optimizer_steps > 1 and not cell.extra.optimizer_steps:
            continue
        build = partial(trl_loss.trainer, cell.trl(), split.micro_batches, split.optimizer_steps)
        peer, row = accepted(build, ValueError), Row(cell, split.name)
        rows.append(row)
        if peer is None or config is None:
            by = [name for name, side in (("TRL", peer), ("us", config)) if side is None]
            row.refused_by = " and ".join(by)
            continue
        for case in map(cell.extra.change, cases):
            b = trl_loss.trl_loss(peer, case)
            a = our_loss(case, config, split.rows, split.optimizer_steps)
            row.value = max(row.value, gap(a.value, b.value))
            row.grad = max(row.grad, gap(a.grad, b.grad), gap(a.entropy_grad, b.entropy_grad))
            for name in a.metrics.keys() & b.metrics.keys() if split.name == "whole" else ():
                seen = gap(a.metrics[name], b.metrics[name])
                metrics[cell, name] = max(metrics.get((cell, name), 0.0), seen)
    return rows


def compare_liger(cell: liger_loss.LigerCell, problems: list[liger_loss.Problem]) -> tuple[Row, float]:
    """Returns the row and the largest gradient that Liger gives to padding."""
    row, padding = Row(cell, "whole"), 0.0
    for p in problems:
        try:
            value, grad, noise = liger_loss.theirs(p, cell)
        except ValueError:
            return Row(cell, "whole", refused_by="Liger"), 0.0
        mine = liger_loss.ours(p, cell)
        row.value, row.grad = max(row.value, gap(mine[0], value)), max(row.grad, gap(mine[1], grad))
        padding = max(padding, noise)
    return row, padding


@dataclass(frozen=True)
class AdvantageCell:
    """One way to compute advantages, on one table of rewards, in one width."""

    row: str
    table: str
    width: str

    @property
    def name(self) -> str:
        """What is printed where it fails."""
        return f"{self.row}, {self.table}, {self.width}"


SCALED = {
    "group_norm": {"scale_rewards": "group"},
    "batch_norm": {"scale_rewards": "batch"},
    "group_mean": {"scale_rewards": "none"},
    "gdpo": {"multi_objective_aggregation": "normalize_then_sum"},
}


def reward_tables() -> dict[str, torch.Tensor]:
    """Returns rewards [S, 2] with all that can be missing; what is equal has a mean that float32 rounds."""
    g = torch.Generator().manual_seed(0)
    mixed = torch.rand(len(ROWS), 2, generator=g, dtype=torch.float64) * 3
    mixed[4:8] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 2.0]])
    mixed[9, 1] = mixed[14, 0] = torch.nan
    mixed[13] = torch.nan
    equal, alone = mixed.clone(), mixed.clone()
    equal[8:11] = torch.tensor([2.9, 0.5])
    equal[11] = torch.nan
    alone[12:15] = torch.nan
    return {"mixed rewards": mixed, "equal rewards": equal, "one scorable member": alone}


def compare_advantages(case: Case) -> list[Row]:
    """Returns one row per advantage, table and width of TRL's numbers; ours are computed in float64."""
    weights, out = [1.0, 0.5], []
    for row, options in SCALED.items():
        peer = trl_loss.trainer({**options, "reward_weights": weights})
        for table, rewards in reward_tables().items():
            for width in (torch.float64, torch.float32):
                given = rewards.to(width)
                with trl_loss.default(width):
                    theirs = trl_loss.score(peer, case, given)["advantages"]
                mine = compute_advantages(
                    row,
                    RewardTable(
                        by_function=given.double(),
                        weights=torch.tensor(weights, dtype=torch.float64),
                        group_ids=torch.arange(len(ROWS)) // GROUP,
                        num_groups=PROMPTS,
                    ),
                )
                cell = AdvantageCell(row, table, str(width).removeprefix("torch."))
                out.append(judge(Row(cell, "", value=gap(mine, theirs)), ADVANTAGE_REASONS, SINGLE))
    return out


def stale(reasons: Iterable[Reason], rows: Iterable[Row]) -> list[str]:
    """Returns the reasons that explain nothing."""
    used = {key for row in rows for key in row.reasons}
    return [r.key for r in reasons if r.key not in used]


def versions() -> dict[str, str]:
    """Returns what the numbers depend on."""
    names = ("torch", "trl", "transformers", "accelerate", "liger-kernel")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def cpu() -> str:
    """Returns the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return platform.processor()


def main() -> int:
    logging.disable(logging.WARNING)  # TRL warns about combinations that are here on purpose
    torch.set_num_threads(1)  # tensors of a few numbers
    began, seeds = time.perf_counter(), covering_seeds(3)
    cases = [random_case(seed) for seed in seeds]
    cells, metrics, trl_rows = [*grid(), *extras()], dict[tuple[Cell, str], float](), list[Row]()
    for i, cell in enumerate(cells):
        if i % 50 == 0:
            print(f"TRL: {i} of {len(cells)} cells, {time.perf_counter() - began:.0f} s", flush=True)
        trl_rows += [judge(row, TRL_REASONS, EXACT) for row in compare_trl(cell, cases, metrics)]
    metric_rows = [
        judge(Row(x, name, value=v), METRIC_REASONS, EXACT, each=False) for (x, name), v in metrics.items()
    ]
    advantage_rows = compare_advantages(cases[0])
    problems, liger_rows, padding = [liger_loss.problem(case) for case in cases], list[Row](), Counter[str]()
    for i, cell in enumerate(liger_loss.liger_cells()):
        if i % 100 == 0:
            print(f"Liger: {i} cells, {time.perf_counter() - began:.0f} s", flush=True)
        row, noise = compare_liger(cell, problems)
        liger_rows.append(judge(row, LIGER_REASONS, SINGLE))
        padding[cell.loss] = max(padding[cell.loss], noise)
    outcome = page.Outcome(
        date=datetime.date.today().isoformat(),
        device=cpu(),
        versions=versions(),
        seeds=seeds,
        seconds=round(time.perf_counter() - began),
        trl=trl_rows,
        metrics=metric_rows,
        advantages=advantage_rows,
        liger=liger_rows,
        liger_padding_gradient=dict(padding),
    )
    return report(outcome)


def report(outcome: page.Outcome) -> int:
    """Writes the page and the record, prints the short table and what failed; returns the exit status."""
    file = HERE / "results" / f"conformance-{outcome.date}.json"
    file.write_text(outcome.record())
    target = HERE.parent / "docs" / "conformance.md"
    target.write_text(outcome.page(file.name))
    print("\n".join(["", *outcome.summary()]))
    print(f"written {file} and {target}")
    unused = [
        *stale(TRL_REASONS, outcome.trl),
        *stale(METRIC_REASONS, outcome.metrics),
        *stale(ADVANTAGE_REASONS, outcome.advantages),
        *stale(LIGER_REASONS, outcome.liger),
    ]
    failed = outcome.failed()
    print("\n".join([*page.failures(failed), *(f"- stale reason: {key} explains no cell" for key in unused)]))
    return 1 if failed or unused else 0


if __name__ == "__main__":
    sys.exit(main())
