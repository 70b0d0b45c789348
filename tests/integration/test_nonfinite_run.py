"""Whole runs with a number that is not finite: a step is skipped or the run stops; no ruined checkpoint."""

import math

import pytest
import torch
from fits import data, module, rollout, rows_of, same_bits, trainer, weights
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from nonfinite import BadGradient, BadLogits, BadWeight

from grpo_lightning.errors import ConfigError, EngineError, GRPOError
from grpo_lightning.losses import AdaptiveEntropy, LossConfig
from grpo_lightning.policy.reference import ReferenceConfig


def saver(root):
    return ModelCheckpoint(
        root / "ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=True
    )


def saved(root):
    return {p.stem: torch.load(p, weights_only=True) for p in (root / "ckpt").glob("*.ckpt")}


def all_finite(tree):
    if isinstance(tree, torch.Tensor):
        return not tree.is_floating_point() or bool(tree.isfinite().all())
    if isinstance(tree, dict):
        return all(map(all_finite, tree.values()))
    return all(map(all_finite, tree)) if isinstance(tree, list | tuple) else True


def assert_sound(root, *names):
    kept = saved(root)
    assert set(kept) == {*names}
    for c in kept.values():
        assert all_finite(c["state_dict"])
        assert all_finite(c["optimizer_states"])


