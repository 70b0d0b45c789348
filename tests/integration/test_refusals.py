"""What cannot work, or would not be the same run again, is refused by name or said."""

import pytest
import torch
from fits import data, module, rollout, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from models import random_rollout

from grpo_lightning.errors import ConfigError, GRPOError
from grpo_lightning.kernels.config import KernelConfig
from grpo_lightning.losses import CorrectionConfig, LossConfig


@pytest.mark.parametrize(
    ("lora", "match"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "no checkpoint could be resumed; take 'pissa'"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"modules_to_save: \[lm_head\]"),
    ],
)
def test_adapters(model_folder, tmp_path, lora, match):
    m = module(model_folder, lora={"r": 4, "lora_alpha": 8, **lora})
    with pytest.raises(ConfigError, match=match):
        trainer(tmp_path, rollout(), max_steps=1).fit(m, data())


@pytest.mark.parametrize(
    "changes", [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 64}}, {"init_lora_weights": "pissa"}]
)
def test_a_resume_with_another_adapter(model_folder, tmp_path, changes):
    lora = {"r": 4, "lora_alpha": 8}
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, rollout(), saver, max_steps=1).fit(module(model_folder, lora=lora), data())
    other = module(model_folder, lora={**lora, **changes})
    with pytest.raises(ConfigError, match=r"model\.lora is .* in the checkpoint"):
        trainer(tmp_path, rollout()).fit(other, data(), ckpt_path=tmp_path / "step=1.ckpt")


@pytest.mark.parametrize(
    "changes",
    [
        {"sapo_tau_pos": 0.0},
        {"cispo_weight_min": 9.0},
        {"entropy_coef": -1.0},
        {"cov_low": 6.0},
        {"fipo_gamma": 2.0},
        {"log_clip_low": -1.0},
        {"dppo_weight_max": 0.0},
    ],
)
def test_values_that_cannot_work(changes):
    (key,) = changes
    with pytest.raises(ConfigError, match=rf"model\.loss\.{key} is .*; it must be"):
        LossConfig("dapo", **changes)


def test_options_of_the_module(model_folder, tmp_path):
    for changes, match in (
        ({"gradient_checkpointing": "ofload"}, "must be true, false or offload"),
        ({"quantization": "int8"}, "must be null or nf4"),
        ({"quantization": "nf4", "model_kwargs": {"dtype": "auto"}}, "must be a type, e.g. bfloat16"),
    ):
        with pytest.raises(ConfigError, match=match):
            trainer(tmp_path, rollout(), max_steps=1).fit(module(model_folder, **changes), data())
    with pytest.raises(ConfigError, match=r"correction\.low is -1"):
        CorrectionConfig(low=-1.0)


def test_yamls_on_and_off():
    assert KernelConfig(lora=True) == KernelConfig(lora="on")
    assert KernelConfig(lora=False) == KernelConfig(lora="off")
    assert CorrectionConfig(mode=False).mode == "off"
    with pytest.raises(ConfigError, match=r"correction\.mode is True"):
        CorrectionConfig(mode=True)


@pytest.mark.parametrize("kernel", ["head", "loss"])
def test_a_triton_kernel_without_a_gpu(monkeypatch, kernel):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=f"kernels.{kernel} is 'on', but the model is on cpu; take auto"):
        KernelConfig(**{kernel: "on"}).chosen(torch.device("cpu"))


def test_micro_batches_without_trainable_tokens(model_folder, tmp_path):
    """Prompts are there, tokens are not; in either layout nothing runs, and the step goes on."""
    for shared in ("on", "off"):
        m = module(model_folder, kernels=KernelConfig(shared_prompts=shared))
        m.configure_model()
        b = random_rollout(prompts=2, group=2, longest=0)
        assert len(m.policy.logprobs(b).logprobs) == 0


