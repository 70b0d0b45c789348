"""What a Trainer can do besides training: it works, or is refused at once with a sentence that is true."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from commands import run_ranks
from fits import data, module, rollout, rows_of, same_bits, sgd, trainer, weights
from lightning.pytorch import callbacks as theirs
from lightning.pytorch.tuner import Tuner

from grpo_lightning.errors import ConfigError

SCRIPT = Path(__file__).with_name("spawned_run.py")


@pytest.mark.parametrize("strategy", ["ddp_notebook", "ddp_spawn"])
def test_weights_come_back_from_processes_that_a_strategy_starts(model_folder, tmp_path, strategy):
    """Two ranks train as one does, and the module of the caller holds what they trained."""
    found = run_ranks(SCRIPT, tmp_path / "two", model_folder, tmp_path / "two", strategy, 2, timeout=300)
    m = module(model_folder, optimizer=sgd)
    t = trainer(tmp_path / "one", rollout())
    t.fit(m, data())
    start = module(model_folder)
    start.configure_model()
    assert not same_bits(weights(start), found["weights"])
    for name, value in weights(m).items():
        torch.testing.assert_close(found["weights"][name], value, atol=2e-5, rtol=0)
    assert found["reward"] == pytest.approx(float(t.validate(m, data(validation_split=3))[0]["val/reward"]))


def test_a_compiled_module_is_refused_at_once(model_folder, tmp_path):
    m = module(model_folder)
    with pytest.raises(ConfigError, match=r"got torch\.compile\(module\).*give it the module itself"):
        trainer(tmp_path, rollout()).fit(torch.compile(m), data())
    assert m.policy is None
    t = trainer(tmp_path, rollout(), max_steps=1)
    t.fit(m, data())
    assert t.global_step == 1


REFUSED = {
    "LearningRateFinder": lambda: theirs.LearningRateFinder(),
    "BatchSizeFinder": lambda: theirs.BatchSizeFinder(),
    "StochasticWeightAveraging": lambda: theirs.StochasticWeightAveraging(swa_lrs=1e-3),
    "EMAWeightAveraging": lambda: theirs.EMAWeightAveraging(),
    "ModelPruning": lambda: theirs.ModelPruning("l1_unstructured", amount=0.5),
    "BackboneFinetuning": lambda: theirs.BackboneFinetuning(),
    "GradientAccumulationScheduler": lambda: theirs.GradientAccumulationScheduler({0: 1, 1: 2}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_callbacks_that_cannot_do_their_work(model_folder, tmp_path, name):
    m = module(model_folder)
    with pytest.raises(ConfigError, match=name):
        trainer(tmp_path, rollout(), REFUSED[name]()).fit(m, data())
    assert m.policy is None


@pytest.mark.parametrize("kind", ["callbacks.ModelCheckpoint", "callbacks.Timer", "loggers.CSVLogger"])
def test_classes_of_another_lightning_are_refused(model_folder, tmp_path, kind):
    import pytorch_lightning

    place, _, name = kind.partition(".")
    foreign = getattr(getattr(pytorch_lightning, place), name)
    own = type("Own", (foreign,), {})
    for made in (foreign, own):
        m, thing = module(model_folder), made(tmp_path) if place == "loggers" else made()
        given = {"logger": thing} if place == "loggers" else {}
        with pytest.raises(ConfigError, match=f"{made.__name__} is of pytorch_lightning"):
            trainer(tmp_path, rollout(), *([] if given else [thing]), **given).fit(m, data())
        assert m.policy is None


@pytest.mark.parametrize(
    ("tune", "remedy"),
    [("lr_find", r"model\.optimizer\.init_args\.lr"), ("scale_batch_size", r"data\.prompts_per_rollout")],
)
def test_the_tuner(model_folder, tmp_path, tune, remedy):
    m = module(model_folder)
    with pytest.raises(ConfigError, match=remedy):
        getattr(Tuner(trainer(tmp_path, rollout())), tune)(m, datamodule=data())
    assert m.policy is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"overfit_batches": 4, "accumulate_grad_batches": 2}, r"overfit_batches is 4.*give a small dataset"),
        ({"overfit_batches": 0.5}, r"overfit_batches is 0\.5"),
        ({"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders_every_n_epochs is 1"),
        ({"fast_dev_run": True, "accumulate_grad_batches": 2}, "an epoch has 1 micro-batches"),
    ],
)
def test_options_that_would_change_what_a_rollout_is(model_folder, tmp_path, options, match):
    with pytest.raises(ConfigError, match=match):
        trainer(tmp_path, rollout(), **options).fit(module(model_folder), data())


SAME = {
    "detect_anomaly": {"detect_anomaly": True},
    "deterministic": {"deterministic": True},
    "simple profiler": {"profiler": "simple"},
    "advanced profiler": {"profiler": "advanced"},
    "inference_mode": {"inference_mode": False},
    "LambdaCallback": theirs.LambdaCallback(),
    "LearningRateMonitor": theirs.LearningRateMonitor(),
    "ThroughputMonitor": theirs.ThroughputMonitor(len, length_fn=len, window_size=2),
    "DeviceStatsMonitor": theirs.DeviceStatsMonitor(),
    "Timer": theirs.Timer(duration="00:01:00:00"),
    "EarlyStopping": theirs.EarlyStopping("reward", mode="max", check_on_train_epoch_end=True),
}


@pytest.mark.parametrize("name", SAME)
def test_what_watches_changes_no_weight(model_folder, tmp_path, name):
    """Three steps, to the same bits as without it."""
    extra = SAME[name]
    own, options = ([], extra) if isinstance(extra, dict) else ([extra], {})
    found = []
    for root, callbacks, changes in (("plain", [], {}), ("with", own, options)):
        m = module(model_folder)
        trainer(tmp_path / root, rollout(), *callbacks, **changes).fit(m, data())
        found.append(weights(m))
    assert same_bits(*found)
    if name == "LearningRateMonitor":
        assert any(r.get("lr-AdamW") for r in rows_of(tmp_path / "with"))
    if name == "ThroughputMonitor":
        assert any("samples_per_sec" in k for k in rows_of(tmp_path / "with")[-1])


def test_barebones_and_fast_dev_run_train(model_folder, tmp_path):
    m = module(model_folder)
    trainer(tmp_path / "plain", rollout(), max_steps=1).fit(m, data())
    bare = pl.Trainer(barebones=True, max_steps=1, accelerator="cpu", devices=1, callbacks=[rollout()])
    for name, t in (("bare", bare), ("fast", trainer(tmp_path, rollout(), fast_dev_run=True))):
        own = module(model_folder)
        t.fit(own, data())
        assert t.global_step == 1, name
        assert same_bits(weights(own), weights(m)), name


def test_early_stopping_stops(model_folder, tmp_path):
    stop = theirs.EarlyStopping("reward", mode="max", patience=1, check_on_train_epoch_end=True, min_delta=9)
    t = trainer(tmp_path, rollout(), stop, max_steps=-1, max_epochs=4)
    t.fit(module(model_folder), data())
    assert t.global_step == 6


def test_predictions_reach_a_writer(model_folder, tmp_path):
    class Writer(theirs.BasePredictionWriter):
        found: list = []  # noqa: RUF012 - of one test

        def write_on_batch_end(self, trainer, pl_module, prediction, *_):
            self.found += prediction["completion"]

    t = trainer(tmp_path, rollout(), Writer("batch"))
    t.predict(module(model_folder), data(), return_predictions=False)
    assert len(Writer.found) == 12


def test_health_says_what_a_run_without_signal_is(model_folder, tmp_path):
    from grpo_lightning.callbacks import Health

    def constant(completions, **_):
        return [1.0] * len(completions)

    t = trainer(tmp_path, rollout(reward_funcs=[constant]), Health(), max_steps=6)
    with pytest.warns(UserWarning, match="health: no_signal at step 5: .* for 5 rollouts: rewards are equal"):
        t.fit(module(model_folder), data())
    assert t.global_step == 6  # it warns, and the run goes on
