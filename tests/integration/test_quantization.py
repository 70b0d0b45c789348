"""A base in 4 bit with a trained adapter, on a CPU."""

import pytest
import torch
from fits import data, module, rollout, rows_of, same_bits, trainer, weights
from models import random_rollout, save_tiny

from grpo_lightning.errors import ConfigError
from grpo_lightning.kernels import lora as lora_layers
from grpo_lightning.kernels.config import KernelConfig

pytest.importorskip("bitsandbytes", reason="no wheel for this platform")
LORA = {"r": 4, "lora_alpha": 12}


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """Widths that are multiples of the 4-bit block, 64."""
    changes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    return save_tiny(tmp_path_factory.mktemp("wide"), **changes)


def four_bit(folder, **changes):
    return module(folder, **{"quantization": "nf4", "lora": LORA, **changes})


def test_it_trains_an_adapter_and_resumes(wide_model, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    def run(root, ckpt_path=None):
        saver = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        m = four_bit(wide_model)
        trainer(root, rollout(), saver, max_steps=3).fit(m, data(), ckpt_path=ckpt_path)
        return m

    m = run(tmp_path / "a")
    base = m.policy.causal.model.layers[0].self_attn.q_proj.base_layer
    assert base.weight.dtype == torch.uint8
    assert base.weight.quant_state.nested
    assert all("lora_" in name for name in m.policy.trainable())
    assert max(w.abs().max().item() for n, w in weights(m).items() if "lora_B" in n) > 0
    first = next(r for r in rows_of(tmp_path / "a") if r["loss"])
    assert float(first["sampling/prob_error"]) == pytest.approx(1.0, abs=1e-3)
    resumed = run(tmp_path / "b", tmp_path / "a" / "step=2.ckpt")
    assert same_bits(weights(m), weights(resumed))


def test_the_fused_adapter_over_a_4_bit_base(wide_model, monkeypatch):
    found, calls = [], []
    op = lora_layers.lora_linears
    monkeypatch.setattr(lora_layers, "lora_linears", lambda x, ls: calls.append(ls[0].y) or op(x, ls))
    b = random_rollout(seed=2)
    for choice in ("off", "on"):
        m = four_bit(wide_model)
        m.configure_model()
        g = torch.Generator().manual_seed(1)
        for name, p in m.policy.trainable().items():
            if "lora_B" in name:
                p.data.normal_(std=0.2, generator=g)
        m.policy.prepare(KernelConfig(lora=choice), torch.device("cpu"))
        logp = m.policy.logprobs(b).logprobs
        logp.sum().backward()
        found.append([logp.detach(), *(p.grad for p in m.policy.trainable().values())])
    assert len(calls) == 14
    assert all(y is not None for y in calls)
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_the_4_bit_policy_is_not_the_full_one(wide_model):
    b, found = random_rollout(seed=2), []
    for quantization in (None, "nf4"):
        m = four_bit(wide_model, quantization=quantization)
        m.configure_model()
        with torch.no_grad():
            found.append(m.policy.logprobs(b).logprobs)
    gap = (found[0] - found[1]).abs().mean().item()
    assert 0.01 < gap < 1.0


def test_errors(model_folder, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"model\.lora is null: rounded weights do not train"):
        trainer(tmp_path, rollout()).fit(four_bit(model_folder, lora=None), data())
    monkeypatch.setattr("grpo_lightning.policy.lora.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'grpo-lightning\[qlora\]'"):
        trainer(tmp_path, rollout()).fit(four_bit(model_folder), data())
