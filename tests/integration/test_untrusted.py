"""Strangers' checkpoints, configs and options: nothing of them runs, nothing is fetched."""

import os
import pickle
import resource
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
import yaml
from commands import command
from fits import data, module, rollout, trainer

from grpo_lightning import GRPOModule
from grpo_lightning.errors import ConfigError, GRPOError
from grpo_lightning.policy.model_source import loading_options
from grpo_lightning.utils.untrusted import check_local
from grpo_lightning.utils.yaml_text import DEEPEST, MOST_ALIASED


class Payload:
    """Leaves a mark on disk where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def payload(request, tmp_path):
    """A checkpoint that makes the folder `mark`, and that folder's path."""
    file, mark = tmp_path / "evil.ckpt", tmp_path / "mark"
    content = {"state_dict": {}, "x": Payload(mark)}
    if getattr(request, "param", "zip") == "zip":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    return file, mark


@pytest.fixture
def address(payload):
    """The payload's address on a local server, and the requests that reached it."""
    file, asked = payload[0], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(file.stat().st_size))
            self.end_headers()
            self.wfile.write(file.read_bytes())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/evil.ckpt", asked
    server.shutdown()


BOTH = pytest.mark.parametrize("payload", ["zip", "plain pickle"], indirect=True)
WAYS = ("fit", "validate", "test", "predict")
PLUGINS = {"ours": {}, "Lightning's": {"plugins": []}}


def go(model_folder, tmp_path, way, path, **changes):
    """Runs one of the Trainer's ways from a checkpoint."""
    own = trainer(tmp_path, rollout(), **changes)
    prompts = data(validation_split=4, test_split=4)
    getattr(own, way)(module(model_folder), datamodule=prompts, ckpt_path=path)


@BOTH
@pytest.mark.parametrize("plugins", PLUGINS)
@pytest.mark.parametrize("way", WAYS)
def test_a_local_file_with_a_payload_is_not_run(way, plugins, payload, model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # overrules a caller who says nothing
    file, mark = payload
    with pytest.raises(GRPOError, match=r"evil\.ckpt"):
        go(model_folder, tmp_path, way, str(file), **PLUGINS[plugins])
    assert not mark.exists()
    torch.load(file, weights_only=False) if file.read_bytes()[:2] == b"PK" else pickle.loads(
        file.read_bytes()
    )
    assert mark.is_dir(), "the payload works where it is let"


@pytest.mark.parametrize("plugins", PLUGINS)
@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_from_an_address_is_not_fetched(way, plugins, payload, address, model_folder, tmp_path):
    url, asked = address
    with pytest.raises(ConfigError, match="local files only: download it first"):
        go(model_folder, tmp_path, way, url, **PLUGINS[plugins])
    assert not payload[1].exists()
    assert not asked


@BOTH
def test_weights_only_false_and_load_from_checkpoint(payload, address, model_folder, tmp_path):
    file, mark = payload
    own = trainer(tmp_path, rollout())
    with pytest.raises(ConfigError, match="weights_only is False"):
        own.fit(module(model_folder), datamodule=data(), ckpt_path=str(file), weights_only=False)
    for path, message in ((str(file), "nothing of it was run"), (address[0], "local files only")):
        with pytest.raises(ConfigError, match=message):
            GRPOModule.load_from_checkpoint(path, model_name=model_folder)
    with pytest.raises(ConfigError, match="weights_only is False"):
        GRPOModule.load_from_checkpoint(file, model_name=model_folder, weights_only=False)
    assert not mark.exists()
    assert not address[1]


def test_own_checkpoints_are_read_as_ever(model_folder, tmp_path, monkeypatch):
    """From a relative path that begins like an address, again and again with one Trainer."""
    monkeypatch.chdir(tmp_path)
    own = trainer(tmp_path, rollout(), max_steps=1)
    m = module(model_folder)
    own.fit(m, datamodule=data())
    own.save_checkpoint("http-run/step:1.ckpt")
    monkeypatch.chdir(tmp_path / "http-run")
    again = trainer(tmp_path, rollout(), max_steps=2)
    for _ in range(2):
        again.validate(module(model_folder), datamodule=data(validation_split=4), ckpt_path="step:1.ckpt")
    again.fit(module(model_folder), datamodule=data(), ckpt_path="../http-run/step:1.ckpt")
    assert again.global_step == 2
    loaded = GRPOModule.load_from_checkpoint(
        "step:1.ckpt", model_name=model_folder, lora={"r": 4, "lora_alpha": 8}
    )
    for name, weight in m.policy.trainable().items():
        assert torch.equal(weight, loaded.policy.trainable()[name])


ADDRESSES = """
http://x/y.ckpt https://x/y HTTP://x/y s3://b/k gs://b/k memory://x github://a:b@c/d file:///tmp/x data:,abc
simplecache::http://x/y zip://a.ckpt::/tmp/x registry registry:team/model hf://a/b abfs://x
"""


@pytest.mark.parametrize("path", ADDRESSES.split())
def test_addresses_of_every_kind_are_refused(path):
    with pytest.raises(ConfigError, match="local files only"):
        check_local(path)


@pytest.mark.parametrize(
    "path", [None, "last", "best", "a/b.ckpt", "/a/b.ckpt", "./http/x.ckpt", "registry/x"]
)
def test_local_paths_are_left_alone(path):
    check_local(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust_remote_code": True}, "set model.trust_remote_code"),
        ({"trust_remote_code": False}, "set model.trust_remote_code"),
        ({"weights_only": False}, "always true"),
        ({"attn_implementation": "stranger/kernel"}, "compiled code from the hub"),
        ({"allow_all_kernels": True}, "compiled code from the hub"),
        ({"kernel_config": {"RMSNorm": "stranger/kernel"}}, "compiled code from the hub"),
    ],
)
def test_options_that_run_a_strangers_code_need_the_one_flag(options, message):
    with pytest.raises(ConfigError, match=message):
        loading_options("a/b", options, False)


