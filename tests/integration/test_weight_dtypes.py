"""Which type the weights that train have, and what is said where 16 bits lose their updates."""

import pytest
import torch
from fits import data, module, rollout, rows_of, trainer, weights
from lightning.pytorch.callbacks import ModelCheckpoint

from grpo_lightning.errors import ConfigError
from grpo_lightning.losses import LossConfig
from grpo_lightning.policy.reference import ReferenceConfig
from grpo_lightning.policy.weight_dtypes import WeightsChanged


def adamw(lr=1e-6):
    return lambda params: torch.optim.AdamW(params, lr=lr, weight_decay=0.0)


def full(folder, **changes):
    return module(folder, **{"lora": None, "optimizer": adamw(), **changes})


def changed(folder, root, m, steps=10, **settings):
    """Returns the share of weights that `steps` optimizer steps have changed."""
    m.configure_model()
    first = {n: p.detach().clone() for n, p in m.policy.trainable().items()}
    trainer(root, rollout(), max_steps=steps, **settings).fit(m, data())
    after = weights(m)
    return sum(int((after[n].float() != w.float()).sum()) for n, w in first.items()) / sum(
        w.numel() for w in first.values()
    )


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_full_fine_tuning_in_16_bits_is_refused_before_weights_are_loaded(model_folder, tmp_path, precision):
    m = full(model_folder)
    remedy = rf"precision is '{precision}' .*set trainer\.precision to (bf)?16-mixed"
    with pytest.raises(ConfigError, match=remedy):
        trainer(tmp_path, rollout(), precision=precision).fit(m, data())
    assert m.policy is None


def test_an_evaluation_in_16_bits_is_not(model_folder, tmp_path):
    t = trainer(tmp_path, rollout(), precision="bf16-true")
    assert t.validate(full(model_folder), data(validation_split=2))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_ten_steps_of_1e_6_change_fp32_weights(model_folder, tmp_path, precision, recwarn):
    assert changed(model_folder, tmp_path, full(model_folder), precision=precision) > 0.9
    assert "train/weights_changed" not in rows_of(tmp_path)[0]
    assert not [w for w in recwarn if "weights_changed" in str(w.message)]


def test_weights_that_are_asked_for_in_16_bits_say_what_they_lose(model_folder, tmp_path):
    m = full(model_folder, model_kwargs={"dtype": torch.bfloat16})
    with pytest.warns(UserWarning, match=r"train/weights_changed is 0\.0.*bf16-mixed") as said:
        share = changed(model_folder, tmp_path, m)
    assert sum("weights_changed" in str(w.message) for w in said) == 1
    assert share < 0.1
    logged = [float(r["train/weights_changed"]) for r in rows_of(tmp_path) if r["loss"]]
    assert len(logged) == 10
    assert max(logged) < 0.05


def test_nothing_is_said_where_16_bits_take_the_step(model_folder, tmp_path, recwarn):
    m = full(model_folder, model_kwargs={"dtype": "bfloat16"}, optimizer=adamw(1e-2))
    trainer(tmp_path, rollout(), max_steps=1).fit(m, data())
    (row,) = [r for r in rows_of(tmp_path) if r["loss"]]
    assert float(row["train/weights_changed"]) > 0.9
    assert not [w for w in recwarn if "weights_changed" in str(w.message)]


def test_what_the_checkpoint_of_the_base_decides_is_refused_too(tmp_path):
    from models import tiny_llama
    from tiny import tiny_tokenizer

    tiny_llama(eos_token_id=[1, *range(30, 47)]).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    tiny_tokenizer().save_pretrained(tmp_path / "half")
    m = full(str(tmp_path / "half"), model_kwargs={"dtype": "auto"})
    with pytest.raises(ConfigError, match=r"trains in torch\.bfloat16.*dtype to float32"):
        trainer(tmp_path, rollout()).fit(m, data())


WHOLE = [["lm_head"], ["embed_tokens"], ["norm"], ["lm_head", "embed_tokens", "norm"], ["mlp"]]


