"""Whole runs of the Trainer on a tiny model: learning, splits, resume, validation."""

from dataclasses import replace

import pytest
import torch
from fits import ROWS, data, module, rollout, rows_of, same_bits, sgd, trainer, vowels, weights
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from grpo_lightning import PromptDataModule, SamplingParams
from grpo_lightning.callbacks import RunReport, SampleTable, ValidationConfig
from grpo_lightning.engines import HFEngine, ReplayEngine
from grpo_lightning.errors import ConfigError, EngineError
from grpo_lightning.losses import RECIPES, AdaptiveEntropy, LossConfig


def test_reward_rises_and_metrics_have_trls_names(model_folder, tmp_path):
    m = module(model_folder)
    trainer(tmp_path, rollout(num_generations=8), RunReport(), max_steps=25).fit(m, data())
    rows = rows_of(tmp_path)
    rewards = [float(r["reward"]) for r in rows if r["reward"]]
    assert len(rewards) == 25
    assert sum(rewards[-5:]) > sum(rewards[:5]) * 2
    expected = {
        "loss",
        "num_tokens",
        "step_time",
        "completions/mean_length",
        "completions/min_length",
        "completions/max_length",
        "completions/clipped_ratio",
        "completions/mean_terminated_length",
        "rewards/vowels/mean",
        "rewards/vowels/std",
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "entropy",
        "clip_ratio/low_mean",
        "clip_ratio/high_mean",
        "clip_ratio/region_mean",
        "sampling/sampling_logp_difference/mean",
        "tokens_per_second",
    }
    assert expected <= set(rows[0])
    assert max(float(r["sampling/sampling_logp_difference/max"]) for r in rows if r["reward"]) < 1e-4
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
    tokens = [float(r["num_tokens"]) for r in rows if r["num_tokens"]]
    assert tokens == sorted(tokens)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo"])
def test_accumulation_does_not_change_the_step(model_folder, tmp_path, name, k):
    results = []
    for parts in (1, k):
        m = module(model_folder, loss=LossConfig(name, kl_coef=0.05), optimizer=sgd)
        trainer(tmp_path / str(parts), rollout(), accumulate_grad_batches=parts).fit(m, data())
        results.append(weights(m))
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, atol=2e-5, rtol=0)


class Gradients(Callback):
    """Keeps the gradient of the first optimizer step."""

    def __init__(self):
        self.found: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not self.found:
            self.found = {n: p.grad.clone() for n, p in pl_module.policy.trainable().items()}


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo"])
def test_32_completions_split_1_2_4_give_one_gradient(model_folder, tmp_path, name):
    grads = []
    for k in (1, 2, 4):
        seen = Gradients()
        m = module(model_folder, loss=LossConfig(name))
        settings = {"max_steps": 1, "accumulate_grad_batches": k}
        trainer(tmp_path / str(k), rollout(num_generations=8), seen, **settings).fit(m, data())
        grads.append(seen.found)
    scale = max(1.0, max(g.abs().max().item() for g in grads[0].values()))
    assert any(g.abs().max() > 1e-4 for g in grads[0].values())
    for other in grads[1:]:
        assert max((other[n] - g).abs().max().item() for n, g in grads[0].items()) <= 1e-6 * scale


REQUIRED = {"dro": {"dro_coef": 0.1}}


@pytest.mark.parametrize("name", [n for n in RECIPES if n != "bnpo"])
def test_every_recipe_trains_and_does_not_depend_on_the_split(model_folder, tmp_path, name):
    """Two updates per rollout: in the second, ratios are not 1."""
    changes = {"cov_frac": 0.1, "cov_low": -1.0} if "cov" in name else REQUIRED.get(name, {})
    results = []
    for k in (1, 2):
        m = module(model_folder, loss=LossConfig(name, **changes), optimizer=sgd)
        r = rollout(
            reward_funcs=[vowels, lambda completions, **_: [len(c) / 8 for c in completions]],
            updates_per_rollout=2,
        )
        trainer(tmp_path / str(k), r, max_steps=2, accumulate_grad_batches=k).fit(m, data())
        results.append(weights(m))
    moved = max(w.abs().max().item() for n, w in results[0].items() if "lora_B" in n)
    assert moved > 0
    worst = max((results[1][n] - w).abs().max().item() for n, w in results[0].items())
    assert worst <= 1e-5 * max(1.0, moved)


