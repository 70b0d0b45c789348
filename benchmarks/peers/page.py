"""The record and the page of conformance.py."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from peers.cells import LEVELS, LOSSES
from peers.verdicts import ADVANTAGE_REASONS, LIGER_REASONS, METRIC_REASONS, TRL_REASONS, Reason, Row

INTRO = """\
# Conformance with TRL and Liger

Written by `python benchmarks/conformance.py` on {date}; raw numbers: `benchmarks/results/{file}`.
{versions}; {device}; seeds {seeds}; {seconds} s.

{verdict}

## What is compared, and how

- The same random rollout goes through the peer's own code and through ours: 4 prompts with 4 completions of
  1 to 13 tokens, advantages of both signs and 0, ratios beyond every bound on both sides, sampler
  log-probabilities that make every correction act on some tokens and completions and not on others. Padded
  there, with noise in the padding; packed here. Every difference is the largest over the seeds; above 1 it
  is relative.
- **TRL**: a `GRPOTrainer` from TRL's own constructor and `GRPOConfig`. Three methods are replaced, because
  they need a model, an engine or reward functions: what is sampled, what a forward returns, what the rewards
  are. Its own `_generate_and_score_completions` makes padding, masks, importance weights and, for their own
  table, advantages; its own `_compute_loss` the loss, the gradient and the metrics. No formula of TRL's is
  typed again. The gradient is that with respect to each token's log-probability, and 0 is demanded of the
  padding. All in float64; equal means at most 1e-6 apart.
- **Liger**: `LigerFusedLinearGRPOLoss` (not compiled) on hidden states and a head; ours is
  `fused_linear_logprobs` and `policy_loss`. The gradient is that with respect to the hidden states. In
  float32, which is what Liger computes in; equal means at most 1e-5 apart.
- TRL's defaults on both sides: clip 0.2 / 0.2, correction bounded above by 3; `cispo` is capped at 5
  (absolute).
- A difference counts as documented only if a reason below names the cell; a reason whose cell does not
  differ fails.
