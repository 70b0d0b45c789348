"""A shipped run beside TRL's trainer with its colocated vLLM: steps, start, memory, what is learned.

    python benchmarks/bench_learning.py --trl-python python --steps 150 --limit 200 --out $OUT

Each side trains the same model on the same prompts with the same sizes, in a process of its own, one after
the other. A side ends at `--steps`, TRL after `--limit` seconds of training too; one that takes `--grace`
seconds more is ended. The result is written after each side, with what a failed one had got to. TRL's
settings are those its documentation names for one GPU. On a CPU TRL decodes with transformers.

`--seed N` runs both sides with another seed. One command at a time: engines that start on one GPU at the same
moment disturb each other's measurement of its memory.
"""

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cpu_step import HERE, job_of
from measure import save, setting, table

from grpo_lightning.cli.main import load_config

CACHES = ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
PHASES = ("sync", "generate", "reward", "score", "rollout", "train")
SIDES = ("ours", "compiled", "asleep", "HF", "TRL")
"""ours, the engine awake all the time, as TRL's is; one that vLLM compiles; one asleep while training;
without vLLM; TRL"""
STEADY = (5, 60)
"""steps, from 1, of which mean and median are compared"""
COMPILED = {"compilation_config": {"mode": 3, "cudagraph_mode": "FULL_AND_PIECEWISE"}}
FLAGS = {
    "ours": ("--rollout.engine.init_args.sleep", "off"),
    "compiled": (
        *("--rollout.engine.init_args.sleep", "off"),
        *("--rollout.engine.init_args.engine_kwargs", json.dumps(COMPILED)),
    ),
    "asleep": ("--rollout.engine.init_args.sleep", "auto"),
    "HF": ("--rollout.engine", "grpo_lightning.engines.HFEngine"),
}