def test_top_entropy_tokens_train_alike_under_any_split(model_folder, tmp_path):
    results = []
    for k in (1, 4):
        loss = LossConfig("dapo", top_entropy_quantile=0.3, entropy_coef=0.01)
        m = module(model_folder, loss=loss, optimizer=sgd)
        trainer(tmp_path / str(k), rollout(), max_steps=2, accumulate_grad_batches=k).fit(m, data())
        results.append(weights(m))
    for n, w in results[0].items():
        torch.testing.assert_close(results[1][n], w, atol=1e-5, rtol=0)


def test_bnpo_gradient_depends_on_the_split_and_says_so(model_folder, tmp_path):
    grads = []
    for k in (1, 4):
        seen = Gradients()
        with pytest.warns(UserWarning, match="depends on how a rollout is split"):
            m = module(model_folder, loss=LossConfig("bnpo"))
        trainer(tmp_path / str(k), rollout(), seen, max_steps=1, accumulate_grad_batches=k).fit(m, data())
        grads.append(seen.found)
    assert max((grads[1][n] - g).abs().max().item() for n, g in grads[0].items()) > 1e-5


def test_several_updates_per_rollout_use_old_logprobs(model_folder, tmp_path):
    m = module(model_folder)
    r = rollout(updates_per_rollout=2, num_iterations=2)
    trainer(tmp_path, r, max_steps=8, accumulate_grad_batches=2).fit(m, data())
    rows = [x for x in rows_of(tmp_path) if x["loss"]]
    assert len(rows) == 8
    # fresh samples after four optimizer steps
    assert [int(x["step"]) for x in rows if x["time/rollout"]] == [0, 4]


def test_first_pass_after_an_update_clips_something(model_folder, tmp_path):
    m = module(
        model_folder,
        optimizer=lambda p: torch.optim.SGD(p, lr=50.0),
        loss=LossConfig("grpo", clip_low=0.01, clip_high=0.01),
    )
    trainer(tmp_path, rollout(num_iterations=2), max_steps=2).fit(m, data())
    first, second = [x for x in rows_of(tmp_path) if x["loss"]]
    assert float(first["clip_ratio/region_mean"]) == 0
    assert float(second["clip_ratio/region_mean"]) > 0


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("updates", [1, 2])
def test_resume_after_any_step_is_bitwise(model_folder, tmp_path, k, updates):
    steps = 6

    def run(root, ckpt_path=None, **saving):
        m = module(model_folder, loss=LossConfig("dapo", kl_coef=0.02))
        saver = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        t = trainer(
            root, rollout(updates_per_rollout=updates), saver, max_steps=steps, accumulate_grad_batches=k
        )
        torch.manual_seed(99 if ckpt_path else 0)
        t.fit(m, data(), ckpt_path=ckpt_path)
        return weights(m)

    whole = run(tmp_path / "whole")
    saved = sorted((tmp_path / "whole").glob("*.ckpt"))
    assert len(saved) == steps
    for file in saved:
        assert same_bits(run(tmp_path / f"from-{file.stem}", str(file)), whole), file.name


def test_checkpoint_holds_what_trains_and_an_adapter_beside_it(model_folder, tmp_path):
    m = module(model_folder)
    trainer(tmp_path, rollout(), ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=3)).fit(
        m, data()
    )
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {f"policy.{n}" for n in m.policy.trainable()}
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "x-adapter"
    )
    ids = torch.tensor([[5, 6, 7]])
    with m.policy.generating() as causal, torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, causal(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": {"r": 2, "lora_alpha": 8}}, r"model\.lora is .*'r': 4"),
        ({"lora": None}, r"model\.lora"),
    ],
)
def test_checkpoint_of_another_adapter_is_refused(model_folder, tmp_path, change, message):
    saver = ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=1)
    trainer(tmp_path, rollout(), saver, max_steps=1).fit(module(model_folder), data())
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path / "b", rollout()).fit(
            module(model_folder, **change), data(), ckpt_path=tmp_path / "x.ckpt"
        )


