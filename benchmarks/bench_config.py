"""Shipped configs on random weights in their model's shape: start, a step by phase, memory, parity.

    python benchmarks/bench_config.py --shape 7B --config configs/qwen.yaml configs/gpu/qwen_7b_qlora.yaml \
        --tokenizer FOLDER --dataset train.jsonl

A random policy hardly ever ends by itself, so that every completion has all its tokens: the largest step
that the config allows. Its reward is one that it gets half of the time. One row is one config stack.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_learning import PHASES, csv_logger, phases, watch
from bench_rollout import save_model
from measure import save, setting, table
from workloads import SHAPES

from grpo_lightning.policy.model_source import resolve_model

HERE = Path(__file__).parent


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Rewards completions whose token ids have an even sum."""
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


def model_of(args: argparse.Namespace, folder: Path) -> str:
    """Writes random weights of `args.shape` beside the tokenizer; returns the folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(args.tokenizer))
    save_model(args.shape, folder, tokenizer.eos_token_id, tokenizer.pad_token_id)
    tokenizer.save_pretrained(folder)
    return str(folder)


def command_of(args: argparse.Namespace, model: str, folder: Path) -> list[str]:
    """Returns `grpo-lightning fit` with the configs."""
    return [
        *(sys.executable, str(HERE / "engine_memory.py"), str(folder / "engine.json"), "fit"),
        *(word for file in args.config for word in ("--config", str(Path(file).resolve()))),
        *("--model.model_name", model, "--rollout.reward_funcs", json.dumps([f"{__file__}:even"])),
        *("--rollout.reward_weights", "null", "--data.dataset", str(Path(args.dataset).resolve())),
        *("--data.dataset_kwargs", "null"),
        *("--data.subset", "null", "--trainer.max_steps", str(args.steps), "--trainer.logger"),
        *(csv_logger(folder), "--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar"),
        *("false", *args.flags),
    ]


def main() -> None:
    """Runs the configs and writes the result."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--config", nargs="+", required=True, help="from left to right")
    options.add_argument("--shape", default="1.5B", choices=list(SHAPES))
    options.add_argument("--tokenizer", required=True, help="a folder or .gguf file that has one")
    options.add_argument("--dataset", required=True, help="a file with the config's columns")
    options.add_argument("--steps", type=int, default=8)
    options.add_argument("--limit", type=float, default=400, help="seconds")
    options.add_argument("--out", type=Path, default=None, help="folder of the result")
    options.add_argument(
        "--flags", nargs=argparse.REMAINDER, default=[], help="of `grpo-lightning fit`; last"
    )
    args = options.parse_args()
    name = Path(args.config[-1]).stem
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = model_of(args, folder / "model")
        command = command_of(args, model, folder)
        path = os.pathsep.join(filter(None, [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")]))
        side = watch("ours", command, folder, {**os.environ, "PYTHONPATH": path}, args.limit)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(save(f"config-{name}", {"setting": setting(device), "shape": args.shape, **side}, args.out))
    if "failed" in side:
        sys.exit(f"{name} ended with {side['failed']['exit']}\n{side['failed']['log']}")
    figures = [f"{side[k]:.1f}" if k in side else "-" for k in ("start_s", "peak_gib", "engine_gib")]
    parity = f"{statistics.mean(side['parity']):.4f}" if side.get("parity") else "-"
    header = ("config", "steps", "start s", "GiB", "engine's", "parity", "s/step", *PHASES)
    cells = [name, len(side["seconds"]), *figures, parity, f"{side['step_s']:.2f}", *phases("", side)[1:]]
    print(table(header, [cells]))


if __name__ == "__main__":
    main()
