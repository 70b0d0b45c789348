"""Does the alarm end healthy runs, and does it miss sick engines? Learning runs in one process with vLLM.

    python benchmarks/bench_detector.py --model FOLDER --only healthy --part healthy --out $OUT
    python benchmarks/bench_detector.py --model FOLDER --only sick --part sick --out $OUT
    python benchmarks/bench_detector.py --table $OUT/detector-*.json        # the table of docs/rollouts.md

`--model` is SmolLM2-135M-Instruct, a folder or .gguf file; `qwen2` is a random Qwen2 of 8 layers beside its
tokenizer, which learns to write tokens of the lower half of the vocabulary. `--only` takes names of `RUNS`,
sicknesses, or `healthy` and `sick`. Runs follow each other and share an engine while their model and
precision stay the same, so name them in the order of `--list`; a sick run has an engine of its own. The
result is written after each run. Tasks of reasoning-gym: seed 11, questions under 250 characters.
"""

import argparse
import json
import logging
import tempfile
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from measure import save, setting, table
from sick_vllm import SICKNESSES, SickVLLM

from grpo_lightning import GRPOModule, PromptDataModule, RolloutCallback, SamplingParams
from grpo_lightning.callbacks import policy_check
from grpo_lightning.engines import EngineContext, VLLMEngine
from grpo_lightning.errors import GRPOError
from grpo_lightning.kernels.config import KernelConfig
from grpo_lightning.losses import LossConfig
from grpo_lightning.policy.model_source import resolve_model
from grpo_lightning.rewards import FormatReward, math_answer, reasoning_gym_score

LONGEST_QUESTION = 250


@dataclass(frozen=True)
class Run:
    """A learning run; `sick` names what is done to its engine at step `since`."""

    task: str
    model: str = "smollm2"
    precision: str = "bf16-true"
    steps: int = 120
    rate: float = 2e-4
    sampling: dict[str, Any] = field(default_factory=lambda: {"max_tokens": 16})
    sick: str | None = None
    since: int = 0


RUNS = {
    "letter_counting": Run("letter_counting", steps=300),
    "sums": Run("sums", steps=300),
    "chain_sum": Run("chain_sum"),
    "spell_backward": Run("spell_backward"),
    "leg_counting": Run("leg_counting"),
    "sums, rate 1e-3": Run("sums", rate=1e-3),
    "letter_counting, top_p": Run(
        "letter_counting", sampling={"max_tokens": 16, "temperature": 0.7, "top_p": 0.9}
    ),
    "qwen2": Run("lower half", "qwen2", steps=200, rate=1e-3),
    "letter_counting, fp32": Run("letter_counting", precision="32-true"),
    "qwen2, fp32": Run("lower half", "qwen2", precision="32-true", rate=1e-3),
}
HEALTHY = tuple(RUNS)
RUNS |= {name: Run("sums", sick=name, since=30, steps=60) for name in SICKNESSES}