def test_validation_logs_where_lightnings_callbacks_look(model_folder, tmp_path):
    m = module(model_folder)
    r = rollout(validation=ValidationConfig(pass_threshold=0.25, before_training=True))
    stop = EarlyStopping("val/pass@1", patience=0, mode="min", check_on_train_epoch_end=False)
    saver = ModelCheckpoint(tmp_path, monitor="val/reward", mode="max", filename="best")
    settings = {"max_steps": 12, "val_check_interval": 2, "check_val_every_n_epoch": None}
    t = trainer(tmp_path, r, stop, saver, SampleTable(every_n_steps=2), RunReport(), **settings)
    t.fit(m, data(validation_split=4))
    assert t.global_step < 12
    assert (tmp_path / "best.ckpt").is_file()
    rows = rows_of(tmp_path)
    assert rows[0]["val/reward"]
    assert {"val/pass@1", "val/rewards/vowels/mean", "val/completions/mean_length"} <= set(rows[0])
    assert list((tmp_path / "completions").glob("*.parquet"))


def test_validation_leaves_training_as_it_is(model_folder, tmp_path):
    results = []
    for limit in (0, 1.0):
        m = module(model_folder)
        settings = {"val_check_interval": 1, "check_val_every_n_epoch": None, "limit_val_batches": limit}
        trainer(tmp_path / str(limit), rollout(), **settings).fit(m, data(validation_split=4))
        results.append(weights(m))
    assert same_bits(*results)


def test_validate_test_and_predict_without_fit(model_folder, tmp_path):
    m, r, d = module(model_folder), rollout(), data(validation_split=4, test_split=3)
    (val,) = trainer(tmp_path, r).validate(m, d, verbose=False)
    (test,) = trainer(tmp_path, r).test(m, d, verbose=False)
    assert {"val/reward", "val/pass@1"} <= set(val)
    assert {"test/reward", "test/pass@1"} <= set(test)
    predicted = trainer(tmp_path, r).predict(m, d)
    assert sum(len(p["completion"]) for p in predicted) == 3
    assert {"prompt", "completion", "vowels", "reward"} <= set(predicted[0])


def test_sampled_validation_estimates_pass_at_1(model_folder, tmp_path):
    config = ValidationConfig(num_generations=4, sampling=SamplingParams(max_tokens=8), pass_threshold=0.1)
    (val,) = trainer(tmp_path, rollout(validation=config)).validate(
        module(model_folder), data(validation_split=4), verbose=False
    )
    assert 0 <= val["val/pass@1"] <= 1
    assert (val["val/pass@1"] * 16) % 1 == pytest.approx(0, abs=1e-5)
    with pytest.raises(ConfigError, match="num_generations is 4"):
        ValidationConfig(num_generations=4)


def test_replayed_rollouts_train_to_the_same_weights(model_folder, tmp_path):
    first = module(model_folder)
    trainer(tmp_path / "a", rollout(record_to=str(tmp_path / "record"))).fit(first, data())
    second = module(model_folder)
    trainer(tmp_path / "b", rollout(engine=ReplayEngine(str(tmp_path / "record")))).fit(second, data())
    assert same_bits(weights(first), weights(second))


def test_full_fine_tuning_with_reference(model_folder, tmp_path):
    m = module(
        model_folder,
        lora=None,
        loss=LossConfig("grpo", kl_coef=0.1),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
    )
    trainer(tmp_path, rollout()).fit(m, data())
    kl = [float(r["kl"]) for r in rows_of(tmp_path) if r["kl"]]
    assert kl[0] == 0
    assert kl[-1] > 0


def test_bf16_true_keeps_fp32_adapters(model_folder, tmp_path):
    m = module(model_folder)
    trainer(tmp_path, rollout(), precision="bf16-true").fit(m, data())
    assert m.policy.causal.dtype == torch.bfloat16
    assert {p.dtype for p in m.policy.trainable().values()} == {torch.float32}
    name = "sampling/sampling_logp_difference/mean"
    distances = [float(r[name]) for r in rows_of(tmp_path) if r[name]]
    assert len(distances) > 0
    assert max(distances) < 0.1