@pytest.mark.parametrize("names", WHOLE, ids="+".join)
@pytest.mark.parametrize("first", [True, False], ids=["cast", "loaded"])
def test_whole_modules_beside_an_adapter_train_in_fp32(model_folder, tmp_path, names, first):
    """Loaded in bf16 by Lightning, or loaded before and cast by it."""
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "modules_to_save": names}
    m = module(model_folder, lora=lora, optimizer=adamw(), loss=LossConfig("dapo", kl_coef=0.01))
    if first:
        m.configure_model()
    t = trainer(tmp_path, rollout(), max_steps=4, precision="bf16-true")
    t.fit(m, data())
    assert m.policy.causal.dtype == torch.bfloat16
    assert {p.dtype for p in m.policy.trainable().values()} == {torch.float32}
    copies = {n: p for n, p in m.policy.trainable().items() if "modules_to_save" in n}
    base = dict(m.policy.named_parameters(remove_duplicate=False))
    moved = total = 0
    for n, p in copies.items():
        origin = base[n.replace("modules_to_save.default", "original_module")]
        moved, total = moved + int((p != origin.float()).sum()), total + p.numel()
    assert moved > (0.5 if "embed_tokens" not in names else 0.1) * total
    gap = [float(r["sampling/sampling_logp_difference/mean"]) for r in rows_of(tmp_path) if r["loss"]]
    assert max(gap) < 0.1


def test_whole_modules_under_autocast(model_folder, tmp_path):
    lora = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]}
    m = module(model_folder, lora=lora, model_kwargs={"dtype": torch.bfloat16}, optimizer=adamw())
    trainer(tmp_path, rollout(), max_steps=2, precision="bf16-mixed").fit(m, data())
    assert {p.dtype for p in m.policy.trainable().values()} == {torch.float32}


def test_a_resume_that_would_round_the_weights_is_refused(model_folder, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=1)
    trainer(tmp_path, rollout(), saver, max_steps=1, precision="bf16-mixed").fit(full(model_folder), data())
    m = full(model_folder, model_kwargs={"dtype": torch.bfloat16})
    with pytest.raises(ConfigError, match=r"is torch\.float32 in the checkpoint and torch\.bfloat16"):
        trainer(tmp_path / "b", rollout(), max_steps=2).fit(m, data(), ckpt_path=tmp_path / "x.ckpt")
    t = trainer(tmp_path / "c", rollout())
    assert t.validate(full(model_folder), data(validation_split=2), ckpt_path=tmp_path / "x.ckpt")


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_a_reference_that_follows_is_a_mean_in_fp32(model_folder, tmp_path, precision):
    """In bf16 a step of 1e-3 of the way would round back."""
    loss, follows = LossConfig("dapo", kl_coef=0.01), ReferenceConfig(ema_alpha=1e-3, ema_every=1)
    m = module(model_folder, loss=loss, reference=follows)
    trainer(tmp_path, rollout(), max_steps=2, precision=precision).fit(m, data())
    assert {w.dtype for w in m.policy.reference_copy.weights.values()} == {torch.float32}
    moved = [w.abs().max().item() for n, w in m.policy.reference_copy.weights.items() if "lora_B" in n]
    assert min(moved) > 0


def test_only_a_few_short_tensors_are_watched():
    params = {str(i): torch.nn.Parameter(torch.zeros(1 << 18, dtype=torch.bfloat16)) for i in range(100)}
    params["long"] = torch.nn.Parameter(torch.zeros(4))
    watched = WeightsChanged(params).watched
    assert 1 <= len(watched) <= 8
    assert all(p.dtype == torch.bfloat16 for p in watched)
    assert WeightsChanged({"long": params["long"]}).watched == []


def test_whole_modules_resume_bitwise(model_folder, tmp_path):
    """Their fp32 weights are the only ones: a checkpoint holds them as they are."""
    lora = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}

    def run(root, **resume):
        m = module(model_folder, lora=lora, optimizer=adamw(1e-4))
        saver = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer(root, rollout(), saver, max_steps=2, precision="bf16-true").fit(m, data(), **resume)
        return weights(m)

    whole = run(tmp_path / "whole")
    rest = run(tmp_path / "rest", ckpt_path=tmp_path / "whole" / "step=1.ckpt")
    assert all(w.dtype == torch.float32 and torch.equal(w, rest[n]) for n, w in whole.items())
