"""The quickstart's step on a CPU, beside TRL's on the same model, task and sizes. One table, one JSON file.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install -c constraints/cpu.txt trl==1.16.0 peft
    python benchmarks/cpu_step.py --trl-python /tmp/trl/bin/python

The sides run by themselves, one after the other, with all cores. The peer is no dependency of the package.
Where vLLM is installed, as in `.venv-vllm`, ours runs with both engines.
"""

import argparse
import csv
import datetime
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from grpo_lightning import PromptDataModule
from grpo_lightning.cli.main import load_config
from grpo_lightning.policy.model_source import resolve_model

HERE = Path(__file__).parent
VLLM = ("--config", str(HERE.parent / "configs" / "engine" / "vllm.yaml"))


def ours(job: dict, folder: Path, *flags: str) -> dict:
    """Runs `grpo-lightning fit` on the shipped config without validation; returns what it logged."""
    folder.mkdir()
    began = time.perf_counter()
    command = [
        *(sys.executable, "-m", "grpo_lightning", "fit", "--config", job["config"]),
        *("--trainer.max_steps", str(job["steps"]), "--rollout.validation.before_training", "false"),
        *("--data.validation_split", "null", "--trainer.enable_progress_bar", "false"),
        *flags,
    ]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (file,) = folder.rglob("metrics.csv")
    with file.open() as f:
        rows = [r for r in csv.DictReader(f) if r["reward"]]
    import torch
    import transformers

    return {
        "wall": time.perf_counter() - began,
        "generate": [float(r["time/generate"]) for r in rows],
        "seconds": [float(r["step_time"]) for r in rows],
        "reward": [float(r["reward"]) for r in rows],
        "correct": [float(r["rewards/math_answer/mean"]) for r in rows],
        "versions": {m.__name__: m.__version__ for m in (torch, transformers)},
    }


def theirs(job: dict, python: str, folder: Path) -> dict:
    """Runs peers/trl_cpu.py in TRL's environment."""
    out = folder / "trl.json"
    (folder / "job.json").write_text(json.dumps({**job, "out": str(out)}))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [python, str(HERE / "peers" / "trl_cpu.py"), str(folder / "job.json")],
        check=True,
        cwd=folder,
        env=env,
        stdout=subprocess.DEVNULL,
    )
    return json.loads(out.read_text())


def row(name: str, r: dict) -> str:
    third = max(len(r["seconds"]) // 3, 1)

    def mean(key: str, part: slice) -> float:
        return statistics.mean(r[key][part])

    first, last = slice(0, third), slice(-third, None)
    return (
        f"| {name} | {statistics.median(r['seconds']):.2f} | {sum(r['seconds']):.0f} "
        f"| {mean('reward', first):.3f} -> {mean('reward', last):.3f} "
        f"| {mean('correct', first):.3f} -> {mean('correct', last):.3f} |"
    )


def rows_of(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns prompts and columns as the data module with these options reads them."""
    data = PromptDataModule(**options)
    pairs = (data.form.split(row, "dataset") for row in data.source.load())
    return [{**columns, "prompt": prompt} for prompt, columns in pairs]


def job_of(path: str, steps: int, model: str | None = None, dataset: str | None = None) -> dict[str, Any]:
    """Returns what both sides need to know of a shipped config, whose model or data may be others."""
    config = load_config(path)
    rollout, data = config["rollout"], config["data"]
    if dataset is not None:
        data = {**data, "dataset": dataset, "subset": None, "dataset_kwargs": None}
    return {
        "config": path,
        "steps": steps,
        "model": resolve_model(model or config["model"]["model_name"]),
        "dataset": data["dataset"],
        "dataset_kwargs": data.get("dataset_kwargs"),
        "rows": rows_of(data),
        "prompts": data["prompts_per_rollout"],
        "group": rollout["num_generations"],
        "max_tokens": rollout["sampling"]["max_tokens"],
        "temperature": rollout["sampling"]["temperature"],
        "lora": config["model"]["lora"],
        "lr": config["model"]["optimizer"]["init_args"]["lr"],
        "scale_rewards": "none" if rollout.get("advantage") == "group_mean" else "group",
        "weights": rollout["reward_weights"],
        "pattern": rollout["reward_funcs"][1]["init_args"]["pattern"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trl-python", required=True)
    parser.add_argument("--steps", type=int, default=24)
    args = parser.parse_args()
    job = job_of("configs/quickstart.yaml", args.steps)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        a = ours(job, folder / "hf")
        c = ours(job, folder / "vllm", *VLLM) if importlib.util.find_spec("vllm") else None
        b = theirs(job, args.trl_python, folder)
    table = [
        f"{job['prompts']} prompts x {job['group']} completions of at most {job['max_tokens']} tokens, "
        f"{args.steps} steps, {os.cpu_count()} cores, fp32",
        "",
        "| | median s/step | s in all | reward, first -> last third | correct, first -> last third |",
        "|---|---|---|---|---|",
        row("grpo-lightning, HFEngine", a),
        *([row("grpo-lightning, VLLMEngine", c)] if c else []),
        row(f"TRL {b['versions']['trl']}", b),
        "",
        f"median step: {statistics.median(b['seconds']) / statistics.median(a['seconds']):.2f}x, "
        f"whole run: {sum(b['seconds']) / sum(a['seconds']):.2f}x (TRL over HFEngine)",
    ]
    print("\n".join(table))
    today = datetime.date.today().isoformat()
    job.pop("rows")
    record = {"date": today, "device": cpu(), "job": job, "ours": a, "ours_vllm": c, "trl": b, "table": table}
    out = HERE / "results" / f"cpu_step-{today}.json"
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written {out}")


def cpu() -> str:
    """Returns the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return platform.processor()


if __name__ == "__main__":
    main()