"""


@dataclass
class Outcome:
    """All rows of one run."""

    date: str
    device: str
    versions: dict[str, str]
    seeds: list[int]
    seconds: int
    trl: list[Row]
    metrics: list[Row]
    advantages: list[Row]
    liger: list[Row]
    liger_padding_gradient: dict[str, float]
    """of each loss, the largest gradient that Liger gives to a padded position"""

    def failed(self) -> list[Row]:
        """Returns what has a difference and no reason, or a reason and no difference."""
        return [r for rows in (self.trl, self.metrics, self.advantages, self.liger) for r in rows if r.fails]

    def record(self) -> str:
        """Returns the JSON file, one cell a line; of the metrics, those that differ."""
        head = {k: getattr(self, k) for k in ("date", "device", "versions", "seeds", "seconds")}
        head |= {"dtype": {"trl": "float64", "liger": "float32"}}
        head |= {"liger_padding_gradient": self.liger_padding_gradient, "columns": COLUMNS}
        cells: dict[str, dict[str, Any]] = {}
        for r in self.trl:
            cells.setdefault(r.what.name, {"cell": r.what.name})[r.split] = _plain(r)
        for r in self.metrics:
            if r.verdict != "equal":
                cells[r.what.name].setdefault("metrics", {})[r.split] = _plain(r)
        tables = {
            "trl": list(cells.values()),
            "advantages": [{"cell": r.what.name, "whole": _plain(r)} for r in self.advantages],
            "liger": [{"cell": r.what.name, "whole": _plain(r)} for r in self.liger],
        }
        parts = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in head.items()]
        for key, table in tables.items():
            rows = [f"  {json.dumps(row, ensure_ascii=False)}" for row in table]
            parts.append(f" {json.dumps(key)}: [\n" + ",\n".join(rows) + "\n ]")
        return "{\n" + ",\n".join(parts) + "\n}\n"

    def summary(self) -> list[str]:
        """Returns the short table for the terminal."""
        sections = {
            "TRL, the 256 cells": [r for r in self._grid("whole") if r.what.mode],
            "TRL, no correction": [r for r in self._grid("whole") if not r.what.mode],
            **{f"TRL, {s}": self._grid(s) for s in ("halves", "other parts", "two steps")},
            "TRL, other options": [r for r in self.trl if r.what.extra.name],
            "TRL, metrics": self.metrics,
            "TRL, advantages": self.advantages,
            "Liger": self.liger,
        }
        head = ("compared", "rows", "equal", "documented", "refused", "failed")
        lines = [f"{head[0]:<22}" + "".join(f"{h:>12}" for h in head[1:])]
        for name, rows in sections.items():
            lines.append(f"{name:<22}" + "".join(f"{n:>12}" for n in (len(rows), *_counts(rows))))
        return lines

    def page(self, file: str) -> str:
        """Returns docs/conformance.md."""
        failed = self.failed()
        intro = INTRO.format(
            date=self.date,
            file=file,
            versions=", ".join(f"{k} {v}" for k, v in self.versions.items()),
            device=self.device,
            seeds=", ".join(map(str, self.seeds)),
            seconds=self.seconds,
            verdict=f"**{len(failed)} comparisons fail; see the end.**"
            if failed
            else "Every difference has a reason.",
        )
        rows = [*self.trl, *self.metrics, *self.advantages, *self.liger]
        reasons = (*TRL_REASONS, *METRIC_REASONS, *ADVANTAGE_REASONS, *LIGER_REASONS)
        parts = [intro, *self._trl(), *self._others(), *self._liger(), *_departures(reasons, rows)]
        if failed:
            parts += ["## Fails", "", *failures(failed), ""]
        return "\n".join(parts).rstrip() + "\n"

    def _grid(self, split: str) -> list[Row]:
        return [r for r in self.trl if r.split == split and not r.what.extra.name]

    def _trl(self) -> list[str]:
        whole = self._grid("whole")
        cuts = {
            "whole": "one micro-batch on both sides",
            "halves": "two micro-batches, the same on both sides; losses and gradients added up",
            "other parts": "two micro-batches in TRL, three others here",
            "two steps": "one rollout for two optimizer steps",
        }
        lines = ["## TRL: value and gradient", ""]
        lines += [
            "Per loss and `importance_sampling_level`: `beta` 0 and 0.04, `delta` none and 4, and the four "
            "`vllm_importance_sampling_mode`s",
            "(256 cells) or no correction (64 more). One micro-batch, which is the whole optimizer step.",
            "",
        ]
        lines += _by_loss(whole)
        lines += ["", "The same cells with the rollout cut:", ""]
        lines += _table(cuts, lambda s: self._grid(s), first="cut", label=lambda s: cuts[s])
        lines += ["", "Options outside the grid, each for every loss that has it and for every cut:", ""]
        names = dict.fromkeys(r.what.extra.name for r in self.trl if r.what.extra.name)
        lines += _table(
            names,
            lambda n: [r for r in self.trl if r.what.extra.name == n],
            first="option",
            label=lambda n: n,
        )
        return [*lines, ""]

    def _others(self) -> list[str]:
        names = sorted({r.split for r in self.metrics})
        lines = [
            "## TRL: metrics",
            "",
            "Where both log the same name; one micro-batch, all cells and options.",
            "",
        ]
        lines += _table(
            names,
            lambda n: [r for r in self.metrics if r.split == n],
            first="metric",
            label=lambda n: f"`{n}`",
        )
        lines += ["", "## TRL: advantages", ""]
        lines += [
            "Two weighted rewards, some missing; ours in float64, TRL's in float64 and in its own float32.",
            "",
        ]
        lines += [
            "| `rollout.advantage` | rewards | TRL in | difference | verdict |",
            "|---|---|---|---|---|",
        ]
        for r in self.advantages:
            verdict = ", ".join([r.verdict, *r.reasons])
            lines.append(f"| `{r.what.row}` | {r.what.table} | {r.what.width} | {r.value:.0e} | {verdict} |")
        return [*lines, ""]

    def _liger(self) -> list[str]:
        lines = ["## Liger: value and gradient", ""]
        lines += [
            "Per loss and level: `beta` 0 and 0.04, `delta` none and 4, `use_bias_correction_kl` off and on, "
            "`vllm_is_ratio` none, per",
            "token and per completion.",
            "",
            *_by_loss(self.liger),
            "",
        ]
        noisy = [f"`{loss}` (up to {x:.0e})" for loss, x in self.liger_padding_gradient.items() if x]
        lines += [f"Losses in which padding gets a gradient: {', '.join(noisy) or 'none'}.", ""]
        return lines


COLUMNS = ("value", "gradient", "verdict", "reasons")


def _plain(row: Row) -> list[Any]:
    """Returns `COLUMNS`; no differences where one side refuses, no reasons where there are none."""
    numbers = [None, None] if row.refused_by else [float(f"{x:.1e}") for x in (row.value, row.grad)]
    return [*numbers, row.verdict, *([row.reasons] if row.reasons else [])]


def _counts(rows: Iterable[Row]) -> tuple[int, int, int, int]:
    """Returns how many are equal, documented, refused, failed."""
    seen = Counter("failed" if r.fails else r.verdict.split()[0] for r in rows)
    return seen["equal"], seen["documented"], seen["refused"], seen["failed"]


def _largest(rows: Sequence[Row]) -> str:
    return f"{max(r.value for r in rows):.0e} / {max(r.grad for r in rows):.0e}" if rows else "–"


def _cells(rows: Sequence[Row]) -> str:
    """Returns the counts and the largest differences as columns of a table."""
    equal = [r for r in rows if r.verdict == "equal"]
    other = [r for r in rows if r.verdict == "documented"]
    counts = " | ".join(str(n) if n else "–" for n in _counts(rows))
    keys = ", ".join(dict.fromkeys(k for r in rows for k in r.reasons))
    return f"{len(rows)} | {counts} | {_largest(equal)} | {_largest(other)} | {keys or '–'}"


HEAD = "rows | equal | documented | refused | failed | where equal | where documented | reasons |"


def _table(
    keys: Iterable[str], rows: Callable[[str], Sequence[Row]], *, first: str, label: Callable[[str], str]
) -> list[str]:
    """Returns a table with a line per key; differences are value / gradient."""
    lines = [f"| {first} | {HEAD}", "|---" * 9 + "|"]
    return lines + [f"| {label(key)} | {_cells(rows(key))} |" for key in keys]


def _by_loss(rows: Sequence[Row]) -> list[str]:
    keys = {f"`{loss}`, {level}": (loss, level) for loss in LOSSES for level in LEVELS}
    return _table(
        keys,
        lambda k: [r for r in rows if (r.what.loss, r.what.level) == keys[k]],
        first="loss, level",
        label=lambda k: k,
    )


def _departures(reasons: Sequence[Reason], rows: Sequence[Row]) -> list[str]:
    lines = ["## Departures", "", "Each with the rows it explains, and where this is said to users.", ""]
    for r in reasons:
        count = sum(r.key in row.reasons for row in rows)
        place = "written down here only"
        if r.where:
            place = f"[losses.md, {r.where}](losses.md#{r.where.lower().replace(' ', '-')})"
        lines.append(f"- **{r.key}** ({r.shows}; {count} rows; {place}): {r.text}")
    return [*lines, ""]


def failures(rows: Sequence[Row]) -> list[str]:
    """Returns a line per kind of failure, with its worst row."""
    kinds: dict[tuple[str, str, str], list[Row]] = {}
    for r in rows:
        place = "loss" if r.split in ("whole", "halves", "other parts", "two steps") else r.split
        kinds.setdefault((r.verdict, place, r.refused_by), []).append(r)
    out = []
    for (verdict, place, refused), found in kinds.items():
        worst = max(found, key=lambda r: max(r.value, r.grad))
        what = (
            f"refused by {refused} alone"
            if refused
            else f"value {worst.value:.1e}, gradient {worst.grad:.1e}"
        )
        out.append(
            f"- {verdict}: {place or 'advantage'}, {len(found)} rows, such as {worst.what.name} ({what})"
        )
    return out
