"""Kills runs and resumes each by `--ckpt_path last` to its end, which must be that of a run nobody killed.

A kill is SIGKILL before a file operation of a save, or SIGKILL or SIGTERM at a random moment. After each,
what has a final name must be whole, and an adapter its checkpoint's. At the end weights, optimizer, random
states, loss coefficients, logged metrics and completions of all launches must have the bits of the whole run.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import killed
import peft  # noqa: F401 - imported once here, not in every fork
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from killed import STEPS, Kind, Operations, final, lines_of, same
from measure import save, setting, table
from models import save_tiny

from grpo_lightning.checkpoints.adapter_io import adapter_folder, checkpoint_of
from grpo_lightning.errors import CheckpointError
from grpo_lightning.utils.atomic_files import STRAY
from grpo_lightning.utils.checked_files import read_seal, verify

KINDS = (
    Kind(accumulate=2, updates=2, loss="entropy"),
    Kind(lora=False, updates=2, loss="kl"),
    Kind(ranks=2, loss="kl"),
    Kind(),
    Kind(accumulate=2, loss="entropy"),
    Kind(lora=False),
    Kind(save_last="link"),
    Kind(lora=False, accumulate=2, updates=2, loss="kl"),
    Kind(updates=2, save_last="link", loss="entropy"),
    Kind(ranks=2, updates=2, accumulate=2, lora=False),
)
DISKS = (Path(tempfile.gettempdir()), Path("/dev/shm"))
WAYS = ("operation", "operation", "SIGKILL", "SIGTERM")
CLOCK = re.compile(r"time/|step_time|tokens_per_second")
OF_A_LAUNCH = re.compile(r"check/")
"""metrics of a process's first step"""
BOOKS = re.compile(r"/loops/\w+/epoch_progress/\w+/(ready|started)$")
"""how often Lightning began an epoch: once more if it is resumed at the end of one"""


class Whole:
    """What a run of one kind is when nobody kills it."""

    def __init__(self, model: str, kind: Kind, root: Path) -> None:
        runs = [root / "a", root / "b"]
        for run in runs:
            run.mkdir(parents=True)
            started = time.monotonic()
            codes = killed.wait(killed.launch(model, kind, run, 0, resume=False, operations=Operations()))
            self.seconds = time.monotonic() - started
            if any(codes):
                raise SystemExit(f"{kind}: {codes}\n{(run / '0-0.log').read_text()[-3000:]}")
        self.lines, other = ({(r["what"], r["step"]): r["values"] for r in _said(run)} for run in runs)
        clocks = {k for key, row in self.lines.items() for k in row if row[k] != other[key][k]}
        self.final = final(runs[0])
        if (wrong := same(self.final, final(runs[1]))) or not all(map(CLOCK.match, clocks)):
            raise SystemExit(f"{kind}: two whole runs differ: {wrong[:3]} {clocks}")
        log = [tuple(entry) for entry in json.loads((runs[0] / "operations.json").read_text())]
        self.operations: list[tuple[str, str]] = [(o, _without_numbers(n)) for o, n in log]
        ends = [i for i, (o, n) in enumerate(log) if (o, n) == ("rename", "last.ckpt")]
        self.saves = [range(a, b) for a, b in pairwise(ends)]
        """of all steps but the first and the last: the operations from one renaming of `last` to the next"""

    def differences(self, root: Path) -> tuple[list[str], int]:
        """Returns where a resumed run differs, and how many rows of metrics died unlogged."""
        wrong, seen = [d for d in same(self.final, final(root)) if not BOOKS.match(d)], set()
        for line in _said(root):
            key = (line["what"], line["step"])
            seen.add(key)
            if key not in self.lines:
                wrong.append(f"launch {line['launch']} {key} is not of the whole run")
                continue
            found, expected = _comparable(line["values"]), _comparable(self.lines[key])
            wrong += [f"launch {line['launch']} {key} {d}" for d in same(found, expected)]
        missing = self.lines.keys() - seen
        wrong += [f"no {key}" for key in missing if key[0] != "metrics"]
        return wrong, len(missing)


def _comparable(row: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in row.items() if not CLOCK.match(k) and not OF_A_LAUNCH.match(k)}


def _said(root: Path) -> list[dict[str, Any]]:
    return [line for line in lines_of(root) if line["what"] in {"samples", "metrics"}]


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "N", name.partition(".tmp-")[0] + (".tmp" if ".tmp-" in name else ""))


def look(root: Path) -> list[str]:
    """Returns what is wrong after a kill: halves under final names, adapters of other checkpoints."""
    wrong = []
    for file in (root / "ckpt").glob("*.ckpt"):
        if file.exists():  # a link may point to nothing for a moment
            try:
                verify(file)
            except CheckpointError as error:
                wrong.append(str(error))
    for adapter in (root / "ckpt").glob("*-adapter"):
        file = adapter.with_name(adapter.name.removesuffix("-adapter") + ".ckpt")
        seal = read_seal(file) if file.exists() else None
        if adapter.exists() and (seal is None or checkpoint_of(adapter) != seal.sha256):
            wrong.append(f"{adapter} is not the adapter of {file.name}")
    return wrong


