"""The examples run, on a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from models import save_tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def run(*command, cwd):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def fit(model, tmp_path, *args):
    """The quickstart's config on a tiny model, two steps."""
    return run(
        sys.executable,
        "-m",
        "grpo_lightning",
        "fit",
        "--config",
        str(ROOT / "configs" / "quickstart.yaml"),
        "--model.model_name",
        model,
        "--trainer.max_steps",
        "2",
        "--data.max_prompt_tokens",
        "200",
        "--trainer.enable_progress_bar",
        "false",
        *args,
        cwd=tmp_path,
    )


def test_compose(model, tmp_path):
    out = run(sys.executable, str(ROOT / "examples" / "compose.py"), model, "3", cwd=tmp_path)
    assert "step 3: reward" in out
    folder = tmp_path / "runs" / "compose"
    assert list(folder.rglob("last-adapter/adapter_model.safetensors"))
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "reward.png").is_file()


def test_custom_reward(model, tmp_path):
    file = ROOT / "examples" / "custom_reward.py"
    funcs = f"[{file}:closeness, {file}:brevity]"
    args = ["--rollout.reward_weights", "null", "--rollout.validation.pass_reward", "closeness"]
    out = fit(model, tmp_path, "--rollout.reward_funcs", funcs, *args)
    assert "closeness, brevity" in out
    header = next((tmp_path / "runs").rglob("metrics.csv")).read_text().splitlines()[0]
    assert {"rewards/closeness/mean", "rewards/brevity/mean", "longest"} <= set(header.split(","))


def test_custom_loss_in_ten_lines(model, tmp_path):
    loss = {"name": f"{ROOT / 'examples' / 'custom_loss.py'}:tanh_clip", "params": {"width": 0.1}}
    overlay = tmp_path / "tanh.yaml"
    overlay.write_text(yaml.safe_dump({"model": {"loss": loss}}))
    fit(model, tmp_path, "--config", str(overlay))
    saved = torch.load(next((tmp_path / "runs").rglob("last.ckpt")), weights_only=True)
    assert saved["global_step"] == 2
    source = (ROOT / "examples" / "custom_loss.py").read_text().split("import torch\n")[1]
    assert len([line for line in source.splitlines() if line.strip()]) <= 10