def test_ordinary_loading_options_and_the_flag():
    given = {"dtype": "bfloat16", "revision": "main", "attn_implementation": "sdpa", "use_safetensors": False}
    assert loading_options("a/b", given, False) == given
    with pytest.warns(UserWarning, match="code that comes with a/b runs here"):
        assert loading_options("a/b", {"attn_implementation": "x/y"}, True) == {"attn_implementation": "x/y"}


def bomb(depth, merge=False):
    first = "{" + ",".join(f"k{i}: 1" for i in range(9)) + "}" if merge else "[1,2,3,4,5,6,7,8,9]"
    lines = [f"a0: &a0 {first}"]
    for i in range(1, depth):
        nine = "[" + ",".join([f"*a{i - 1}"] * 9) + "]"
        lines.append(f"a{i}: &a{i} " + (f"{{<<: {nine}}}" if merge else nine))
    return "\n".join(lines)


SHARED = """
data: {dataset_kwargs: &some {size: 3}, chat_template_kwargs: {<<: *some, more: *some}}
"""
CONFIGS = {
    "alias bomb": (bomb(12), "aliases stand for"),
    "merge bomb": (bomb(9, merge=True), "aliases stand for"),
    "alias of itself": ("model: {model_kwargs: &a {x: *a}}", "contains itself"),
    "deep": ("model: {model_kwargs: {x: " + "[" * 3000 + "]" * 3000 + "}}", f"deeper than {DEEPEST} levels"),
    "too deep for the parser": ("x: " + "[" * 200_000, f"deeper than {DEEPEST} levels"),
    "key twice": ("trainer:\n  max_steps: 1\n\ntrainer:\n  devices: 2", "line 4: 'trainer' is given twice"),
    "key twice in braces": ("trainer: {max_steps: 1, max_steps: 2}", "line 1: 'max_steps' is given twice"),
    "python tag": ("trainer: !!python/object/apply:os.mkdir [MARK]", "could not determine a constructor"),
    "python name": ("model: {optimizer: !!python/name:os.system ''}", "could not determine a constructor"),
    "config in a config": ("config: URL", "URL"),
    "section from an address": ("model: URL", "URL"),
    "callback from os": ("trainer: {callbacks: [{class_path: os.mkdir, init_args: {path: MARK}}]}", "'os'"),
    "list from an address": ("trainer: {callbacks: URL}", "URL"),
    "code of the hub": (
        "model: {model_name: a/b, model_kwargs: {trust_remote_code: true}}",
        "trust_remote_code",
    ),
    "checkpoint": ("ckpt_path: URL", "local files only"),
    "unpickle": ("ckpt_path: x.ckpt\nweights_only: false", "weights_only is False"),
}


@pytest.fixture
def quick(model_folder, tmp_path):
    """The quickstart on a tiny model, as a file."""
    (tmp_path / "quick.yaml").write_text(
        yaml.safe_dump(
            {
                "trainer": {"accelerator": "cpu", "logger": False, "default_root_dir": str(tmp_path / "run")},
                "model": {"model_name": model_folder, "lora": {"r": 4}},
                "data": {
                    "dataset": "python:grpo_lightning.data.arithmetic.sums",
                    "dataset_kwargs": {"size": 20},
                    "prompts_per_rollout": 4,
                },
                "rollout": {"reward_funcs": ["grpo_lightning.rewards.exact_match"], "num_generations": 4},
            }
        )
    )
    return tmp_path / "quick.yaml"