class Soak:
    """Kills, and keeps the tally."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.root = Path(tempfile.mkdtemp(prefix="soak-"))
        self.model = save_tiny(self.root / "model")
        self.whole: dict[Kind, Whole] = {}
        self.kills, self.tally, self.at = 0, Counter[str](), Counter[str]()
        self.turn = Counter[Kind]()
        self.wrong: list[str] = []

    def chain(self, kind: Kind, disk: Path, most: int) -> None:
        """Runs, kills up to `most` times, resumes to the end, and compares."""
        if kind not in self.whole:
            name = "whole-" + "-".join(map(str, kind))
            self.whole[kind] = Whole(self.model, kind, self.root / name)
        root = Path(tempfile.mkdtemp(prefix="soak-", dir=disk))
        planned, number, before = min(most, self.random.choice([1, 2, 3])), 0, len(self.wrong)
        while not any(line["what"] == "end" for line in lines_of(root)) if number else True:
            newest = max(
                [int(f.stem[5:].partition("-")[0]) for f in root.glob("ckpt/step=*.ckpt")], default=0
            )
            died = self._launch(kind, disk, root, number, newest, kill=planned > 0)
            planned -= died
            self._check(kind, root, number, newest)
            number += 1
            if number > 12:
                self.wrong.append(f"{kind} never ended: {root}")
                break
        else:
            found, unlogged = self.whole[kind].differences(root)
            self.wrong += [f"{kind} {root}: {f}" for f in found[:5]]
            self.tally["metric rows that died unlogged"] += unlogged
            self.tally["runs resumed to their end"] += 1
            strays = [p.name for p in (root / "ckpt").iterdir() if STRAY.match(p.name)]
            bare = [f for f in root.glob("ckpt/*.ckpt") if kind.lora and not adapter_folder(f).exists()]
            self.wrong += [f"{kind} {root}: left {x}" for x in [*strays, *bare]]
        if len(self.wrong) == before:
            shutil.rmtree(root)

    def _launch(self, kind: Kind, disk: Path, root: Path, number: int, newest: int, kill: bool) -> bool:
        """Returns whether the launch was killed before its end."""
        whole, way = self.whole[kind], self.random.choice(WAYS)
        operations = None
        if kill and way == "operation":
            # In strides, so that all operations of a save are met; but most writes are alike.
            save_of = whole.saves[self.random.randrange(max(1, len(whole.saves) - newest))]
            steps = [i for i in save_of if whole.operations[i][0] != "write" or self.random.random() < 0.02]
            operations = Operations(kill_at=steps[self.turn[kind] * 17 % len(steps)])
            self.turn[kind] += 1
        pids = killed.launch(self.model, kind, root, number, resume=number > 0, operations=operations)
        if kill and operations is None:
            time.sleep(self.random.uniform(0.05, 1.0) * whole.seconds)
            victims = self.random.choice([pids, pids[:1], pids[-1:]])
            for pid in victims:
                os.kill(pid, signal.Signals[way])
        codes = killed.wait(pids)
        if not kill:
            self.wrong += [f"{kind} {root}: launch {number} ended with {codes}"] if any(codes) else []
            return False
        if any(line["what"] == "end" and line["launch"] == number for line in lines_of(root)):
            self.tally["too late"] += 1
            return False
        self.kills += 1
        self.tally[f"by {way}"] += 1
        self.tally[f"on {disk}"] += 1
        self.tally[" ".join(f"{k}={v}" for k, v in kind._asdict().items())] += 1
        self.tally["while resuming or after"] += number > 0
        if operations is not None and number == 0:
            self.at[" ".join(whole.operations[operations.kill_at or 0])] += 1
        return True

    def _check(self, kind: Kind, root: Path, number: int, newest: int) -> None:
        self.wrong += [f"{kind} {root}: after launch {number}: {w}" for w in look(root)]
        for line in lines_of(root):
            start = line["what"] == "start" and line["launch"] == number
            if start and line["values"]["from"] != newest:
                self.wrong.append(f"{kind} {root}: resumed from {line['values']['from']}, not {newest}")
        self.tally["strays left by kills"] += len([p for p in root.glob("ckpt/.*") if STRAY.match(p.name)])


def main(argv: list[str] | None = None) -> Soak:
    """Returns the soak, after it printed its tally."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", type=int, default=len(KINDS), help="how many of the kinds of runs")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result")
    args = parser.parse_args(argv)
    soak, started, i = Soak(args.seed), time.monotonic(), 0
    while soak.kills < args.kills:
        kind, disk = KINDS[i % args.kinds], DISKS[i // args.kinds % len(DISKS)]
        soak.chain(kind, disk, most=args.kills - soak.kills)
        i += 1
        if i % 10 == 0 or soak.kills >= args.kills:
            minutes = (time.monotonic() - started) / 60
            print(f"{soak.kills} kills, {minutes:.1f} min, {len(soak.wrong)} differences", flush=True)
            result = {"kills": soak.kills, "steps": STEPS, "minutes": round(minutes, 1), "seed": args.seed}
            counts = {"tally": dict(sorted(soak.tally.items())), "operations": dict(sorted(soak.at.items()))}
            versions = setting(torch.device("cpu"))
            save(
                "soak" if args.seed == 0 else f"soak-{args.seed}",
                {**versions, **result, "differences": soak.wrong, **counts},
                args.out,
            )
    print(
        table(("kills", "count"), soak.tally.items()),
        table(("killed before", "count"), soak.at.items()),
        sep="\n\n",
    )
    print(*soak.wrong, f"{soak.kills} kills, {len(soak.wrong)} differences", sep="\n")
    shutil.rmtree(soak.root, ignore_errors=True)
    return soak


if __name__ == "__main__":
    sys.exit(bool(main().wrong))
