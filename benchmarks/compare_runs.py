"""A run beside the same run that was ended and resumed: every logged value of one with that of the other.

    python benchmarks/compare_runs.py whole/metrics.csv ended/metrics.csv resumed/metrics.csv --out $OUT

Takes what Lightning's CSVLogger wrote with `--trainer.log_every_n_steps 1`. Fails if a value differs.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

from measure import RESULTS, save, table

CLOCKS = ("step_time", "time/", "tokens_per_second", "memory/", "check/", "graphs/")
"""beginnings of the names that say how long or how much, or that a resumed run logs anew"""
CURVES = {
    "reward": "reward",
    "correct": "rewards/math_answer/mean",
    "seconds": "step_time",
    "parity": "sampling/parity_mean",
}
HELD_OUT = "val/rewards/math_answer/mean"
Rows = list[dict[str, str]]


def read(file: Path) -> Rows:
    """Returns the rows of a log."""
    with file.open() as lines:
        return list(csv.DictReader(lines))


def places(rows: Rows) -> dict[tuple[str, bool], dict[str, str]]:
    """Returns the rows of training and of validation by their step."""
    return {(r["step"], bool(r.get(HELD_OUT))): r for r in rows}


def compare(one: Rows, other: Rows) -> dict[str, Any]:
    """Returns how many values of the steps that both have were compared, and which differ."""
    theirs, compared, different = places(other), 0, []
    for place, row in places(one).items():
        for name in row if place in theirs else ():
            if name.startswith(CLOCKS):
                continue
            compared += 1
            if row[name] != theirs[place].get(name, ""):
                different.append(f"{name} at {place[0]}: {row[name]}, {theirs[place].get(name)}")
    return {"values": compared, "different": len(different), "first": different[:5]}


def curves(rows: Rows) -> dict[str, Any]:
    """Returns what was learned: by step, and on held-out problems."""
    steps = [r for r in rows if r.get("reward")]
    found: dict[str, Any] = {"first_step": int(steps[0]["step"])}
    for name, column in CURVES.items():
        found[name] = [round(float(r[column]), 6) for r in steps if r.get(column)]
    found["held_out"] = [(int(r["step"]), round(float(r[HELD_OUT]), 6)) for r in rows if r.get(HELD_OUT)]
    return found


def main() -> None:
    """Compares, writes the result and prints a table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("whole", type=Path)
    options.add_argument("others", type=Path, nargs="+")
    options.add_argument("--name", default="compared-runs")
    options.add_argument("--like", type=Path, help="a result of the same machine and day, for its setting")
    options.add_argument("--out", type=Path, default=RESULTS)
    args = options.parse_args()
    whole = read(args.whole)
    others = {file.parent.name: read(file) for file in args.others}
    equal = {name: compare(whole, rows) for name, rows in others.items()}
    result: dict[str, Any] = {"setting": json.loads(args.like.read_text())["setting"]} if args.like else {}
    result |= {"equal": equal, "whole": curves(whole)}
    result |= {name: {"held_out": curves(rows)["held_out"]} for name, rows in others.items()}
    save(args.name, result, args.out)
    cells = [[name, r["values"], r["different"], *r["first"][:1]] for name, r in equal.items()]
    print(table(("run", "values compared", "different", "first"), [[*c, ""][:4] for c in cells]))
    if any(r["different"] or not r["values"] for r in equal.values()):
        sys.exit("the runs are not one run")


if __name__ == "__main__":
    main()