def refused(tmp_path, *args):
    """Returns the line that a command was refused with; nothing ran and no folder is left."""
    done = command("fit", *args, cwd=tmp_path)
    assert done.code == 2, done.out + done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "run").exists()
    return done.err


@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_configs_are_refused(name, quick, tmp_path, address):
    text, message = CONFIGS[name]
    url = address[0]
    (tmp_path / "evil.yaml").write_text(
        text.replace("URL", url.replace(".ckpt", ".yaml")).replace("MARK", str(tmp_path / "mark"))
    )
    said = refused(tmp_path, "--config", str(quick), "--config", str(tmp_path / "evil.yaml"))
    assert message.replace("URL", url.replace(".ckpt", ".yaml")) in said
    assert not address[1], "something was fetched"


ARGUMENTS = {
    "abbreviated address": (["--conf", "http://x/y.yaml"], "there is no option --conf"),
    "joined address": (["-chttp://x/y.yaml"], "configs are not read from URLs"),
    "equals address": (["--config=http://x/y.yaml"], "configs are not read from URLs"),
    "chained address": (["--config", "simplecache::http://x/y.yaml"], "configs are not read from URLs"),
    "bucket": (["-c", "s3://x/y.yaml"], "configs are not read from URLs"),
    "file address": (["--config", "file:///etc/hostname"], "configs are not read from URLs"),
    "section from an address": (["--model", "http://127.0.0.1:1/y.yaml"], "http://127.0.0.1:1/y.yaml"),
    "abbreviated": (["--trainer.max_step", "1"], "did you mean 'trainer.max_steps'?"),
    "abbreviated rollout": (["--rollout.num_generation", "4"], "did you mean 'rollout.num_generations'?"),
    "twice": (["--trainer.max_steps", "1", "--trainer.max_steps=2"], "--trainer.max_steps is given twice"),
    "checkpoint": (["--ckpt_path", "http://127.0.0.1:1/x.ckpt"], "local files only: download it first"),
    "shipped name that leaves": (["--config", "loss/../../pyproject"], "no such file"),
    "optimizer": (["--model.optimizer", "os.system"], "'os.system' comes from 'os'"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_hostile_arguments_are_refused(name, quick, tmp_path):
    arguments, message = ARGUMENTS[name]
    assert message in refused(tmp_path, "--config", str(quick), *arguments)


def test_no_environment_variable_names_a_config(quick, tmp_path, monkeypatch):
    for name in ("PL_CONFIG", "PL_FIT__CONFIG", "PL_FIT__TRAINER__MAX_STEPS", "GRPO_CONFIG"):
        monkeypatch.setenv(name, "http://127.0.0.1:1/x.yaml")
    done = fresh(quick, "--print_config", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["trainer"]["max_steps"] == -1


def fresh(quick, *args, cwd, **env):
    line = [sys.executable, "-m", "grpo_lightning", "fit", "--config", str(quick), *args]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", **env}
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=240, check=False, env=env)


def test_a_refusal_takes_seconds(quick, tmp_path):
    """On the processor, from the start of the process: a test suite shares it."""
    (tmp_path / "evil.yaml").write_text(bomb(12))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = fresh(quick, "--config", str(tmp_path / "evil.yaml"), cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


def test_healthy_arguments_are_left_alone(quick, tmp_path):
    """Several configs, anchors, lists that are appended to, and options below each of their items."""
    (tmp_path / "shared.yaml").write_text(SHARED)
    done = command(
        "fit", "-c", str(quick), f"-c{tmp_path / 'shared.yaml'}", "--config=configs/loss/grpo.yaml",
        "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "reward",
        "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor", "reward",
        "--data.system_prompt", "${HOME} is text; so is http://x.y", "--print_config", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    shown = yaml.safe_load(done.out)
    assert shown["data"]["chat_template_kwargs"] == {"size": 3, "more": {"size": 3}}
    assert [c["init_args"]["monitor"] for c in shown["trainer"]["callbacks"]] == ["reward"] * 2
    assert shown["data"]["system_prompt"] == "${HOME} is text; so is http://x.y"
    assert shown["model"]["loss"]["name"] == "grpo"


def test_a_config_may_share_many_values(quick, tmp_path):
    entries = ",".join(["*a"] * (MOST_ALIASED // 12))
    (tmp_path / "wide.yaml").write_text(
        f"data: {{dataset_kwargs: {{a: &a [1,2,3,4,5,6,7,8,9,10], b: [{entries}]}}}}\n"
    )
    done = command("fit", "-c", str(quick), "-c", str(tmp_path / "wide.yaml"), "--print_config", cwd=tmp_path)
    assert done.code == 0, done.err
    assert len(yaml.safe_load(done.out)["data"]["dataset_kwargs"]["b"]) == MOST_ALIASED // 12


SECRET = "hf_" + "0a1B2c3D4e5F6g7H8i9J" * 2
PLACES = [
    "--model.model_kwargs.token",
    "--data.dataset_kwargs.token",
    "--data.dataset_kwargs.storage_options.key",
    "--data.chat_template_kwargs.x",
    "--data.system_prompt",
    "--rollout.sampling.extra.hf_token",
    "--ckpt_path",
]


def files_with(folder, secret):
    """The files below `folder` whose content, or that of an archive's members, holds `secret`."""
    found = []
    for file in (f for f in folder.rglob("*") if f.is_file()):
        contents = [file.read_bytes()]
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                contents += [archive.read(name) for name in archive.namelist()]
        if any(secret.encode() in content for content in contents):
            found.append(file)
    return found


@pytest.mark.parametrize("key", PLACES)
def test_a_credential_on_the_command_line_is_refused_and_written_nowhere(key, quick, tmp_path):
    said = refused(tmp_path, "--config", str(quick), key, SECRET)
    assert f"error: {key.lstrip('-')} " in said
    assert "HF_TOKEN" in said
    assert not files_with(tmp_path, SECRET), "the error line is in .err"


CREDENTIALS = {
    "model": ("model: {model_kwargs: {token: SECRET}}", "model.model_kwargs.token"),
    "logger": (
        "trainer: {logger: {class_path: CSVLogger, init_args: {save_dir: x, name: SECRET}}}",
        "trainer.logger.init_args.name",
    ),
    "reward": (
        "rollout: {reward_funcs: [{class_path: grpo_lightning.rewards.format_reward, init_args: {env: "
        "{OPENAI_API_KEY: swordfish}}}]}",
        "rollout.reward_funcs[0].init_args.env.OPENAI_API_KEY",
    ),
    "data": (
        "data: {dataset_kwargs: {storage_options: {key: a, secret: swordfish}}}",
        "data.dataset_kwargs.storage_options.secret",
    ),
}


@pytest.mark.parametrize("name", CREDENTIALS)
def test_a_credential_in_a_config_is_refused_and_written_nowhere(name, quick, tmp_path):
    text, key = CREDENTIALS[name]
    evil = tmp_path / "evil.yaml"
    evil.write_text(text.replace("SECRET", SECRET))
    said = refused(tmp_path, "--config", str(quick), "--config", str(evil))
    assert f"error: {key} " in said
    assert "swordfish" not in said
    assert files_with(tmp_path, SECRET) in ([], [evil])


def test_secrets_of_the_environment_reach_no_file(quick, tmp_path):
    """A whole run with two loggers, checkpoints, samples, recorded rollouts and a resume."""
    config = yaml.safe_load(quick.read_text())
    config["trainer"] |= {
        "max_steps": 2,
        "logger": [
            {"class_path": f"lightning.pytorch.loggers.{n}", "init_args": {"save_dir": str(tmp_path / n)}}
            for n in ("CSVLogger", "TensorBoardLogger")
        ],
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"dirpath": str(tmp_path / "ckpt"), "every_n_train_steps": 1, "save_last": True},
            },
            {"class_path": "grpo_lightning.callbacks.SampleTable"},
            {"class_path": "grpo_lightning.callbacks.RunReport"},
        ],
    }
    config["rollout"] |= {"record_to": str(tmp_path / "rollouts"), "sampling": {"max_tokens": 6}}
    quick.write_text(yaml.safe_dump(config))
    secrets = {"HF_TOKEN": SECRET, "WANDB_API_KEY": "wandb-swordfish", "OPENAI_API_KEY": "openai-swordfish"}
    for args in ([], ["--ckpt_path", "last", "--trainer.max_steps", "3"]):
        done = fresh(quick, *args, cwd=tmp_path, **secrets)
        assert done.returncode == 0, done.stderr
        (tmp_path / "printed.txt").write_text(done.stdout + done.stderr)
        for secret in secrets.values():
            assert not files_with(tmp_path, secret)
    kinds = {file.suffix for file in tmp_path.rglob("*") if file.is_file()}
    assert kinds >= {".ckpt", ".yaml", ".csv", ".parquet", ".safetensors", ".json"}, kinds
    assert files_with(tmp_path, "max_tokens"), "the search finds what is there"
    assert any(file.suffix == ".ckpt" for file in files_with(tmp_path, "max_tokens"))
