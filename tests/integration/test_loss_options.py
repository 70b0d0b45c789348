"""Options of the loss that act over several steps: references, weights that adapt, truncated sampling."""

import warnings

import pytest
import torch
from fits import data, module, rollout, rows_of, same_bits, trainer, weights
from lightning.pytorch.callbacks import ModelCheckpoint

from grpo_lightning import SamplingParams
from grpo_lightning.errors import ConfigError, GRPOError
from grpo_lightning.losses import AdaptiveKL, CorrectionConfig, LossConfig
from grpo_lightning.policy.reference import ReferenceConfig

KL = LossConfig("dapo", kl_coef=0.1)


def column(root, name):
    return [float(r[name]) for r in rows_of(root) if r["loss"]]


@pytest.mark.parametrize("lora", [{"r": 4, "lora_alpha": 8}, None], ids=["lora", "full"])
def test_a_copied_reference_is_the_policy_of_its_last_update(model_folder, tmp_path, lora):
    """With alpha 1 every 2 steps the divergence is 0 right after an update, and only then."""
    m = module(
        model_folder,
        loss=KL,
        lora=lora,
        reference=ReferenceConfig(ema_alpha=1.0, ema_every=2),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )
    trainer(tmp_path, rollout(), max_steps=5).fit(m, data())
    kl = column(tmp_path, "kl")
    assert [x == 0.0 for x in kl] == [True, False, True, False, True]


def test_an_averaged_reference_trails_the_policy(model_folder, tmp_path):
    m = module(model_folder, loss=KL, reference=ReferenceConfig(ema_alpha=0.25, ema_every=1))
    m.configure_model()
    want = weights(m)

    class Follow(ModelCheckpoint):
        def on_train_batch_end(self, trainer, pl_module, *args):
            for name, p in weights(pl_module).items():
                want[name] += 0.25 * (p - want[name])

    trainer(tmp_path, rollout(), Follow(), max_steps=3).fit(m, data())
    for name, w in m.policy.reference_copy.weights.items():
        torch.testing.assert_close(w, want[name], atol=1e-6, rtol=0)
        assert not torch.equal(w, weights(m)[name])


@pytest.mark.parametrize("lora", [{"r": 4, "lora_alpha": 8}, None], ids=["lora", "full"])
def test_a_moving_reference_survives_a_resume(model_folder, tmp_path, lora):
    def run(root, ckpt_path=None):
        saver = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        reference = ReferenceConfig(ema_alpha=0.5, ema_every=2)
        m = module(model_folder, loss=KL, lora=lora, reference=reference)
        trainer(root, rollout(), saver, max_steps=5).fit(m, data(), ckpt_path=ckpt_path)
        return m

    whole = run(tmp_path / "a")
    for step in (1, 2, 3):
        resumed = run(tmp_path / f"b{step}", tmp_path / "a" / f"step={step}.ckpt")
        assert same_bits(weights(whole), weights(resumed))
        assert same_bits(whole.policy.reference_copy.weights, resumed.policy.reference_copy.weights)


def test_an_adapter_that_changes_the_base_is_compared_with_the_start(model_folder, tmp_path):
    """PiSSA moves part of the base into the adapter: without the adapter it is another policy."""
    lora = {"r": 4, "lora_alpha": 8, "init_lora_weights": "pissa"}
    trainer(tmp_path, rollout(), max_steps=2).fit(module(model_folder, loss=KL, lora=lora), data())
    first, second = column(tmp_path, "kl")
    assert first == 0.0
    assert second > 0.0


def test_a_reference_without_a_kl_term_is_refused(model_folder):
    with pytest.raises(ConfigError, match=r"kl_coef is 0; set kl_coef > 0"):
        module(model_folder, reference=ReferenceConfig())
    with pytest.raises(ConfigError, match=r"ema_alpha 1\.5"):
        ReferenceConfig(ema_alpha=1.5)


def test_checkpoints_of_another_reference_are_refused(model_folder, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, rollout(), saver, max_steps=1).fit(module(model_folder, loss=KL), data())
    m = module(model_folder, loss=KL, reference=ReferenceConfig())
    with pytest.raises(ConfigError, match=r"model\.reference is None in the checkpoint"):
        trainer(tmp_path, rollout()).fit(m, data(), ckpt_path=tmp_path / "step=1.ckpt")


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_adaptive_kl_follows_its_target_and_survives_a_resume(model_folder, tmp_path, kl_in):
    """A target that is never reached lowers the weight by gain * 0.2 a step; one far below raises it."""
    for target, factor in ((1e6, 0.9), (1e-12, 1.1)):
        adaptive = AdaptiveKL(target=target, gain=0.5)
        loss = LossConfig("dapo", kl_coef=0.1, kl_in=kl_in, adaptive_kl=adaptive)

        def run(root, ckpt_path=None, loss=loss):
            saver = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
            m = module(model_folder, loss=loss)
            trainer(root, rollout(), saver, max_steps=4).fit(m, data(), ckpt_path=ckpt_path)
            return weights(m), column(root, "kl_coef")

        whole, coefficients = run(tmp_path / f"a{target}")
        # the first step's divergence is 0, below any target
        want = [0.1, 0.09, 0.09 * factor, 0.09 * factor**2]
        assert coefficients == pytest.approx(want)
        resumed, rest = run(tmp_path / f"b{target}", tmp_path / f"a{target}" / "step=2.ckpt")
        assert rest == pytest.approx(want[2:])
        assert same_bits(whole, resumed)