def test_a_second_fit_checks_again_and_can_go_back(model_folder, tmp_path, monkeypatch):
    from grpo_lightning.kernels import lora as lora_layers

    m = module(model_folder, kernels=KernelConfig(lora="on"))
    trainer(tmp_path / "a", rollout(), max_steps=1).fit(m, data())
    m.kernels = KernelConfig(lora="off")
    trainer(tmp_path / "b", rollout(), max_steps=1).fit(m, data())
    assert not any(type(x).__name__.startswith("Fused") for x in m.policy.modules())
    m.kernels = KernelConfig(lora="on")
    monkeypatch.setattr(lora_layers, "lora_linears", lambda x, ls: [x @ ls[0].weight.T * 1.1])
    with pytest.raises(GRPOError, match="Kernels: lora"):
        trainer(tmp_path / "c", rollout(), max_steps=1).fit(m, data())


def test_a_kernel_that_has_nothing_to_do_says_so(model_folder, tmp_path):
    m = module(model_folder, kernels=KernelConfig(lora="on"))
    with pytest.warns(UserWarning, match=r"lora: 14 of 14 modules run their own forward \(autocast\)"):
        trainer(tmp_path / "a", rollout(), max_steps=1, precision="bf16-mixed").fit(m, data())
    assert not any(type(x).__name__.startswith("Fused") for x in m.policy.modules())
    m = module(model_folder, lora=None, kernels=KernelConfig(lora="on"))
    with pytest.warns(UserWarning, match="there are none to exchange"):
        trainer(tmp_path / "b", rollout(), max_steps=1).fit(m, data())
    assert m.policy.prepared.chosen["lora"]
    assert not any(type(x).__name__.startswith("Fused") for x in m.policy.modules())


def test_the_table_shows_the_advantages_that_train(model_folder, tmp_path):
    from lightning.pytorch.callbacks import Callback

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            rollout = batch.rollout
            advantages = torch.tensor(batch.samples["advantage"])[rollout.sequence_ids]
            shown.append(torch.equal(advantages, rollout.advantages))

    shown = []
    m = module(model_folder, loss=LossConfig("rloo", kl_coef=5.0))
    trainer(tmp_path, rollout(), Look(), max_steps=3).fit(m, data())
    assert shown == [True] * 3


def test_a_reference_in_bf16_moves_in_small_steps():
    from grpo_lightning.policy.reference import WeightCopy

    params = {"w": torch.nn.Parameter(torch.ones(100, dtype=torch.bfloat16))}
    copy = WeightCopy(params, torch.float32)
    with torch.no_grad():
        params["w"].fill_(1.05)
    for _ in range(200):
        copy.mix(params, 0.01)
    reached = (copy.weights["w"].mean().item() - 1) / (params["w"].float().mean().item() - 1)
    assert reached == pytest.approx(1 - 0.99**200, abs=0.01)
    with copy.in_place_of(params):
        assert params["w"].dtype == torch.bfloat16
    assert params["w"].float().mean().item() == pytest.approx(1.05, abs=0.01)


def test_policies_under_an_autocast_that_keeps_casts(model_folder):
    """Outside Lightning, which switches the cache off: a pass of the reference leaves nothing behind."""
    m = module(model_folder, lora=None, loss=LossConfig("dapo", kl_coef=0.1))
    m.configure_model()
    b = random_rollout(seed=1)
    with torch.no_grad():
        for p in m.policy.trainable().values():
            p.mul_(1.1)
    with torch.autocast("cpu", torch.bfloat16):
        want = m.policy.logprobs(b).logprobs.detach()
    with torch.autocast("cpu", torch.bfloat16):
        scored = m.score(b, old=True)
        logp = m.policy.logprobs(b).logprobs
    assert torch.equal(logp.detach(), want)
    assert torch.equal(scored.old_logprobs, want)
    assert not torch.allclose(scored.ref_logprobs, want, atol=1e-2)
    logp.sum().backward()
    assert all(p.grad is not None for p in m.policy.trainable().values())
