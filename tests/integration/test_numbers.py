"""What is logged is what was measured, when it was measured, under one name."""

import time

import pytest
import torch
from fits import data, module, rollout, rows_of, trainer, vowels
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision

from grpo_lightning import GRPOModule
from grpo_lightning.callbacks import RunReport, ValidationConfig
from grpo_lightning.engines import HFEngine
from grpo_lightning.errors import ConfigError


class Every:
    """A reward that tells completions apart in every second rollout alone."""

    __name__ = "every"

    def __init__(self):
        self.calls = 0

    def __call__(self, completions, log_metric, **_):
        self.calls += 1
        if self.calls == 1:
            log_metric("first_call", 1.0)
        return [float(i % 2 and self.calls % 2) for i in range(len(completions))]


class Own(Callback):
    """Logs a number of its own in the first step, and keeps what callbacks see in the last."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            pl_module.log("theirs", 7.0)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.log("mine", 7.0)

    def on_train_end(self, trainer, pl_module):
        self.seen = {k: float(v) for k, v in trainer.callback_metrics.items()}


def steps_of(rows, name):
    return [int(r["step"]) for r in rows if r.get(name)]


def test_a_metric_is_absent_where_nothing_was_measured(model_folder, tmp_path):
    """Rollouts 1 and 3 teach something, 2 has constant rewards; each feeds two steps of two micro-batches."""
    own, tensorboard = Own(), TensorBoardLogger(tmp_path, name="board", version=0)
    loggers = [CSVLogger(tmp_path, name="logs", version=0), tensorboard]
    settings = {"max_steps": 6, "accumulate_grad_batches": 2, "logger": loggers}
    r = rollout(reward_funcs=[Every()], updates_per_rollout=2)
    trainer(tmp_path, r, own, **settings).fit(module(model_folder), data())
    expected = {
        "reward": [0, 2, 4],
        "time/rollout": [0, 2, 4],
        "first_call": [0],
        "check/logprob_distance_mean": [0],
        "tokens_per_second": [1, 3, 5],
        "loss": [0, 1, 2, 3, 4, 5],
        "grad_norm": [0, 1, 2, 3, 4, 5],
        "sampling/parity_mean": [0, 2, 4],  # off-policy steps have none
        "entropy": [0, 1, 2, 3, 4, 5],  # of the fair sample where a rollout has no signal
        "theirs": [0, 1, 2, 3, 4, 5],  # as Lightning has it
    }
    rows = [x for x in rows_of(tmp_path) if x["loss"]]
    assert {name: steps_of(rows, name) for name in expected} == expected
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(tensorboard.log_dir)
    events.Reload()
    assert {name: [e.step for e in events.Scalars(name)] for name in expected} == expected
    assert {"reward", "sampling/parity_mean", "first_call", "theirs"} <= own.seen.keys()


def test_loggers_get_each_value_once_at_every_nth_step_too(model_folder, tmp_path):
    """A rollout feeds two steps and a row is written after the second: what the first measured is in it."""
    settings = {"max_steps": 8, "log_every_n_steps": 2}
    r = rollout(reward_funcs=[Every()], updates_per_rollout=2)
    trainer(tmp_path, r, **settings).fit(module(model_folder), data())
    rows = rows_of(tmp_path)
    assert steps_of(rows, "reward") == [1, 3, 5, 7]
    assert steps_of(rows, "check/logprob_distance_mean") == [1]
    assert steps_of(rows, "sampling/parity_mean") == [1, 3, 5, 7]
    rewards = [float(x["reward"]) for x in rows]
    assert rewards == [0.5, 0.0, 0.5, 0.0]


def test_callbacks_find_the_latest_value(model_folder, tmp_path):
    stop = EarlyStopping("reward", mode="max", patience=50, check_on_train_epoch_end=True)
    saver = ModelCheckpoint(
        tmp_path, monitor="sampling/parity_mean", every_n_train_steps=1, filename="{step}"
    )
    r = rollout(reward_funcs=[Every()], updates_per_rollout=2)
    trainer(tmp_path, r, stop, saver, max_steps=4).fit(module(model_folder), data())
    assert saver.best_model_score is not None
    assert torch.isfinite(stop.best_score)


def test_the_curve_has_one_point_per_rollout_at_the_step_it_trains(model_folder, tmp_path):
    report = RunReport(curve=None)
    settings = {"max_steps": 6, "accumulate_grad_batches": 2}
    trainer(tmp_path, rollout(updates_per_rollout=2), report, **settings).fit(module(model_folder), data())
    logged = [float(x["reward"]) for x in rows_of(tmp_path) if x["reward"]]
    assert [step for step, _ in report.history["reward"]] == [1, 3, 5]
    assert [value for _, value in report.history["reward"]] == pytest.approx(logged, rel=1e-6)


class Slow(HFEngine):
    def generate(self, requests, sampling):
        time.sleep(0.3)
        return super().generate(requests, sampling)


def slow_reward(completions, **_):
    time.sleep(0.4)
    return vowels(completions)


class SlowOptimizer(torch.optim.SGD):
    def step(self, closure=None):
        out = super().step(closure)
        time.sleep(0.5)
        return out


PHASES = ("sync", "generate", "reward", "score", "train", "other")


@pytest.mark.parametrize("updates", [1, 2])
def test_phases_add_up_to_the_step(model_folder, tmp_path, updates):
    m = module(model_folder, optimizer=lambda p: SlowOptimizer(p, lr=0.1))
    r = rollout(engine=Slow(), reward_funcs=[slow_reward], updates_per_rollout=updates)
    trainer(tmp_path, r, max_steps=4, accumulate_grad_batches=2).fit(m, data())
    left = []
    for i, row in enumerate(rows_of(tmp_path)):
        seconds = {name: float(row[f"time/{name}"]) for name in PHASES if row.get(f"time/{name}")}
        assert sum(seconds.values()) == pytest.approx(float(row["step_time"]), rel=1e-4)
        left.append(seconds["other"] / float(row["step_time"]))
        assert seconds["train"] >= 0.5
        assert ("generate" in seconds) == ("reward" in seconds) == (i % updates == 0)
        if i % updates == 0:
            assert seconds["generate"] >= 0.3
            assert seconds["reward"] >= 0.4
            assert float(row["time/rollout"]) <= float(row["step_time"]) - seconds["train"]
    assert 0 <= min(left) <= 0.05  # a machine that is busy with others delays single steps


def test_clocks_after_a_resume_in_the_middle_of_a_rollout(model_folder, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, rollout(updates_per_rollout=2), saver, max_steps=2).fit(module(model_folder), data())
    r, began = rollout(updates_per_rollout=2), time.perf_counter()
    t = trainer(tmp_path / "b", r, max_steps=4)
    t.fit(module(model_folder), data(), ckpt_path=tmp_path / "step=1.ckpt")
    elapsed = time.perf_counter() - began
    rows = rows_of(tmp_path / "b")
    assert [int(x["step"]) for x in rows] == [1, 2, 3]
    assert sum(float(x["step_time"]) for x in rows) < elapsed
    # the rollout of the first row was made by another process: only the whole one has a rate
    assert steps_of(rows, "tokens_per_second") == [3]
    before = [float(x["num_tokens"]) for x in rows_of(tmp_path) if x["num_tokens"]]
    assert next(float(x["num_tokens"]) for x in rows if x["num_tokens"]) > before[-1]


@pytest.mark.parametrize(
    "name",
    ["reward", "num_tokens", "loss", "step_time", "grad_norm", "mine", "val/reward", "step", "epoch"],
)
def test_a_reward_function_may_not_take_the_name_of_a_metric(model_folder, tmp_path, name):
    def greedy(completions, log_metric, **_):
        log_metric(name, 9.0)
        return vowels(completions)

    settings = {"val_check_interval": 1, "check_val_every_n_epoch": None}
    t = trainer(tmp_path, rollout(reward_funcs=[greedy]), Own(), **settings)
    with pytest.raises(ConfigError, match=rf"'greedy' calls log_metric\('{name}'.*e\.g\. 'greedy/{name}'"):
        t.fit(module(model_folder), data(validation_split=4))
    assert "9.0" not in {x.get(name) for x in rows_of(tmp_path)} if t.global_step else True


def test_a_name_of_its_own_is_logged_in_every_rollout(model_folder, tmp_path):
    def polite(completions, log_metric, log_extra, **_):
        log_metric("polite/hits", 9.0)
        log_extra("upper", [c.upper() for c in completions])
        return vowels(completions)

    trainer(tmp_path, rollout(reward_funcs=[polite])).fit(module(model_folder), data())
    assert [x["polite/hits"] for x in rows_of(tmp_path)] == ["9.0"] * 3


def test_a_reward_function_may_not_take_a_column_of_the_samples(model_folder, tmp_path):
    def greedy(completions, log_extra, **_):
        log_extra("advantage", [0.0] * len(completions))
        return vowels(completions)

    with pytest.raises(ConfigError, match=r"'greedy' calls log_extra\('advantage'"):
        trainer(tmp_path, rollout(reward_funcs=[greedy])).fit(module(model_folder), data())


class Norms(Callback):
    """Computes the norm and the rate of each step on its own, in fp64."""

    def __init__(self):
        self.norms, self.rates = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        flat = torch.cat([p.grad.double().flatten() for p in pl_module.parameters() if p.grad is not None])
        self.norms.append(flat.norm().item())
        self.rates.append(optimizer.param_groups[0]["lr"])


def decaying(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, {"gradient_clip_val": 1e-4}),
        ({}, {"gradient_clip_val": 1e-4, "accumulate_grad_batches": 2}),
        ({}, {"precision": "bf16-true"}),
        ({}, {"precision": "bf16-mixed"}),
    ],
)
def test_grad_norm_and_learning_rate_are_those_of_the_step(model_folder, tmp_path, changes, settings):
    seen = Norms()
    m = module(model_folder, scheduler=decaying, **changes)
    trainer(tmp_path, rollout(), seen, **settings).fit(m, data())
    rows = rows_of(tmp_path)
    assert [float(x["grad_norm"]) for x in rows] == pytest.approx(seen.norms, rel=1e-5)
    assert min(seen.norms) > 1e-3
    assert [float(x["learning_rate"]) for x in rows] == pytest.approx([1e-2, 5e-3, 2.5e-3])
    assert seen.rates == pytest.approx([1e-2, 5e-3, 2.5e-3])


@pytest.mark.parametrize("fused", [False, True])
def test_grad_norm_does_not_know_the_scale_of_fp16(model_folder, tmp_path, fused):
    """A fused optimizer unscales while it steps; others have been given unscaled gradients."""
    norms = []
    for scale in (1.0, 256.0):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        folder = tmp_path / str(scale)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        m = module(model_folder, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, fused=fused))
        trainer(folder, rollout(), max_steps=1, plugins=[plugin]).fit(m, data())
        norms.append(float(rows_of(folder)[0]["grad_norm"]))
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


class Validated(Callback):
    def __init__(self):
        self.batches = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.batches.append((trainer.global_step, trainer.sanity_checking))


@pytest.mark.parametrize(
    ("settings", "batches"),
    [
        ({}, 4),
        ({"limit_val_batches": 2}, 2),
        ({"limit_val_batches": 0.5}, 2),
        ({"limit_val_batches": 0}, 0),
        ({"fast_dev_run": True}, 1),
    ],
)
def test_validation_before_training_is_the_trainers_own(model_folder, tmp_path, settings, batches):
    seen, report = Validated(), RunReport(curve=None)
    r = rollout(validation=ValidationConfig(before_training=True))
    t = trainer(tmp_path, r, seen, report, **{"max_steps": 1, "check_val_every_n_epoch": 5, **settings})
    t.fit(module(model_folder), data(validation_split=4, validation_batch_size=1))
    assert [at for at in seen.batches if at[0] == 0] == [(0, False)] * batches
    assert [step for step, _ in report.history["val/reward"]][:1] == [0] * (batches > 0)
    assert t.global_step == 1


def test_validation_before_training_needs_data(model_folder, tmp_path):
    r = rollout(validation=ValidationConfig(before_training=True))
    with pytest.raises(ConfigError, match="there is no validation data"):
        trainer(tmp_path, r).fit(module(model_folder), data())


def test_validation_before_training_leaves_training_as_it_is(model_folder, tmp_path):
    losses = []
    for first in (False, True):
        r = rollout(validation=ValidationConfig(before_training=first))
        m: GRPOModule = module(model_folder)
        trainer(tmp_path / str(first), r).fit(m, data(validation_split=4))
        losses.append([x["loss"] for x in rows_of(tmp_path / str(first)) if x["loss"]])
        assert m.training
    assert losses[0] == losses[1]
