"""Hostile option values and data sets against the command line: `python tests/fuzz.py options --cases 500`.

Each case is a `fit` of a tiny model in a process of its own, forked from one that has imported everything.
Counted are raw tracebacks, hangs, files under a final name that cannot be read, exit codes other than 0, 1
and 2, runs that are refused without a line `error: ...`, and folders that a refused run leaves behind.
"""

import argparse
import copy
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from commands import fork, leave_with

os.environ.update(
    OMP_NUM_THREADS="1",
    CUDA_VISIBLE_DEVICES="",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    TRITON_INTERPRET="1",
    PYTHONWARNINGS="ignore",
)
LIMIT = 150.0
"""seconds after which a case hangs; a healthy one takes one or two, a spawned process imports for thirty"""
MEMORY = 6 << 30
"""bytes of address space: a value that asks for more is answered like a full machine"""


class Case(NamedTuple):
    """One hostile run: what is changed of the config that works."""

    name: str
    changes: dict[str, Any]
    flags: tuple[str, ...] = ()


class Result(NamedTuple):
    """What became of it."""

    name: str
    code: int
    seconds: float
    faults: tuple[str, ...]
    error: str


NAN, INF = float("nan"), float("inf")
HOSTILE: tuple[Any, ...] = (
    "nonsense",
    "",
    "ünï—\u202e\u0000",
    "../../../etc/passwd",
    "no.such.module.Class",
    "x" * 20_000,
    -1,
    0,
    10**12,
    -1.5,
    NAN,
    INF,
    True,
    [],
    ["nothing"],
    {},
    {"nonsense": 1},
    {"class_path": "no.such.Thing", "init_args": {"a": 1}},
    None,
)
PLAUSIBLE: dict[str, tuple[Any, ...]] = {
    "model.optimizer": (
        {"class_path": "torch.optim.AdamW", "init_args": {"lr": -1}},
        "SGD",
        "torch.nn.Linear",
    ),
    "model.optimizer.init_args.lr": (-1, "fast", 1e300),
    "model.optimizer.init_args.betas": ([2.0, 0.9], [0.9], "ab"),
    "model.scheduler": ({"class_path": "torch.optim.lr_scheduler.StepLR"}, "StepLR", "torch.optim.SGD"),
    "model.lora.r": (0, -3, "many", 1.5, 10**7, None),
    "model.lora.target_modules": (["nothing"], [], "(", 3, {"q_proj": 1}),
    "model.lora.lora_alpha": ("much", -1, None),
    "model.lora.lora_dropout": (7, -1, "some"),
    "model.lora.layers_to_transform": ([99], "all"),
    "model.lora.rank_pattern": ({"(": 2}, {"q_proj": 0}, 3),
    "model.lora.init_lora_weights": ("nonsense", "eva", "loftq", "olora", "orthogonal"),
    "model.lora.modules_to_save": (["nothing"], "lm_head"),
    "model.lora.use_dora": (True, "maybe"),
    "model.lora.task_type": ("NONSENSE", "SEQ_CLS"),
    "model.lora.trainable_token_indices": ([10**9], "x"),
    "model.model_kwargs.attn_implementation": ("flash_attention_2", "nonsense", "eager", 3),
    "model.model_kwargs.dtype": ("nonsense", "int8", 3, "float64"),
    "model.model_kwargs.nonsense": (1,),
    "model.model_kwargs.revision": ("nowhere", 3),
    "model.model_kwargs.device_map": ("auto", "cuda:7", 3),
    "model.model_kwargs.quantization_config": ({"load_in_4bit": True}, 3),
    "trainer.accelerator": ("gpu", "cuda", "tpu", "mps"),
    "trainer.devices": (0, 2.5, 1000, "0,1,2,3,4,5,6,7,8", [0, 0], -2),
    "trainer.strategy": ("fsdp", "deepspeed", "deepspeed_stage_3", "dp", "ddp_spawn", "single_device"),
    "trainer.num_nodes": (2, 0),
    "trainer.precision": (17, "fp8", "16-mixed", "64-true", "transformer-engine"),
    "trainer.logger": tuple(
        {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": args}
        for name, args in (
            ("WandbLogger", {}),
            ("CometLogger", {}),
            ("MLFlowLogger", {}),
            ("NeptuneLogger", {}),
            ("TensorBoardLogger", {"save_dir": "/proc/none"}),
            ("CSVLogger", {"save_dir": "/proc/none"}),
            ("CSVLogger", {}),
        )
    ),
    "trainer.callbacks": (
        [{"class_path": "ModelCheckpoint", "init_args": {"monitor": "nothing", "every_n_train_steps": 1}}],
        [{"class_path": "EarlyStopping", "init_args": {"monitor": "nothing"}}],
        [{"class_path": "ModelCheckpoint", "init_args": {"mode": "sideways"}}],
        [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "/proc/none", "every_n_train_steps": 1}}],
        [{"class_path": "LearningRateMonitor"}],
        [{"class_path": "RichProgressBar"}],
        [{"class_path": "StochasticWeightAveraging", "init_args": {"swa_lrs": -1}}],
        [{"class_path": "GradientAccumulationScheduler", "init_args": {"scheduling": {0: 2}}}],
    ),
    "trainer.profiler": ("pytorch", "simple", "advanced"),
    "trainer.default_root_dir": ("/proc/none", "/dev/null", "s3://bucket/x", "no:such://place"),
    "trainer.max_time": ("yesterday", "00:00:00:00", {"years": 1}),
    "trainer.val_check_interval": (0.3, 10**9),
    "trainer.plugins": (["nonsense"],),
    "model.model_name": ("nobody/nothing", "/", ".", "gpt2:x.gguf", "/etc/passwd"),
    "model.tokenizer": ("nobody/nothing", "/", "/etc"),
    "model.loss.params": ({"x": "y"},),
    "data.dataset_kwargs": ({"delimiter": "xx"},),
    "data.columns": ({"prompt": "answer"}, {"x": "nothing"}),
    "data.prompt_template": ("{", "{0}", "{nothing}", "{prompt.__class__}"),
    "data.chat_template_kwargs": ({"messages": 1}, {"tokenize": False}),
    "data.dataset": ("reasoning_gym:nothing", "python:os.system", "python:nothing", "nobody/nothing", [1, 2]),
    "data.test_split": (0.5, 2, 10**6),
    "data.validation_split": (0.5, 2, 10**6, -0.5),
    "rollout.reward_funcs": (["os.system"], ["math.sqrt"], [3], [{"class_path": "math.sqrt"}], "nothing"),
    "rollout.reward_weights": ([1, 2], ["a"], [NAN]),
    "rollout.engine": ("HFEngine", "ReplayEngine", "VLLMEngine", "torch.nn.Linear", {"init_args": {}}),
    "rollout.engine.init_args.batch_size": (0, -1, "many"),
    "rollout.sampling.extra": ({"nonsense": 1}, {"logit_bias": 3}),
    "rollout.sampling.regex": ("(", "[a-z]+"),
    "rollout.validation.sampling": ({"temperature": -1}, {"max_new_tokens": 3}),
    "rollout.advantage_clip": ([1, -1], [1], [NAN, NAN]),
    "rollout.record_to": ("/proc/none", "/dev/null"),
    "ckpt_path": ("nothing.ckpt", "best", "last", "/etc/passwd", "hpc"),
    "seed_everything": (-1, 2**40),
    "trainer.max_steps": ("abc",),
}
SKIPPED = ("help", "config", "print_config")
LATE = ("trainer.val_check_interval=", "model.model_kwargs.quantization_config=")
"""what shows only once the model is loaded or the loader there is: refused, but after the logger's folder"""
LONG = ("rollout.num_generations", "rollout.num_iterations", "rollout.updates_per_rollout")
"""what a huge value of makes a long run, not a wrong one"""