class Trace(Callback):
    """What each optimizer step left: weights, the optimizer's state, rates."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        (o,) = trainer.optimizers
        state = {(i, k): v.clone() for i, s in enumerate(o.state.values()) for k, v in s.items()}
        self.seen.append((weights(pl_module), state, o.param_groups[0]["lr"], trainer.global_step))


def half(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


SICK = {
    "nan gradient": (BadGradient([1]), "gradient"),
    "infinite gradient": (BadGradient([1], math.inf), "gradient"),
    "nan log-probabilities": (BadLogits([1]), "loss, .* log-probabilities"),
}


@pytest.mark.parametrize("sick", SICK)
def test_one_bad_step_is_skipped_and_the_run_goes_on(model_folder, tmp_path, sick):
    callback, says = SICK[sick]
    trace = Trace()
    t = trainer(tmp_path, rollout(), callback, trace, saver(tmp_path), max_steps=4, gradient_clip_val=1.0)
    with pytest.warns(UserWarning, match=f"optimizer step 1 is skipped .*not finite: {says}"):
        t.fit(module(model_folder, scheduler=half), data())
    before, skipped, after = trace.seen[0], trace.seen[1], trace.seen[2]
    assert same_bits(before[0], skipped[0])  # weights
    assert same_bits(before[1], skipped[1])  # moments and their counters
    assert not same_bits(skipped[0], after[0])
    assert [x[2] for x in trace.seen] == pytest.approx([1e-2 * 0.5**s for s in (1, 2, 3, 4)])
    assert [x[3] for x in trace.seen] == [1, 2, 3, 4]
    counts = [float(r["train/skipped_steps"]) for r in rows_of(tmp_path) if r["grad_norm"]]
    assert counts == [0.0, 1.0, 1.0, 1.0]
    assert_sound(tmp_path, *(f"step={s}" for s in (1, 2, 3, 4)), "last")


def test_a_micro_batch_that_is_bad_takes_its_whole_step(model_folder, tmp_path):
    """Gradients of several micro-batches, of several updates, and a bonus that follows the entropy."""
    loss = LossConfig("dapo", kl_coef=0.1, adaptive_entropy=AdaptiveEntropy(target=9.0))
    trace = Trace()
    r = rollout(updates_per_rollout=2)
    t = trainer(tmp_path, r, BadLogits([2]), trace, max_steps=5, accumulate_grad_batches=2)
    m = module(model_folder, loss=loss)
    t.fit(m, data())
    w = [x[0] for x in trace.seen]
    assert same_bits(w[3], w[5])
    assert not same_bits(w[5], w[7])
    assert float(t.callback_metrics["train/skipped_steps"]) == 1.0
    assert m.coefficients.state_dict()["entropy"] == pytest.approx(4 * 0.005)  # of four steps, not five
    assert all_finite(weights(m))


@pytest.mark.parametrize("sick", [BadGradient, BadLogits])
def test_three_in_a_row_stop_the_run(model_folder, tmp_path, sick):
    t = trainer(tmp_path, rollout(), sick([1, 3, 4, 5]), saver(tmp_path), max_steps=9)
    with pytest.raises(GRPOError, match=r"3 optimizer steps in a row were skipped.*/last\.ckpt") as error:
        t.fit(module(model_folder), data())
    assert "go on with --ckpt_path" in str(error.value)
    assert_sound(tmp_path, *(f"step={s}" for s in (1, 2, 3, 4, 5)), "last")


def test_two_in_a_row_do_not(model_folder, tmp_path):
    t = trainer(tmp_path, rollout(), BadGradient([1, 2, 4, 5]), max_steps=7)
    t.fit(module(model_folder), data())
    assert float(t.callback_metrics["train/skipped_steps"]) == 4.0


def test_counts_survive_a_resume(model_folder, tmp_path):
    sick = BadGradient([1, 2, 3])
    trainer(tmp_path, rollout(), sick, saver(tmp_path), max_steps=3).fit(module(model_folder), data())
    t = trainer(tmp_path / "b", rollout(), sick, max_steps=9)
    with pytest.raises(
        GRPOError, match=r"3 optimizer steps in a row.*last good checkpoint is .*step=3\.ckpt"
    ):
        t.fit(module(model_folder), data(), ckpt_path=tmp_path / "ckpt" / "step=3.ckpt")


def test_no_checkpoint_is_no_name(model_folder, tmp_path):
    with pytest.raises(GRPOError, match="No checkpoint has been saved"):
        trainer(tmp_path, rollout(), BadGradient([0, 1, 2]), max_steps=9).fit(module(model_folder), data())


def test_weights_that_a_step_ruins_stop_the_run_at_once(model_folder, tmp_path):
    t = trainer(tmp_path, rollout(), BadWeight(2), saver(tmp_path), max_steps=9)
    with pytest.raises(GRPOError, match=r"is not finite after optimizer step 2.*ckpt/last\.ckpt"):
        t.fit(module(model_folder), data())
    assert_sound(tmp_path, "step=1", "step=2", "last")


def test_a_rate_that_a_schedule_ruins(model_folder, tmp_path):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else math.inf)

    t = trainer(tmp_path, rollout(), saver(tmp_path), max_steps=9)
    with pytest.raises(GRPOError, match=r"not finite: learning rate \(inf\)\..*/last\.ckpt"):
        t.fit(module(model_folder, scheduler=schedule), data())
    assert_sound(tmp_path, *(f"step={s}" for s in (1, 2, 3, 4)), "last")


@pytest.mark.parametrize("where", ["the weights", "the optimizer's state", "the reference policy"])
def test_a_checkpoint_that_is_not_finite_is_not_written(model_folder, tmp_path, where):
    class Ruin(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 2:
                (o,) = trainer.optimizers
                found = {
                    "the weights": lambda: next(iter(pl_module.policy.trainable().values())),
                    "the optimizer's state": lambda: next(iter(o.state.values()))["exp_avg_sq"],
                    "the reference policy": lambda: next(
                        iter(pl_module.policy.reference_copy.weights.values())
                    ),
                }[where]()
                found.data.view(-1)[-1] = math.inf

    follows = {"loss": LossConfig("dapo", kl_coef=0.1), "reference": ReferenceConfig()}
    m = module(model_folder, lora=None, **follows)
    t = trainer(tmp_path, rollout(), Ruin(), saver(tmp_path), max_steps=9)
    with pytest.raises(GRPOError, match=rf"no checkpoint is written, because {where} .*/last\.ckpt"):
        t.fit(m, data())
    assert_sound(tmp_path, "step=1", "last")


def test_a_checkpoint_of_another_day_is_looked_at(model_folder, tmp_path):
    trainer(tmp_path, rollout(), saver(tmp_path), max_steps=1).fit(module(model_folder), data())
    path = tmp_path / "ckpt" / "step=1.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    next(iter(checkpoint["state_dict"].values())).view(-1)[0] = math.nan
    torch.save(checkpoint, path)
    with pytest.raises(ConfigError, match="is not finite in the checkpoint; take an older one"):
        trainer(tmp_path, rollout(), max_steps=2).fit(module(model_folder), data(), ckpt_path=path)


def test_a_policy_that_is_ruined_between_steps_samples_nothing(model_folder, tmp_path):
    class Ruin(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 2:
                pl_module.policy.causal.get_output_embeddings().weight.data[40] = math.nan

    with pytest.raises(EngineError, match="are not finite, so no token can be drawn"):
        trainer(tmp_path, rollout(), Ruin(), max_steps=9).fit(module(model_folder), data())


@pytest.mark.parametrize("changes", [{"num_iterations": 2}, {"updates_per_rollout": 2}])
def test_scores_before_training_are_looked_at(model_folder, tmp_path, changes):
    t = trainer(tmp_path, BadLogits([2]), rollout(**changes), max_steps=9)
    with pytest.raises(
        GRPOError, match="log-probabilities of the policy, taken of a rollout before it trains"
    ):
        t.fit(module(model_folder), data())


def test_a_kl_in_the_reward_that_is_nan(model_folder, tmp_path):
    m = module(model_folder, loss=LossConfig("rloo", kl_coef=0.1))
    with pytest.raises(GRPOError, match="KL penalty of completion 0 is nan"):
        trainer(tmp_path, BadLogits([1]), rollout(), max_steps=9).fit(m, data())


@pytest.mark.parametrize("value", [math.nan, -1.0])
def test_clipping_that_cannot_work(model_folder, tmp_path, value):
    with pytest.raises(ConfigError, match=r"trainer\.gradient_clip_val is"):
        trainer(tmp_path, rollout(), max_steps=1, gradient_clip_val=value).fit(module(model_folder), data())


@pytest.mark.parametrize("lr", [math.inf, math.nan, -1.0])
def test_a_rate_that_cannot_work(model_folder, tmp_path, lr):
    m = module(model_folder, optimizer=lambda params: torch.optim.AdamW(params, lr=lr))
    with pytest.raises(ConfigError, match=r"model\.optimizer"):
        trainer(tmp_path, rollout(), max_steps=1).fit(m, data())


def test_a_healthy_run_is_the_same_run(model_folder, tmp_path, monkeypatch):
    """Checks read; nothing they do reaches the numbers."""
    kept = []
    for i, checked in enumerate((True, False)):
        if not checked:
            monkeypatch.setattr("grpo_lightning.policy.finite_checks.SkippedSteps.judge", lambda *a: 0)
            monkeypatch.setattr("grpo_lightning.modules.policy_module.check_weights", lambda m: None)
            monkeypatch.setattr("grpo_lightning.checkpoints.contents.check_saved_numbers", lambda *a: None)
        m = module(model_folder)
        t = trainer(
            tmp_path / str(i), rollout(), saver(tmp_path / str(i)), max_steps=3, gradient_clip_val=1.0
        )
        t.fit(m, data())
        kept.append(weights(m))
    assert same_bits(*kept)


# ---- a GradScaler looks for its scale by letting gradients overflow


def scaled(scale, **options):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], **options}, scaler


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_that_looks_for_its_scale_is_left_alone(model_folder, tmp_path, fused):
    settings, scaler = scaled(2.0**40)
    m = module(model_folder, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, fused=fused))
    t = trainer(tmp_path, rollout(), saver(tmp_path), max_steps=8, **settings)
    t.fit(m, data())
    assert scaler.get_scale() < 2.0**37  # it has thrown away several steps in a row
    assert float(t.callback_metrics["train/skipped_steps"]) == 0.0
    assert all_finite(weights(m))


@pytest.mark.parametrize("fused", [False, True])
def test_behind_a_scaler_steps_are_skipped_too(model_folder, tmp_path, fused):
    settings, _ = scaled(8.0)
    trace = Trace()
    m = module(model_folder, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, fused=fused))
    t = trainer(tmp_path, rollout(), BadLogits([1]), trace, max_steps=3, **settings)
    t.fit(m, data())
    assert same_bits(trace.seen[0][0], trace.seen[1][0])
    assert not same_bits(trace.seen[1][0], trace.seen[2][0])
    assert float(t.callback_metrics["train/skipped_steps"]) == 1.0


def test_a_gradient_ruined_after_the_scaler_has_looked(model_folder, tmp_path):
    settings, _ = scaled(8.0)
    t = trainer(tmp_path, rollout(), BadGradient([1, 2, 3]), saver(tmp_path), max_steps=9, **settings)
    with pytest.raises(GRPOError, match="3 optimizer steps in a row"):
        t.fit(module(model_folder), data())


def test_a_scaler_with_no_scale_left(model_folder, tmp_path):
    """The gradient stays infinite whatever the scale: this is no search."""

    class Infinite(Callback):
        def on_after_backward(self, trainer, pl_module):
            next(iter(pl_module.policy.trainable().values())).grad.fill_(math.inf)

    settings, scaler = scaled(4.0)
    with pytest.raises(GRPOError, match="3 optimizer steps in a row"):
        trainer(tmp_path, rollout(), Infinite(), max_steps=20, **settings).fit(module(model_folder), data())
    assert scaler.get_scale() <= 1.0
