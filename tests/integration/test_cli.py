"""The command line as a person meets it: what it says when something is wrong, and how soon."""

import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from commands import command, small_config
from models import save_tiny
from tiny import tiny_tokenizer

from grpo_lightning.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def base(model, tmp_path):
    """A config that works, as a dict to break."""
    report = {"class_path": "grpo_lightning.callbacks.RunReport"}
    reward = "grpo_lightning.rewards.exact_match"
    saver = {"every_n_train_steps": 1, "save_last": True}
    return small_config(tmp_path, model, reward, 2, report, chat=True, **saver)


WAITS = [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "PASSIVE"}, None)]


@pytest.mark.parametrize(("given", "spins"), WAITS)
def test_threads_leave_their_core_to_those_they_wait_for(monkeypatch, given, spins):
    """Unless the user has said how they wait; torch reads it when it is loaded."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("grpo_lightning.cli.main.run", lambda argv: 0)
    assert main(["fit"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def call(config, tmp_path, *args, mode="fit"):
    """Returns (exit code, what was printed)."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = command(mode, "--config", str(tmp_path / "config.yaml"), *args, cwd=tmp_path)
    return done.code, done.out + done.err


def jsonl(tmp_path, *lines):
    (tmp_path / "bad.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return str(tmp_path / "bad.jsonl")


def put(config, key, value):
    *path, last = key.split(".")
    for part in path:
        config = config.setdefault(part, {})
    config[last] = value


GOOD = '{"prompt": "a", "answer": "1"}'

BAD = {
    "empty dataset": (lambda t: {"data.dataset": jsonl(t)}, ["bad.jsonl", "empty"]),
    "missing column": (
        lambda t: {"data.prompt_column": "question"},
        ["question", "prompt", "answer"],
    ),
    "malformed line": (lambda t: {"data.dataset": jsonl(t, GOOD, '{"prompt": ')}, ["bad.jsonl:2"]),
    "prompt too long": (
        lambda t: {"data.max_prompt_tokens": 5},
        ["max_prompt_tokens", "5", "drop", "left-truncate"],
    ),
    "group of one": (
        lambda t: {"rollout.num_generations": 1},
        ["rollout.num_generations is 1", "at least 2"],
    ),
    "more micro-batches than there are": (
        lambda t: {"rollout.micro_batches": 5, "trainer.accumulate_grad_batches": 4},
        ["rollout.micro_batches is 5", "trainer.accumulate_grad_batches is 4", "take auto"],
    ),
    "no such number of micro-batches": (
        lambda t: {"rollout.micro_batches": "few"},
        ["rollout.micro_batches", "'few'", "auto", "all"],
    ),
    "unknown loss": (lambda t: {"model.loss": {"name": "dapoo"}}, ["model.loss.name", "did you mean 'dapo'"]),
    "unknown engine": (
        lambda t: {"rollout.engine": "HFEngin"},
        ["rollout.engine is 'HFEngin' (did you mean 'HFEngine'?"],
    ),
    "tokenizer without chat template": (
        lambda t: {"model.tokenizer": plain_tokenizer(t)},
        ["chat template"],
    ),
    "prompt and completion over the context": (
        lambda t: {"rollout.sampling.max_tokens": 250},
        ["rollout.sampling.max_tokens is 250", "256", "lower"],
    ),
    "reward needs a column that is not there": (
        lambda t: {"rollout.reward_funcs": [reward_file(t, "def f(completions, gold): return completions")]},
        ["gold", "answer"],
    ),
    "option of another trainer": (lambda t: {"rollout.beta": 0.04}, ["model.loss.kl_coef"]),
    "unknown key": (
        lambda t: {"data.promts_per_rollout": 4},
        ["promts_per_rollout", "did you mean 'data.prompts_per_rollout'?"],
    ),
    "reward from os": (lambda t: {"rollout.reward_funcs": ["os.system"]}, ["os.system"]),
    "unknown lora field": (lambda t: {"model.lora": {"rank": 4}}, ["model.lora", "rank"]),
    "vllm missing": (
        lambda t: {"rollout.engine": {"class_path": "grpo_lightning.engines.VLLMEngine"}},
        ["grpo-lightning[vllm]"],
    ),
    "no such model": (lambda t: {"model.model_name": "./nowhere"}, ["model.model_name", "no such folder"]),
    "unreachable model": (
        lambda t: {"model.model_name": "nobody/nothing"},
        ["model.model_name", "nobody/nothing"],
    ),
    "config from a URL": (lambda t: {"--config": "ftp://x/y.yaml"}, ["URL"]),
}


def plain_tokenizer(tmp_path):
    tiny_tokenizer(chat_template=None).save_pretrained(tmp_path / "plain")
    return str(tmp_path / "plain")


def reward_file(tmp_path, text):
    (tmp_path / "mine.py").write_text(text)
    return f"{tmp_path / 'mine.py'}:f"


@pytest.mark.parametrize("name", BAD)
def test_bad_input_fails_at_once_with_one_message(name, base, tmp_path):
    changes, expected = BAD[name]
    args = []
    for key, value in changes(tmp_path).items():
        if key.startswith("--"):
            args += [key, value]
        else:
            put(base, key, value)
    code, text = call(base, tmp_path, *args)
    assert code == 2, text
    assert "Traceback" not in text
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, text
    for word in expected:
        assert word in text, text
    assert "Loading weights" not in text


REFUSED = {
    "rank": ({"model.lora": {"r": 0}}, "model.lora.r is 0; a rank is a whole number in 1..65536"),
    "no such module": (
        {"model.lora": {"r": 4, "target_modules": ["nothing"]}},
        "model.lora.target_modules is ['nothing']: NoMatchingPeftModuleError",
    ),
    "pattern": (
        {"model.lora": {"target_modules": "("}},
        "model.lora.target_modules is '('; it must be all-linear",
    ),
    "learning rate": (
        {"model.optimizer.init_args.lr": -1.0},
        "model.optimizer: Invalid learning rate: -1.0",
    ),
    "no GPU": ({"trainer.accelerator": "gpu"}, "trainer.accelerator is 'gpu': MisconfigurationException"),
    "attention": (
        {"model.model_kwargs": {"attn_implementation": "nonsense"}},
        "model.model_kwargs.attn_implementation is 'nonsense': ValueError",
    ),
    "logger": (
        {"trainer.logger": {"class_path": "lightning.pytorch.loggers.MLFlowLogger"}},
        "trainer.logger.class_path is 'lightning.pytorch.loggers.MLFlowLogger': ModuleNotFoundError",
    ),
    "seed": ({"seed_everything": -1}, "seed_everything is -1; it must be a number from 0 to 4294967295"),
    "no devices": ({"trainer.devices": 0}, "trainer.devices is 0: MisconfigurationException"),
    "processes": ({"trainer.devices": 1000}, "trainer.devices is 1000; it must be at most"),
    "nodes": ({"trainer.num_nodes": 2}, "trainer.num_nodes is 2; it must be 1 here"),
    "precision": ({"trainer.precision": "nonsense"}, "trainer.precision is 'nonsense': Expected"),
    "strategy": ({"trainer.strategy": "nonsense"}, "trainer.strategy is 'nonsense': ValueError"),
    "steps": ({"trainer.max_steps": "abc"}, "trainer.max_steps is 'abc': Expected a int"),
    "null": ({"model.loss": {"cov_high": None}}, "model.loss.cov_high is null"),
    "no section": (
        {"model.kernels": 3},
        "model.kernels is 3; it must be a mapping with any of head, attention",
    ),
    "graphs": (
        {"model.kernels": {"graphs": True}},
        "model.kernels.graphs is 'on', but the model is on cpu; take auto or off",
    ),
    "not a number": ({"trainer.gradient_clip_val": float("nan")}, "trainer.gradient_clip_val is nan"),
    "no checkpoint": (
        {"ckpt_path": "nowhere.ckpt"},
        "ckpt_path is 'nowhere.ckpt'; it must be last, auto, or",
    ),
    "few prompts": ({"data.prompts_per_rollout": 13}, "the dataset has 12 prompts, fewer than"),
    "engine": (
        {"rollout.sampling": {"regex": "a", "max_tokens": 6}},
        "rollout.sampling.regex and .extra need an engine",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_one_line_and_leaves_no_folder(name, base, tmp_path):
    """From Lightning, torch, peft and transformers too; with a logger, which makes its folder early."""
    changes, expected = REFUSED[name]
    del base["trainer"]["logger"]
    for key, value in changes.items():
        put(base, key, value)
    there = {*tmp_path.rglob("*"), *(tmp_path / n for n in ("config.yaml", ".out", ".err"))}
    code, text = call(base, tmp_path)
    assert code == 2, text
    assert "Traceback" not in text
    (error,) = [line for line in text.splitlines() if line.startswith("error:")]
    assert error.startswith(f"error: {expected}"), error
    assert set(tmp_path.rglob("*")) <= there


def test_a_class_path_that_moved_is_answered_with_its_new_place(base, tmp_path):
    put(base, "rollout.engine", {"class_path": "grpo_lightning.rollout.HFEngine"})
    code, text = call(base, tmp_path)
    assert code == 2
    assert (
        "error: rollout.engine: grpo_lightning.rollout.HFEngine is now grpo_lightning.engines.HFEngine\n"
        in text
    )


def test_traceback_shows_the_rest_and_is_no_option(base, tmp_path):
    put(base, "model.lora", {"r": 4, "target_modules": ["nothing"]})
    code, text = call(base, tmp_path, "--traceback")
    assert code == 2
    assert "Traceback" in text
    assert "peft" in text
    del base["model"]["lora"]["target_modules"]
    code, shown = call(base, tmp_path, "--traceback", "--print_config")
    assert code == 0
    assert "traceback:" not in shown


def test_all_unknown_options_are_reported_at_once(base, tmp_path):
    put(base, "model.beta", 0.1)
    put(base, "model.loss", {"clip_lo": 0.1})
    put(
        base,
        "rollout.engine",
        {"class_path": "grpo_lightning.engines.HFEngine", "init_args": {"batchsize": 1}},
    )
    put(base, "rollout.validation", {"sampling": {"max_new_tokens": 3}})
    put(base, "model.optimizer.init_args.learning_rate", 1.0)
    code, text = call(base, tmp_path, "--data.promts_per_rollout", "3")
    assert code == 2
    for key, hint in {
        "model.beta": "'beta' is model.loss.kl_coef here (default 0.0)",
        "model.loss.clip_lo": "did you mean 'model.loss.clip_low'?",
        "rollout.engine.init_args.batchsize": "did you mean 'rollout.engine.init_args.batch_size'?",
        "rollout.validation.sampling.max_new_tokens": "'max_new_tokens' is rollout.sampling.max_tokens here",
        "model.optimizer.init_args.learning_rate": "'learning_rate' is model.optimizer.init_args.lr here",
        "--data.promts_per_rollout": "did you mean 'data.prompts_per_rollout'?",
    }.items():
        assert f"  {key}: {hint}" in text, text


def test_a_fault_is_named_within_seconds(base, tmp_path):
    """From the start of the process; counted on the processor, which a test suite shares."""
    put(base, "data.promts_per_rollout", 4)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(base))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "grpo_lightning", "fit", "--config", str(tmp_path / "config.yaml")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert "did you mean 'data.prompts_per_rollout'?" in done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


def test_a_reward_of_the_wrong_length_names_the_function_and_the_sample(base, tmp_path):
    put(base, "rollout.reward_funcs", [reward_file(tmp_path, "def f(completions, **_): return [1.0]")])
    code, text = call(base, tmp_path)
    assert code == 1
    assert "Traceback" not in text
    (error,) = [line for line in text.splitlines() if line.startswith("error:")]
    assert "'f'" in error
    assert "16" in text


@pytest.mark.parametrize("value", ["auto", "all", 2])
def test_micro_batches_from_yaml_and_from_the_command_line(base, tmp_path, value):
    put(base, "trainer.accumulate_grad_batches", 2)
    put(base, "rollout.micro_batches", value)
    code, text = call(base, tmp_path, "--print_config")
    assert code == 0, text
    assert yaml.safe_load(text)["rollout"]["micro_batches"] == value
    put(base, "rollout.micro_batches", 1)
    code, text = call(base, tmp_path, "--rollout.micro_batches", str(value), "--trainer.max_steps", "1")
    assert code == 0, text
    assert f"(rollout.micro_batches: {value})" in text.replace("\n", "")


def test_fit_resume_validate_and_predict(base, tmp_path):
    code, text = call(base, tmp_path)
    assert code == 0, text
    assert "batch plan" in text
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    code, text = call(
        base,
        tmp_path,
        "--ckpt_path",
        "last",
        "--trainer.max_steps",
        "4",
        "--model.optimizer.init_args.lr",
        "0.005",
    )
    assert code == 0, text
    assert "+    max_steps: 4" in text.replace("+  max_steps", "+    max_steps")
    assert "lr: 0.005" in text
    put(base, "data.validation_split", 4)
    code, text = call(base, tmp_path, mode="validate")
    assert code == 0, text
    assert "val/pass@1" in text


def test_the_command_line_wins_over_the_checkpoint(base, tmp_path):
    import torch

    assert call(base, tmp_path)[0] == 0
    last = str(tmp_path / "ckpt" / "last.ckpt")
    args = ["--ckpt_path", last, "--trainer.max_steps", "3", "--model.loss.clip_low", "0.1"]
    code, text = call(base, tmp_path, *args)
    assert code == 0, text
    assert "clip_low: 0.1" in text
    assert torch.load(last, weights_only=True)["global_step"] == 3


def test_kill_after_a_step_and_resume_is_bitwise(base, tmp_path):
    put(base, "trainer.max_steps", 4)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()

    def into(folder):
        put(base, "trainer.default_root_dir", str(folder))
        base["trainer"]["callbacks"][0]["init_args"]["dirpath"] = str(folder / "ckpt")

    into(whole)
    assert call(base, tmp_path)[0] == 0
    into(killed)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(base))
    line = [sys.executable, "-m", "grpo_lightning", "fit", "--config", str(tmp_path / "config.yaml")]
    run = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    last = killed / "ckpt" / "last.ckpt"
    deadline = time.monotonic() + 60
    while not last.is_file() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    run.kill()
    assert run.wait() == -9, "the run ended before it could be killed"
    code, text = call(base, tmp_path, "--ckpt_path", str(last))
    assert code == 0, text
    name = "adapter/adapter_model.safetensors"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_print_config_shows_every_default(base, tmp_path):
    code, text = call(base, tmp_path, "--print_config")
    assert code == 0
    shown = yaml.safe_load(text)
    assert shown["trainer"]["log_every_n_steps"] == 1
    assert shown["model"]["loss"]["kl_coef"] == 0.0
    assert shown["rollout"]["sampling"]["temperature"] == 1.0


def printed(tmp_path, *configs):
    """What `--print_config` makes of configs, merged from left to right."""
    flags = [part for config in configs for part in ("--config", str(config))]
    done = command("fit", *flags, "--print_config", cwd=tmp_path)
    assert done.code == 0, done.err
    return yaml.safe_load(done.out)


CONFIGS = [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs" / "gpu").glob("smollm2*.yaml")]


@pytest.mark.parametrize("path", sorted(CONFIGS), ids=lambda p: p.stem)
def test_every_shipped_config_parses(path, tmp_path):
    assert printed(tmp_path, path)["model"]["model_name"]


@pytest.mark.parametrize("overlay", ["gpu/qwen_1.5b_lora", "gpu/qwen_7b_qlora", "engine/vllm"])
def test_overlays_for_engines_parse_on_top_of_qwen(tmp_path, overlay):
    shown = printed(tmp_path, "configs/qwen.yaml", f"configs/{overlay}.yaml")
    assert shown["rollout"]["engine"]["init_args"]["sync"] in ("auto", "adapter", "merge")
    assert shown["rollout"]["sampling"]["max_tokens"] == 512


def test_every_overlay_parses_on_top_of_the_quickstart(tmp_path):
    """What each means is tested in test_docs.py."""
    corrections = sorted((ROOT / "configs").glob("[cp]*/*.yaml"))
    overlays = corrections + sorted((ROOT / "configs" / "loss").glob("*.yaml"))
    shown = printed(tmp_path, "configs/quickstart.yaml", *overlays)
    assert len(overlays) >= 30
    assert shown["model"]["loss"]["name"] == overlays[-1].stem


def test_qwen_without_vllm_fails_with_one_line(tmp_path):
    done = command("fit", "--config", "qwen", "--trainer.accelerator", "cpu", cwd=tmp_path)
    assert done.code == 2
    assert [line for line in done.err.splitlines() if "grpo-lightning[vllm]" in line]
    assert "Traceback" not in done.err


def test_every_place_that_options_name_exists(base, tmp_path):
    from dataclasses import fields

    from peft import LoraConfig

    from grpo_lightning.migration.options import WHERE

    put(base, "rollout.engine", {"class_path": "grpo_lightning.engines.VLLMEngine"})
    put(base, "model.loss", {"adaptive_entropy": {"target": 0.2}, "kl_coef": 0.1})
    put(base, "model.reference", {"ema_alpha": 0.6})
    put(
        base,
        "model.scheduler",
        {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}},
    )
    shown = yaml.safe_load(call(base, tmp_path, "--print_config")[1])
    shown["model"]["lora"] = {f.name: None for f in fields(LoraConfig)}
    shown["model"]["model_kwargs"] = dict.fromkeys(("dtype", "revision", "attn_implementation"))
    places = [
        (name, place.rstrip("."))
        for name, text in WHERE.items()
        for place in re.findall(r"(?<![\w.])(?:model|data|rollout|trainer)\.[\w.]+", text)
    ]
    assert len(places) > 150
    for name, place in places:
        here = shown
        for key in place.split("."):
            assert key in here, f"{name} -> {place}"
            here = here[key] if isinstance(here[key], dict) else {}
