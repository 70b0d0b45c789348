"""Whole runs of a tiny model that learn: no alarm speaks. And one that is sick, over two ranks' numbers."""

import json

import pytest
import torch
from commands import command
from fits import data, module, rollout, rows_of, trainer, vowels, weights

from grpo_lightning import SamplingParams
from grpo_lightning.callbacks import Health
from grpo_lightning.callbacks.alarms import ALARMS
from grpo_lightning.errors import GRPOError
from grpo_lightning.losses import LossConfig

RUNS = {
    "dapo": (11, {"loss": LossConfig("dapo")}, {"num_generations": 8}),
    "grpo with KL, two updates": (
        12,
        {"loss": LossConfig("grpo", kl_coef=0.02)},
        {"num_generations": 8, "updates_per_rollout": 2},
    ),
    "rloo, all weights": (
        13,
        {"loss": LossConfig("rloo"), "lora": None},
        {"num_generations": 8, "sampling": SamplingParams(max_tokens=12)},
    ),
}


def rate(lr):
    return lambda params: torch.optim.AdamW(params, lr=lr, weight_decay=0.0)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_learns_raises_no_alarm(model_folder, tmp_path, name):
    seed, model, settings = RUNS[name]
    health = Health(levels=dict.fromkeys(ALARMS, "stop"))
    m = module(model_folder, optimizer=rate(4e-3), **model)
    t = trainer(tmp_path, health, rollout(seed=seed, **settings), max_steps=104, max_epochs=-1)
    t.fit(m, data(seed=seed))
    assert t.global_step == 104
    rewards = [float(r["reward"]) for r in rows_of(tmp_path) if r["reward"]]
    assert sum(rewards[-20:]) > 1.2 * sum(rewards[:20])
    assert health.history.curves["grad_norm"].count == 104
    judged = {k: v.statistic(health.history) for k, v in ALARMS.items()}
    assert (judged["flat_reward"] is not None) == (len(rewards) >= 100)
    assert judged["gradient_spikes"] is not None


def test_it_changes_no_weight(model_folder, tmp_path):
    found = []
    for name, callbacks in (("without", []), ("with", [Health()])):
        m = module(model_folder)
        trainer(tmp_path / name, rollout(), *callbacks).fit(m, data())
        found.append(weights(m))
    assert all(torch.equal(found[0][k], v) for k, v in found[1].items())


CAUSES = {
    "None": (lambda completions, **_: [None] * len(completions), {}, "every reward function returned None"),
    "equal": (lambda completions, **_: [0.0] * len(completions), {}, "rewards are equal within every group"),
    "truncated": (
        vowels,
        {"sampling": SamplingParams(max_tokens=1), "mask_truncated_completions": True, "seed": 4},
        "every completion is cut at max_tokens",
    ),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_no_signal_stops_a_run_where_it_is_told_to(model_folder, tmp_path, cause):
    """F60; the model of the last case never ends a completion by itself."""
    reward, settings, why = CAUSES[cause]
    folder = model_folder
    if cause == "truncated":
        from models import save_tiny

        folder = save_tiny(tmp_path / "endless", eos_token_id=1)
    health = Health(levels={"no_signal": "stop"})
    t = trainer(tmp_path, health, rollout(reward_funcs=[reward], **settings), max_steps=9, max_epochs=-1)
    with pytest.raises(GRPOError, match=rf"no_signal at step 5: .* for 5 rollouts: {why}"):
        t.fit(module(folder), data())
    assert t.global_step == 5


@pytest.mark.parametrize("level", ["warn", "stop"])
def test_the_command_line_has_it(model_folder, tmp_path, level):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(8)))
    (tmp_path / "rewards.py").write_text("def same(completions, **_):\n    return [1.0] * len(completions)\n")
    done = command(
        "fit",
        *("--trainer.accelerator", "cpu", "--trainer.max_steps", "6", "--trainer.logger", "false"),
        *("--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.enable_checkpointing", "false"),
        *("--model.model_name", model_folder, "--model.lora", "{r: 4}"),
        *("--data.dataset", str(tmp_path / "rows.jsonl"), "--data.prompts_per_rollout", "4"),
        *("--rollout.reward_funcs+=rewards.same", "--rollout.sampling.max_tokens", "4"),
        *([] if level == "warn" else ["--health.levels", "{no_signal: stop}"]),
        cwd=tmp_path,
    )
    assert done.code == (level == "stop"), done.err
    assert done.err.count("no_signal at step 5: no completion has had a learning signal for 5 rollouts") == 1
    assert ("error: health: no_signal" in done.err) == (level == "stop")