def test_adaptive_kl_needs_a_weight_to_start_from():
    with pytest.raises(ConfigError, match="kl_coef is 0"):
        LossConfig("dapo", adaptive_kl=AdaptiveKL(target=0.1))
    with pytest.raises(ConfigError, match="target -1"):
        AdaptiveKL(target=-1)


TRUNCATED = SamplingParams(max_tokens=8, top_p=0.7, top_k=40)


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("bypass", [False, True])
def test_truncated_sampling_is_no_mismatch(model_folder, tmp_path, updates, bypass):
    """HFEngine is the trainer itself: what is left after rescoring is rounding."""
    m = module(model_folder, loss=LossConfig("dapo", correction=CorrectionConfig(bypass=bypass)))
    r = rollout(sampling=TRUNCATED, updates_per_rollout=updates)
    trainer(tmp_path, r, max_steps=2).fit(m, data())
    assert column(tmp_path, "sampling/prob_error") == pytest.approx([1.0, 1.0], abs=1e-4)
    if not bypass:
        for kind in ("min", "mean", "max"):
            name = f"sampling/importance_sampling_ratio/{kind}"
            assert column(tmp_path, name) == pytest.approx([1.0, 1.0], abs=1e-4)


def test_without_rescoring_it_would_be_one(model_folder, tmp_path, monkeypatch):
    from grpo_lightning.packing.batch import RolloutBatch

    monkeypatch.setattr(RolloutBatch, "rescored", lambda self, log_kept: self)
    callback = rollout(sampling=TRUNCATED, on_policy_mismatch="warn")
    trainer(tmp_path, callback, max_steps=1).fit(module(model_folder), data())
    assert column(tmp_path, "sampling/importance_sampling_ratio/mean")[0] < 0.9
    with pytest.raises(GRPOError, match="computes something else than the model as loaded"):
        trainer(tmp_path / "judged", rollout(sampling=TRUNCATED)).fit(module(model_folder), data())


def test_a_penalty_switches_the_correction_off_and_says_so(model_folder, tmp_path):
    sampling = SamplingParams(max_tokens=8, repetition_penalty=1.3)
    with pytest.warns(UserWarning, match="repetition_penalty makes the engine sample from something else"):
        trainer(tmp_path, rollout(sampling=sampling), max_steps=1).fit(module(model_folder), data())
    assert not any(name.startswith("sampling/") for name in rows_of(tmp_path)[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*something else")
        off = LossConfig("dapo", correction=CorrectionConfig(mode="off"))
        trainer(tmp_path / "off", rollout(sampling=sampling), max_steps=1).fit(
            module(model_folder, loss=off), data()
        )


def test_bypass_takes_no_old_pass(model_folder, tmp_path, monkeypatch):
    from grpo_lightning import GRPOModule

    calls = []
    score = GRPOModule.score
    monkeypatch.setattr(GRPOModule, "score", lambda s, b, *, old: calls.append(old) or score(s, b, old=old))
    for bypass, olds in ((True, set()), (False, {True})):
        calls.clear()
        m = module(model_folder, loss=LossConfig("dapo", correction=CorrectionConfig(bypass=bypass)))
        trainer(tmp_path / str(bypass), rollout(updates_per_rollout=2), max_steps=2).fit(m, data())
        assert {old for old in calls if old} == olds


def test_the_first_pass_has_ratio_one_bit_for_bit(model_folder, tmp_path):
    m = module(model_folder)
    trainer(tmp_path, rollout(num_iterations=2), max_steps=4, accumulate_grad_batches=2).fit(m, data())
    rows = [r for r in rows_of(tmp_path) if r["loss"]]
    assert [r["ratio/first_pass_max_error"] for r in rows] == ["0.0", "", "0.0", ""]
    assert [float(r["rollout/policy_lag"]) for r in rows] == [0.0, 1.0, 0.0, 1.0]
    assert all(float(r["rollout/step_tokens"]) > 0 for r in rows)


def test_an_error_of_the_first_pass_would_show(model_folder):
    from dataclasses import replace
    from types import SimpleNamespace

    from models import random_rollout

    b = random_rollout()
    n = len(b.target_ids)
    b = replace(b, old_logprobs=torch.full((n,), -1.0))
    m = module(model_folder)
    m._trainer = SimpleNamespace(global_step=0)
    name = "ratio/first_pass_max_error"
    assert float(m._rollout_stats(b, torch.full((n,), -0.99))[name].value) == pytest.approx(0.01, abs=1e-4)
    m._trainer = SimpleNamespace(global_step=1)
    assert name not in m._rollout_stats(b, torch.full((n,), -0.99))


def test_kl_in_the_reward_needs_a_sum_of_rewards(model_folder, tmp_path):
    m = module(model_folder, loss=LossConfig("gdpo", kl_coef=0.1, kl_in="reward"))
    with pytest.raises(ConfigError, match="normalises each reward by itself"):
        trainer(tmp_path, rollout()).fit(m, data())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ratio_level": "sequence"}, "weighs long completions more"),
        ({"name": "cispo", "ratio_level": "sequence_token"}, "not what 'cispo' was published with"),
        ({"name": "bnpo"}, "depends on how a rollout is split"),
    ],
)
def test_what_is_seldom_meant_is_said(model_folder, changes, said):
    with pytest.warns(UserWarning, match=said):
        module(model_folder, loss=LossConfig(**changes))
    (caution,) = LossConfig(**changes).resolve().cautions()
    assert said in caution
    assert LossConfig().resolve().cautions() == []