def lower_half(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Rewards the share of tokens in the lower half of SmolLM2's vocabulary."""
    return [sum(i < 24_576 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def data_of(run: Run, small: bool) -> PromptDataModule:
    """Returns the prompts of a run."""
    settings: dict[str, Any] = {
        "prompts_per_rollout": 4 if small else 16,
        "max_prompt_tokens": 192,
        "seed": 1,
    }
    if run.task in ("sums", "lower half"):
        kwargs = {"size": 400 if small else 3000, "max_terms": 3, "max_value": 19}
        return PromptDataModule(
            "python:grpo_lightning.data.arithmetic.sums", dataset_kwargs=kwargs, **settings
        )
    import reasoning_gym  # type: ignore[import-not-found]

    made = reasoning_gym.create_dataset(run.task, size=400 if small else 3000, seed=11)
    rows = [{**row, "prompt": row["question"]} for row in made if len(row["question"]) < LONGEST_QUESTION]
    return PromptDataModule(rows, **settings)


def rewards_of(run: Run) -> dict[str, Any]:
    """Returns the reward settings of a run."""
    if run.task == "lower half":
        return {"reward_funcs": [lower_half]}
    own = math_answer if run.task == "sums" else reasoning_gym_score
    return {
        "reward_funcs": [own, FormatReward(r".*\d\.?")],
        "reward_weights": [1.0, 0.1],
        "advantage": "group_mean",
    }


def save_qwen2(tokenizer: Any, folder: Path, small: bool) -> str:
    """Writes random weights beside SmolLM2's tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)  # wide enough weights for attention to matter
    width = 128 if small else 512
    config = Qwen2Config(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2 if small else 8,
        num_attention_heads=width // 64, num_key_value_heads=2, vocab_size=len(tokenizer),
        max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.15 if small else 0.05,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Shared(VLLMEngine):
    """Stays up from run to run until `end`."""

    def start(self, context: EngineContext) -> None:
        if self._llm is None:
            super().start(context)
        self.policy_version = -1

    def close(self) -> None:
        self.policy_version = -1

    def end(self) -> None:
        super().close()


class Watch(pl.Callback):
    """Keeps the statistic of every step, and what examinations found."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.examined: list[dict[str, Any]] = []
        self.seconds: list[float] = []
        self._step, self._then = 0, 0.0
        self._judge = policy_check.judge

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        def judge(found: Any) -> Any:
            verdict = self._judge(found)
            row = {
                "step": self._step,
                "kl": verdict.kl,
                "allowed": verdict.allowed,
                "apart": sorted(verdict.apart),
            }
            self.examined.append({**row, "completions": len(found.tokens), "tokens": int(found.tokens.sum())})
            return verdict

        policy_check.judge = judge

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self._step = trainer.global_step
        names = ("kl_engine_trainer", "kl_engine_trainer_error", "parity_mean", "parity_max")
        found = {n: pl_module.step_metrics.get(f"sampling/{n}") for n in names}
        self.steps.append({"step": self._step, **{n: x for n, x in found.items() if x is not None}})
        now = time.perf_counter()
        self.seconds.append(now - (self._then or now))
        self._then = now

    def done(self) -> None:
        policy_check.judge = self._judge


def fit(run: Run, model: str, engine: Any, small: bool, steps: int) -> dict[str, Any]:
    """Runs it; returns what was seen, and the error that ended it."""
    pl.seed_everything(42, verbose=False)
    watch = Watch()
    rollout = RolloutCallback(
        engine=engine,
        num_generations=4 if small else 8,
        sampling=SamplingParams(**run.sampling),
        **rewards_of(run),
    )
    graphs = torch.cuda.is_available() and run.precision == "bf16-true"
    module = GRPOModule(
        model, loss=LossConfig("dapo"), lora={"r": 16, "lora_alpha": 32}, gradient_checkpointing=False,
        kernels=KernelConfig(graphs="on" if graphs else "auto"),
        optimizer=lambda p: torch.optim.AdamW(p, lr=run.rate, weight_decay=0.0),
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="auto", devices=1, max_steps=steps, precision=run.precision, gradient_clip_val=1.0,  # pyright: ignore
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[watch, rollout], num_sanity_val_steps=0,
    )  # fmt: skip
    began, ended = time.perf_counter(), None
    try:
        trainer.fit(module, data_of(run, small))
    except GRPOError as error:
        ended = f"{type(error).__name__}: {error}"
    finally:
        watch.done()
    routine = {0}
    for row in watch.examined:  # the first, and one every so many steps
        if row["step"] - max(routine) >= policy_check.EVERY:
            routine.add(row["step"])
    return {
        "steps": trainer.global_step,
        "ended": ended,
        "trips": sum(row["step"] not in routine for row in watch.examined),
        "wall_s": time.perf_counter() - began,
        "examined": watch.examined,
        "by_step": watch.steps,
        "seconds": watch.seconds,
    }


def row(name: str, r: dict[str, Any]) -> list[str]:
    """Returns a line of the table."""
    run, kl = r["run"], [s["kl_engine_trainer"] for s in r["by_step"] if "kl_engine_trainer" in s]
    parity = [s["parity_mean"] for s in r["by_step"] if "parity_mean" in s]
    # of examinations before a sickness set in
    healthy = [e for e in r["examined"] if run["sick"] is None or e["step"] < run["since"]]
    share = max((e["kl"]["engine_trainer"] / e["allowed"] for e in healthy), default=float("nan"))
    last = r["examined"][-1] if r["examined"] else {"kl": {"engine_trainer": float("nan")}, "allowed": 1.0}
    end = "-" if r["ended"] is None else f"stopped at {r['steps']}"
    if run["sick"] is not None:
        caught = last["kl"]["engine_trainer"] / last["allowed"]
        end = f"step {run['since']}: caught at {r['steps']}, {caught:.1f}x" if r["ended"] else "missed"
    figures = (
        f"{max(kl, default=0):.2g}",
        f"{share:.2f}",
        f"{[*parity, 0][0]:.3f}",
        f"{max(parity, default=0):.3f}",
    )
    return [name, run["precision"], str(r["steps"]), str(r["trips"]), end, *figures]


HEADER = ("run", "precision", "steps", "trips", "stop", "largest KL", "of allowed", "parity first", "largest")


def markdown(files: list[Path]) -> str:
    """Returns the rows of all results as a table for the docs."""
    runs = {name: r for file in files for name, r in json.loads(file.read_text())["runs"].items()}
    lines = [HEADER, ["---"] * len(HEADER), *(row(name, r) for name, r in runs.items())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Runs what was asked for and writes the result after each run."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", help="SmolLM2-135M-Instruct: a folder or .gguf file")
    options.add_argument("--only", nargs="+", default=["healthy", "sick"])
    options.add_argument("--list", action="store_true", help="names the runs")
    options.add_argument("--table", nargs="+", type=Path, help="results to print as a table of the docs")
    options.add_argument("--engine", default="{}", help="JSON: further arguments of VLLMEngine")
    options.add_argument("--steps", type=int, help="of every run, at most")
    options.add_argument("--since", type=int, help="step from which engines are sick, instead of 30")
    options.add_argument(
        "--small", action="store_true", help="a tiny random model instead of both, and few prompts"
    )
    options.add_argument("--part", default="all", help="names the result")
    options.add_argument("--out", type=Path, default=None, help="folder of the result")
    args = options.parse_args()
    if args.table or args.list:
        print(markdown(args.table) if args.table else "\n".join(RUNS))
        return
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    groups = {"healthy": HEALTHY, "sick": SICKNESSES}
    names = [n for asked in args.only for n in groups.get(asked, (asked,))]
    if unknown := set(names) - set(RUNS):
        options.error(f"no such runs: {sorted(unknown)}; see --list")
    engine_options = {
        "max_num_seqs": 256,
        "gpu_memory_utilization": 0.25,
        "sleep": "off",
        "max_model_len": 256,
    }
    engine_options["share_base"] = "off"  # sicknesses are written into the engine's weights
    engine_options |= json.loads(args.engine)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        from transformers import AutoTokenizer

        folders = {"smollm2": resolve_model(args.model)}
        if args.small or any(RUNS[n].model == "qwen2" for n in names):
            tokenizer = AutoTokenizer.from_pretrained(folders["smollm2"])
            folders["qwen2"] = save_qwen2(tokenizer, Path(scratch) / "qwen2", args.small)
        shared, key = None, None
        for name in names:
            run = RUNS[name]
            if args.small:  # what a CPU can do
                run = replace(run, model="qwen2", task="lower half", rate=1e-2)
            if run.sick is not None and args.since is not None:
                run = replace(run, since=args.since)
            own = (run.model, run.precision) if run.sick is None else name
            if shared is not None and own != key:
                shared.end()
                shared = None
            if run.sick is not None:
                engine: Any = SickVLLM(run.sick, run.since, **engine_options)
            else:
                engine = shared = shared or Shared(**engine_options)
            key = own
            print(f"{name} ...", flush=True)
            steps = min(run.steps, args.steps or run.steps)
            found[name] = {"run": run.__dict__, **fit(run, folders[run.model], engine, args.small, steps)}
            result = {"setting": setting(device), "engine": engine_options, "runs": found}
            written = save(f"detector-{args.part}", result, args.out)
            print(
                f"{found[name]['steps']} steps, {found[name]['wall_s']:.0f} s",
                found[name]["ended"] or "",
                flush=True,
            )
        if shared is not None:
            shared.end()
    print(f"{written}\n")
    print(table(HEADER, [row(name, r) for name, r in found.items()]))


if __name__ == "__main__":
    main()