def base(folder: Path, model: str) -> dict[str, Any]:
    """Returns a config that works."""
    return {
        "seed_everything": 1,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.max_steps": 1,
        "trainer.limit_val_batches": 1,
        "trainer.default_root_dir": "run",
        "trainer.enable_progress_bar": False,
        "trainer.enable_model_summary": False,
        "model.model_name": model,
        "model.lora": {"r": 2},
        "model.gradient_checkpointing": False,
        "data.dataset": str(folder / "rows.jsonl"),
        "data.prompts_per_rollout": 2,
        "data.validation_split": 2,
        "rollout.num_generations": 2,
        "rollout.sampling.max_tokens": 4,
        "rollout.reward_funcs": ["grpo_lightning.rewards.exact_match"],
    }


def fit_parser() -> Any:
    """Returns the parser of `fit`."""
    from grpo_lightning.cli import main as cli

    class Parsing(cli.CLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise Found(parser)

    class Found(Exception):
        pass

    given, sys.argv = sys.argv, [sys.argv[0], "fit"]
    try:
        Parsing(
            cli.GRPOModule, cli.PromptDataModule, parser_class=cli.Parser, auto_configure_optimizers=False
        )
    except Found as found:
        return next(a for a in found.args[0]._actions if hasattr(a, "_name_parser_map"))._name_parser_map[
            "fit"
        ]
    finally:
        sys.argv = given


def option_cases(seed: int, count: int) -> list[Case]:
    """Returns `count` cases: all plausible mistakes and each option in turn with values that fit no type."""
    pick = random.Random(seed)
    names = [a.dest for a in fit_parser()._actions if a.dest.split(".")[-1] not in SKIPPED]
    names = [n for n in names if n not in {"trainer", "model", "data", "rollout"}]
    cases = [_case(key, v, pick) for key, values in PLAUSIBLE.items() for v in values]
    pick.shuffle(cases)
    rest: list[Case] = []
    bags = {n: pick.sample(HOSTILE, len(HOSTILE)) for n in names}
    for turn in range(len(HOSTILE)):
        pick.shuffle(names)
        rest += [_case(n, bags[n][turn], pick) for n in names if not (n in LONG and bags[n][turn] == 10**12)]
    cut = min(len(cases), count // 2)
    return cases[:cut] + rest[: count - cut]


def _case(key: str, value: Any, pick: random.Random) -> Case:
    """A value goes through the command line where it can be written there, else through a config file."""
    name = f"{key}={value!r}"[:120]
    if isinstance(value, str | int | float) and "\0" not in str(value) and pick.random() < 0.5:
        return Case(name, {}, (f"--{key}={value}",))
    return Case(name, {key: value})


def put(config: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key of nested mappings; what stands in the way makes room."""
    *path, last = key.split(".")
    for part in path:
        if not isinstance(config.get(part), dict):
            config[part] = {}
        config = config[part]
    config[last] = value


def run_case(case: Case, folder: Path, settings: dict[str, Any]) -> Result:
    """Runs one case in a forked process and looks at what it leaves."""
    import yaml

    place = Path(tempfile.mkdtemp(dir=folder, prefix="case-"))
    inputs = Path(tempfile.mkdtemp(dir=folder, prefix="input-"))
    config: dict[str, Any] = {}
    for key, value in {**settings, **case.changes}.items():
        if key.startswith("model.optimizer.") or key.startswith("rollout.engine."):
            put(
                config,
                f"{key.rpartition('.init_args')[0]}.class_path",
                CLASSES[key.rpartition(".init_args")[0]],
            )
        put(config, key, copy.deepcopy(value))
    (inputs / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    began = time.monotonic()
    child = fork()
    if child == 0:
        _child(["fit", "--config", str(inputs / "config.yaml"), *case.flags], place, inputs)
    status = _wait(child, began + LIMIT)
    seconds = time.monotonic() - began
    text = (inputs / "err").read_text(errors="replace")
    code = -9 if status is None else os.waitstatus_to_exitcode(status)
    late = case.name.startswith(LATE)
    faults = tuple(_faults(code, text, place, late)) if status is not None else ("hang",)
    line = next((x for x in text.splitlines() if x.startswith("error:")), text.strip()[-300:])
    return Result(case.name, code, round(seconds, 2), faults, line if code else "")


CLASSES = {"model.optimizer": "torch.optim.AdamW", "rollout.engine": "grpo_lightning.engines.HFEngine"}


def _child(argv: list[str], place: Path, logs: Path) -> None:
    from grpo_lightning.__main__ import main

    os.setsid()
    os.chdir(place)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(logs / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv[0] = str(Path(sys.modules["grpo_lightning.__main__"].__file__ or ""))
    leave_with(main, argv)


def _wait(child: int, deadline: float) -> int | None:
    """Returns the status of the process, or None after killing it and all that it started."""
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _faults(code: int, text: str, place: Path, late: bool) -> Any:
    if "Traceback" in text:
        yield "traceback"
    if code not in (0, 1, 2):
        yield "exit code"
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    if code and len(errors) != 1:
        yield f"{len(errors)} errors"
    files = [path for path in place.rglob("*") if path.is_file()]
    if code == 2 and not late and any(place.iterdir()):
        yield "refused, but wrote " + ", ".join(
            sorted(str(p.relative_to(place)) for p in place.rglob("*"))[:3]
        )
    for path in files:
        if reason := unreadable(path):
            yield f"partial {path.relative_to(place)}: {reason}"


def unreadable(path: Path) -> str | None:
    """Returns why a file under its final name is not whole, or None."""
    import torch
    import yaml
    from safetensors.torch import load_file

    readers: dict[str, Any] = {
        ".ckpt": lambda p: torch.load(p, weights_only=True, map_location="cpu"),
        ".safetensors": load_file,
        ".json": lambda p: json.loads(p.read_text()),
        ".yaml": lambda p: yaml.safe_load(p.read_text()),
        ".parquet": lambda p: __import__("pyarrow.parquet").parquet.read_table(p),
    }
    try:
        readers.get(path.suffix, lambda p: None)(path)
    except Exception as error:  # whatever a reader says of a broken file
        return f"{type(error).__name__}: {str(error)[:80]}"
    return None


def prepare(folder: Path) -> dict[str, Any]:
    """Imports what takes seconds, makes the model and its data; returns the config that works."""
    import datasets  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch
    from models import save_tiny

    import grpo_lightning.policy.loading
    import grpo_lightning.policy.policy  # noqa: F401

    torch.set_num_threads(1)
    model = save_tiny(folder / "model")
    rows = [{"prompt": [{"role": "user", "content": f"say {i}"}], "answer": str(i)} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return base(folder, model)


def main() -> int:
    """Runs the cases and prints the tally; returns 1 if any case is at fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["options", "data"])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--out", help="a .jsonl file for the result of each case")
    args = parser.parse_args()
    from fuzz_data import data_cases

    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        folder = Path(scratch)
        settings = prepare(folder)
        make = option_cases if args.what == "options" else lambda s, n: data_cases(s, n, folder / "data")
        cases = [Case("healthy", {})] + [
            c for c in make(args.seed, args.cases) if c.name.startswith(args.only)
        ]
        results = []
        for case in cases:
            results.append(run_case(case, folder, settings))
            if args.out:
                with open(args.out, "a") as file:
                    print(json.dumps(results[-1]._asdict(), ensure_ascii=True), file=file)
            if results[-1].faults:
                print(*results[-1], sep=" | ", flush=True)
    codes = Counter(r.code for r in results)
    faults = Counter(f.split(" ")[0] for r in results for f in r.faults)
    slowest = max(results, key=lambda r: r.seconds)
    print(
        f"{len(results) - 1} cases of {args.what}, exit codes {dict(codes)}; "
        f"slowest {slowest.seconds} s ({slowest.name})"
    )
    print(f"faults: {dict(faults) or 'none'}")
    return 1 if faults or results[0].code else 0


if __name__ == "__main__":
    sys.exit(main())