def test_dead_groups_are_skipped_without_changing_the_step(model_folder, tmp_path, monkeypatch):
    from grpo_lightning.packing.batch import RolloutBatch

    def sparse(completions, prompts, **_):
        return [
            0.0 if "say 1" in str(p) else c.count("e") / 4 for c, p in zip(completions, prompts, strict=True)
        ]

    results = []
    for skip in (True, False):
        if not skip:
            monkeypatch.setattr(RolloutBatch, "zero_variance_groups", lambda self: set())
        m = module(model_folder)
        trainer(tmp_path / str(skip), rollout(reward_funcs=[sparse]), max_steps=2).fit(m, data())
        results.append(weights(m))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-5, rtol=0)


def test_constant_reward_changes_nothing(model_folder, tmp_path):
    m = module(model_folder)
    m.configure_model()
    before = weights(m)
    trainer(tmp_path, rollout(reward_funcs=[lambda completions, **_: [1.0] * len(completions)])).fit(
        m, data()
    )
    assert same_bits(before, weights(m))
    assert all(float(r["frac_reward_zero_std"]) == 1 for r in rows_of(tmp_path) if r["loss"])


def test_a_stale_engine_is_an_error(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(HFEngine, "sync", lambda self, policy, version: setattr(self, "_policy", policy))
    with pytest.raises(EngineError, match="serves policy version -1, but version 0"):
        trainer(tmp_path, rollout()).fit(module(model_folder), data())


class Unsized:
    """A loader that Lightning would read one batch ahead."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


def test_a_loader_without_length_is_refused(model_folder, tmp_path):
    class Data(PromptDataModule):
        def train_dataloader(self):
            return Unsized(super().train_dataloader())

    with pytest.raises(ConfigError, match="has no length"):
        trainer(tmp_path, rollout()).fit(module(model_folder), Data(ROWS, prompts_per_rollout=4))


def test_an_epoch_of_broken_rollouts_is_refused(model_folder, tmp_path):
    t = trainer(tmp_path, rollout(), accumulate_grad_batches=2, limit_train_batches=3)
    with pytest.raises(ConfigError, match="not a multiple of the 2"):
        t.fit(module(model_folder), data())


def test_a_sleeping_engine_is_woken_by_validation(model_folder, tmp_path):
    log = []

    class Sleeper(HFEngine):
        def sync(self, source, version):
            log.append(f"sync {version}")
            super().sync(source, version)

        def generate(self, requests, sampling):
            log.append("generate")
            return super().generate(requests, sampling)

        def sleep(self):
            log.append("sleep")

    settings = {"val_check_interval": 1, "check_val_every_n_epoch": None, "max_steps": 2}
    trainer(tmp_path, rollout(engine=Sleeper()), **settings).fit(
        module(model_folder), data(validation_split=4, validation_batch_size=2)
    )
    step = ["generate", "sleep"]
    val = ["generate", "generate", "sleep"]
    assert log == ["sync 0", *step, "sync 1", *val, *step, "sync 2", *val]


def test_dropped_groups_leave_the_normalisers(model_folder, tmp_path):
    """With half of the groups dead, token_mean of `drop` weighs the living tokens more than `keep` does."""

    def half(completions, prompts, **_):
        return [
            0.0 if "say 1" in str(p) else c.count("e") / 4 for c, p in zip(completions, prompts, strict=True)
        ]

    grads = {}
    for policy in ("keep", "drop"):
        seen = Gradients()
        r = rollout(reward_funcs=[half], zero_variance_groups=policy)
        trainer(tmp_path / policy, r, seen, max_steps=1).fit(module(model_folder), data())
        grads[policy] = seen.found
    dropped = float(next(r for r in rows_of(tmp_path / "drop") if r["loss"])["rollout/dropped_groups"])
    assert 0 < dropped < 4
    norm = {k: sum(float(g.norm()) ** 2 for g in v.values()) ** 0.5 for k, v in grads.items()}
    assert norm["drop"] > norm["keep"] * 1.05


def test_adaptive_entropy_follows_its_target_and_survives_a_resume(model_folder, tmp_path):
    loss = LossConfig("dapo", adaptive_entropy=AdaptiveEntropy(target=100.0, delta=0.25, max=0.6))

    def run(root, ckpt_path=None):
        saver = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        m = module(model_folder, loss=loss)
        trainer(root, rollout(), saver, max_steps=4).fit(m, data(), ckpt_path=ckpt_path)
        return weights(m), [float(r["entropy_coef"]) for r in rows_of(root) if r["loss"]]

    whole, coefficients = run(tmp_path / "a")
    assert coefficients == pytest.approx([0.0, 0.25, 0.5, 0.6])
    resumed, rest = run(tmp_path / "b", tmp_path / "a" / "step=2.ckpt")
    assert rest == pytest.approx([0.5, 0.6])
    assert same_bits(whole, resumed)


def test_adaptive_entropy_stays_silent_above_its_target(model_folder, tmp_path):
    loss = LossConfig("dapo", entropy_coef=0.5, adaptive_entropy=AdaptiveEntropy(target=0.0))
    m = module(model_folder, loss=loss)
    trainer(tmp_path, rollout(), max_steps=2).fit(m, data())
    assert [float(r["entropy_coef"]) for r in rows_of(tmp_path) if r["loss"]] == [0.0, 0.0]
    with pytest.raises(ConfigError, match="adaptive_entropy has min 2"):
        AdaptiveEntropy(min=2.0)


def test_kl_in_the_reward_lowers_what_left_the_reference(model_folder, tmp_path):
    """With a constant reward the penalty is the only signal: the policy goes back towards its reference."""

    def constant(completions, **_):
        return [1.0] * len(completions)

    gaps = {}
    for coef in (0.0, 5.0):
        torch.manual_seed(0)
        m = module(
            model_folder,
            loss=LossConfig("rloo", kl_coef=coef),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.002),
        )
        m.configure_model()
        g = torch.Generator().manual_seed(1)
        for name, p in m.policy.trainable().items():
            if "lora_B" in name:
                p.data.normal_(std=0.15, generator=g)
        trainer(tmp_path / str(coef), rollout(reward_funcs=[constant]), max_steps=20).fit(m, data())
        from models import random_rollout

        b = random_rollout(seed=8)
        with torch.no_grad():
            on = m.policy.logprobs(b).logprobs
            with m.policy.reference():
                off = m.policy.logprobs(b).logprobs
        gaps[coef] = (on - off).abs().mean().item()
    assert gaps[5.0] < gaps[0.0] * 0.95


def test_the_penalty_is_the_summed_log_ratio():
    """losses.md G4: old minus reference, summed over each completion of fixture F."""
    from models import random_rollout

    from grpo_lightning.losses.token_selection import reference_gap

    b = random_rollout().take([])
    assert reference_gap(replace(b, old_logprobs=torch.zeros(0), ref_logprobs=torch.zeros(0))).numel() == 0
    b = random_rollout(prompts=1, group=2, seed=2)
    n = len(b.target_ids)
    b = replace(b, old_logprobs=torch.full((n,), -1.0), ref_logprobs=torch.full((n,), -1.5))
    assert reference_gap(b).tolist() == pytest.approx([0.5 * length for length in b.lengths])


@pytest.mark.parametrize("lora_dropout", [0.0, 0.4])
def test_dropout_is_not_taken_for_another_policy(model_folder, tmp_path, lora_dropout):
    m = module(
        model_folder, lora={"r": 4, "lora_alpha": 8, "lora_dropout": lora_dropout}, optimizer=big_steps
    )
    trainer(tmp_path, rollout(), max_steps=3).fit(m, data())
    parity = max(float(r["sampling/parity_mean"]) for r in rows_of(tmp_path) if r["sampling/parity_mean"])
    assert (parity > 0.02) == (lora_dropout > 0)


def big_steps(params):
    return torch.optim.AdamW(params, lr=0.1)
