"""A shipped run on a GPU beside TRL's trainer with its colocated vLLM: steps, seconds, what is learned.

    python benchmarks/bench_learning.py --trl-python python --out $OUT

Both sides train the same model on the same task with the same sizes, one after the other, each in a process
of its own; TRL's settings are those its documentation names for one GPU.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from cpu_step import job_of, ours, theirs
from measure import save, setting, table

TRL = {
    "bf16": True,
    "use_vllm": True,
    "vllm_mode": "colocate",
    "vllm_gpu_memory_utilization": 0.3,
    "model_init_kwargs": {"dtype": "bfloat16"},
}


def main() -> None:
    """Runs both sides and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/gpu/smollm2_arithmetic.yaml")
    parser.add_argument("--trl-python", default=None, help="null runs ours alone")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--flags", nargs="*", default=[], help="further flags of `grpo-lightning fit`")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    job = job_of(str(Path(args.config).resolve()), args.steps, trl=TRL)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sides = {"grpo-lightning": ours(job, folder / "ours", *args.flags)}
        if args.trl_python:
            sides["TRL"] = theirs(job, args.trl_python, folder)
    job.pop("rows")
    result = {"setting": setting(torch.device("cuda")), "job": job, "sides": sides}
    print(save(f"learning-{Path(args.config).stem}", result, args.out))
    tenth = max(args.steps // 6, 1)

    def means(values: list[float]) -> str:
        return f"{statistics.mean(values[:tenth]):.3f} -> {statistics.mean(values[-tenth:]):.3f}"

    cells = [
        [
            name,
            f"{statistics.median(r['seconds']):.3f}",
            f"{60 / statistics.median(r['seconds']):.0f}",
            f"{r['wall'] - sum(r['seconds']):.0f}",
            means(r["reward"]),
            means(r["correct"]),
        ]
        for name, r in sides.items()
    ]
    print(table(("side", "median s/step", "steps/min", "s of start-up", "reward", "correct"), cells))
    print(json.dumps({name: [round(x, 3) for x in r["correct"]] for name, r in sides.items()}))


if __name__ == "__main__":
    main()