def trl_options(config: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of GRPOConfig that belong to the machine."""
    if not torch.cuda.is_available():
        return {"use_cpu": True, "bf16": False}
    engine = config["rollout"].get("engine", {}).get("init_args", {})
    return {
        "bf16": True,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": job["share"] or engine.get("gpu_memory_utilization", 0.3),
        "vllm_max_model_length": config["data"].get("max_prompt_tokens", 512) + job["max_tokens"],
        "model_init_kwargs": {"dtype": "bfloat16"},
    }


def csv_logger(folder: Path) -> str:
    """Returns the flag's value for a logger whose file is whole after each step."""
    settings = {"save_dir": str(folder), "flush_logs_every_n_steps": 1}
    return json.dumps({"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": settings})


def command_of(side: str, job: dict[str, Any], python: str, folder: Path, flags: list[str]) -> list[str]:
    """Returns what runs `side` in `folder`."""
    if side == "TRL":
        (folder / "job.json").write_text(json.dumps({**job, "out": str(folder / "trl.json")}))
        return [python, str(HERE / "peers" / "trl_cpu.py"), str(folder / "job.json")]
    return [
        *(sys.executable, str(HERE / "engine_memory.py"), str(folder / "engine.json")),
        *("fit", "--config", job["config"]),
        *("--model.model_name", job["model"], "--trainer.logger", csv_logger(folder)),
        *("--trainer.callbacks", "[]"),
        *("--trainer.max_steps", str(job["steps"])),
        *("--trainer.log_every_n_steps", "1", "--trainer.enable_checkpointing", "false"),
        *("--trainer.enable_progress_bar", "false", "--rollout.validation.before_training", "false"),
        *("--data.validation_split", "null", "--data.dataset", job["dataset"], "--data.subset", "null"),
        *("--data.dataset_kwargs", json.dumps(job["dataset_kwargs"])),
        *("--seed_everything", str(job["seed"]), *FLAGS[side]),
        *(("--rollout.engine.init_args.gpu_memory_utilization", str(job["share"])) if job["share"] else ()),
        *flags,
    ]


def trl_phases(found: dict[str, Any]) -> dict[str, list[float]]:
    """Returns the seconds of each phase by our names; scoring is TRL's pass for old log-probabilities."""
    theirs = {"sync": "sync_weights", "generate": "vLLM.generate", "reward": "_calculate_rewards"}
    out = {ours: found["phases"].get(f"GRPOTrainer.{name}", []) for ours, name in theirs.items()}
    rollouts = found["phases"].get("GRPOTrainer._prepare_inputs", [])
    return out | {"rollout": rollouts}


def read(side: str, folder: Path) -> dict[str, Any]:
    """Returns what a side has logged, step by step."""
    if side == "TRL":
        found = folder / "trl.json"
        result = json.loads(found.read_text()) if found.exists() else {"seconds": [], "phases": {}}
        return result | {"phases": trl_phases(result)}
    logged = [r for file in folder.rglob("metrics.csv") for r in csv.DictReader(file.open())]
    rows = [r for r in logged if r.get("reward")]
    held_out = [(int(r["step"]), float(x)) for r in logged if (x := r.get("val/rewards/math_answer/mean"))]
    columns = {"seconds": "step_time", "reward": "reward", "correct": "rewards/math_answer/mean"}
    columns |= {"parity": "sampling/parity_mean", "captures": "graphs/captures"}
    timed = [c for c in (rows[0] if rows else ()) if c.startswith("time/")]
    phases = {c.removeprefix("time/"): [float(r[c]) for r in rows if r[c]] for c in timed}
    return {"phases": phases, "held_out": held_out} | {
        key: [float(r[column]) for r in rows if r.get(column)]
        for key, column in columns.items()
        if key == "seconds" or any(r.get(column) for r in rows)
    }


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Yields the most GPU memory in use meanwhile, in GiB, looked up twice a second; empty without a GPU."""
    peak: dict[str, float] = {}
    over = threading.Event()

    def look() -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while shutil.which(query[0]):
            used = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
            if used and used[0].isdigit():
                peak["peak_gib"] = max(peak.get("peak_gib", 0.0), int(used[0]) / 1024)
            if over.wait(0.5):
                return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def run(side: str, job: dict[str, Any], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs one side to its end or its limit; returns its figures, and the end of its errors if it failed."""
    folder.mkdir()
    command = command_of(side, job, args.trl_python, folder, args.flags)
    # Found without being installed; TRL's side finds the reward functions by itself.
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    env = dict(os.environ) if side == "TRL" else {**os.environ, "PYTHONPATH": path}
    # Each side compiles for itself, as on a fresh machine.
    env |= {name: str(folder / name) for name in CACHES}
    return watch(side, command, folder, env, args.limit + args.grace)


def watch(side: str, command: list[str], folder: Path, env: dict[str, str], limit: float) -> dict[str, Any]:
    """Runs `command` in `folder`; returns what it logged as `side`, seconds and memory."""
    began = time.perf_counter()
    with watched() as peak, (folder / "log").open("w") as log:
        child = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            code: int | str = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = "ended by the time limit"
        finally:
            child.kill()
            child.wait()
    wall = time.perf_counter() - began
    engine = folder / "engine.json"
    held = json.loads(engine.read_text()) if engine.exists() else {}
    result = {"wall_s": wall, **peak, **held, **read(side, folder)}
    seconds = result["seconds"]
    if seconds:
        # The first steps compile and capture, and ours starts its engine in the first.
        step = statistics.median(seconds[2:] or seconds)
        start = wall - step - sum(seconds[1:])
        result |= {"step_s": step, "steps_per_min": 60 / step, "start_s": start}
    if code != 0:
        result["failed"] = {"exit": code, "log": (folder / "log").read_text(errors="replace")[-3000:]}
    return result


def row(side: str, r: dict[str, Any]) -> list[str]:
    """Returns a line of the table: figures, then the share of right answers by sixths of the run."""
    if "step_s" not in r:
        return [side, "failed", *[""] * 7]
    n = max(len(r["correct"]) // 6, 1)
    sixths = [statistics.mean(r["correct"][i : i + n]) for i in range(0, len(r["correct"]) - n + 1, n)]
    return [
        side + (" (failed later)" if "failed" in r else ""),
        str(len(r["seconds"])),
        f"{r['step_s']:.3f}",
        f"{r['steps_per_min']:.0f}",
        f"{r['start_s']:.0f}",
        f"{r['wall_s']:.0f}",
        f"{r['peak_gib']:.1f}" if "peak_gib" in r else "-",
        f"{r['engine_gib']:.1f}" if "engine_gib" in r else "-",
        " ".join(f"{x:.2f}" for x in sixths),
    ]


def phases(side: str, r: dict[str, Any]) -> list[str]:
    """Returns a line of medians in seconds; `rollout` is all but the training pass, `score` what it adds."""
    medians = {name: statistics.median(x[2:] or x) for name, x in r.get("phases", {}).items() if x}
    if "rollout" in medians:
        known = sum(medians.get(name, 0.0) for name in ("sync", "generate", "reward"))
        medians["score"] = medians["rollout"] - known
    if "step_s" in r and "rollout" in medians:
        medians["train"] = r["step_s"] - medians["rollout"]
    return [side, *(f"{medians[name]:.3f}" if name in medians else "-" for name in PHASES)]


def steady(side: str, r: dict[str, Any]) -> list[str]:
    """Returns a line on the steps of `STEADY`: how far a single one makes the mean differ from the median."""
    first, last = STEADY
    seconds = r["seconds"][first - 1 : last]
    if not seconds:
        return [side, *["-"] * 6]
    mean, median = statistics.mean(seconds), statistics.median(seconds)
    captures = [0.0, *r.get("captures", [])]  # after each step, since the start
    before, within = captures[min(first, len(captures)) - 1], captures[: last + 1][-1]
    return [
        *(side, str(len(seconds)), f"{mean:.3f}", f"{median:.3f}", f"{mean / median:.2f}"),
        *(f"{max(seconds):.3f}", f"{within - before:.0f} of {captures[-1]:.0f}" if captures[1:] else "-"),
    ]


def main() -> None:
    """Runs the sides and writes the result after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/gpu/smollm2_arithmetic.yaml", help="of a run of ours")
    parser.add_argument("--dataset", default=None, help="a file instead of the config's dataset")
    parser.add_argument("--model", default=None, help="a folder or .gguf file instead of the config's model")
    parser.add_argument("--sides", nargs="+", default=["ours", "TRL"], choices=SIDES)
    parser.add_argument("--trl-python", default="python", help="the interpreter that has TRL")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--limit", type=float, default=200, help="seconds of training for each side")
    parser.add_argument("--grace", type=float, default=150, help="seconds for start and end of each side")
    parser.add_argument("--seed", type=int, default=None, help="of both sides, instead of the config's")
    parser.add_argument("--share", type=float, default=None, help="of the GPU for each engine")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="of `grpo-lightning fit`; last")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    path = str(Path(args.config).resolve())
    config = load_config(path)
    dataset = args.dataset and str(Path(args.dataset).resolve())
    seed = config["seed_everything"] if args.seed is None else args.seed
    job = job_of(path, args.steps, args.model, dataset)
    job |= {"limit": args.limit, "share": args.share, "seed": seed}
    job["trl"] = trl_options(config, job)
    name = f"learning-{Path(args.config).stem}" + ("" if args.seed is None else f"-seed-{args.seed}")
    shown = {k: v for k, v in job.items() if k != "rows"}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sides: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for side in args.sides:
            print(f"{side} ...", flush=True)
            sides[side] = run(side, job, args, Path(scratch) / side)
            result = {"setting": setting(device), "job": shown, "flags": args.flags, "sides": sides}
            written = save(name, result, args.out)
            if "failed" in sides[side]:
                print(f"{side} failed: {sides[side]['failed']['exit']}\n{sides[side]['failed']['log']}")
    print(
        f"{written}\n\n{job['prompts']} prompts x {job['group']} completions of <= {job['max_tokens']} tokens"
    )
    header = (
        "side",
        "steps",
        "s/step",
        "steps/min",
        "start s",
        "wall s",
        "GiB",
        "engine's",
        "correct by sixths of the run",
    )
    print(table(header, [row(name, r) for name, r in sides.items()]))
    for side, r in sides.items():
        if r.get("held_out"):
            print(f"{side}: held-out accuracy by step", *(f"{step}: {x:.3f}" for step, x in r["held_out"]))
    print("\nmedian seconds of a step, by phase")
    print(table(("side", *PHASES), [phases(name, r) for name, r in sides.items()]))
    print("\nsteps {} to {}; captures of CUDA graphs among them, and in the whole run".format(*STEADY))
    header = ("side", "steps", "mean s", "median s", "mean / median", "longest s", "captures")
    print(table(header, [steady(name, r) for name, r in sides.items()]))


if __name__ == "__main__":
    main()
