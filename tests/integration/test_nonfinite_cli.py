"""Non-finite numbers through the command line: exit codes, one line, and what is left on disk."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from commands import command, small_config
from models import save_tiny

TESTS = str(Path(__file__).parents[1])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def fit(model, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def length(completions, **_):\n    return [len(c) / 8 for c in completions]\n"
        "def huge(completions, **_):\n    return [(-1) ** i * 1e300 for i, _ in enumerate(completions)]\n"
    )
    saver = {"every_n_train_steps": 1, "save_top_k": -1, "save_last": True}
    config = small_config(tmp_path, model, "rewards.py:length", 8, **saver)

    def run(*args, callbacks=()):
        config["trainer"]["callbacks"] += callbacks
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        done = command("fit", "--config", str(tmp_path / "config.yaml"), *args, cwd=tmp_path)
        return done.code, done.out + done.err, sorted((tmp_path / "ckpt").glob("*.ckpt"))

    return run


def bad_gradient(*steps):
    """A callback in a file of the user's, as a config names it."""
    return {"class_path": "ruin.BadGradient", "init_args": {"steps": list(steps)}}


@pytest.fixture
def ruin(tmp_path):
    (tmp_path / "ruin.py").write_text((Path(TESTS) / "nonfinite.py").read_text())


def assert_finite(paths):
    for path in paths:
        held = torch.load(path, weights_only=True)
        states = [t for o in held["optimizer_states"] for s in o["state"].values() for t in s.values()]
        for tensor in (*held["state_dict"].values(), *states):
            assert tensor.isfinite().all(), path


def test_nan_gradients_stop_the_run_and_no_checkpoint_holds_one(fit, ruin):
    code, said, kept = fit(callbacks=[bad_gradient(*range(2, 99))])
    assert code == 1
    (error,) = re.findall(r"^error: .*$", said, re.MULTILINE)
    assert "3 optimizer steps in a row were skipped, the last is step 4; not finite: gradient." in error
    assert re.search(r"The last good checkpoint is \S*/ckpt/last\.ckpt: go on with --ckpt_path", error)
    assert "Traceback" not in said
    assert [p.stem[-1] for p in kept] == ["1", "2", "3", "4", "t"]
    assert_finite(kept)


def test_one_nan_gradient_is_skipped_and_said(fit, ruin):
    code, said, kept = fit(callbacks=[bad_gradient(2)])
    assert code == 0, said
    assert "optimizer step 2 is skipped" in said
    assert len(kept) == 9
    assert_finite(kept)


@pytest.mark.parametrize("lr", ["1e400", ".nan", "-1"])
def test_a_learning_rate_that_is_not_finite_is_refused(fit, lr):
    code, said, kept = fit(f"--model.optimizer.lr={lr}")
    assert code == 2
    assert re.search(r"^error: model\.optimizer.*(inf|nan|-1)", said, re.MULTILINE), said
    assert "Traceback" not in said
    assert not kept


def test_a_huge_reward_is_an_error_with_the_sample(fit):
    code, said, kept = fit("--rollout.reward_funcs", '["rewards.py:huge"]')
    assert code == 1
    assert "reward function 'huge' returned 1e+300 for completion 0" in said
    assert "say " in said
    assert not kept


@pytest.mark.parametrize(
    "option",
    [
        "rollout.sampling.temperature=.inf",
        "rollout.sampling.temperature=.nan",
        "rollout.sampling.top_p=.nan",
        "rollout.advantage_clip=[1.0, -1.0]",
        "rollout.reward_weights=[0.0]",
        "rollout.reward_weights=[.nan]",
        "model.loss.kl_coef=.nan",
        "model.loss.clip_low=.nan",
        "model.loss.clip_high=-.inf",
        "model.lora.lora_alpha=.nan",
        "trainer.gradient_clip_val=.nan",
        "trainer.gradient_clip_val=-1",
    ],
)
def test_options_are_refused_in_one_line_before_anything_runs(fit, option, tmp_path):
    code, said, _ = fit(f"--{option}")
    assert code == 2, said
    assert len(re.findall(r"^error: ", said, re.MULTILINE)) == 1, said
    assert option.partition("=")[0].rpartition(".")[2] in said
    assert "Traceback" not in said
    assert "batch plan" not in said


def test_a_loss_that_returns_a_scalar_is_refused(fit, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def mean(ratio, advantages):\n    return -(ratio * advantages).mean()\n"
    )
    code, said, _ = fit("--model.loss.name", "mine.py:mean")
    assert code == 2
    assert "mean returned shape (), expected shape (6,): one value per token" in said
    assert "batch plan" not in said
