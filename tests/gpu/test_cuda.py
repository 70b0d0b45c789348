"""What only a GPU can show; run with `pytest -m gpu`."""

from dataclasses import replace

import pytest
import torch
from models import random_rollout, save_tiny, tiny_llama
from tiny import tiny_tokenizer

from grpo_lightning.losses import RECIPES, LossConfig, policy_loss
from grpo_lightning.ops import fused_linear_logprobs
from grpo_lightning.policy.policy import Policy

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("n", [0, 1, 127, 1000])
def test_bf16_head_has_fp32_accuracy(n):
    g = torch.Generator("cuda").manual_seed(0)
    h = torch.randn(n, 512, device="cuda", generator=g).bfloat16().requires_grad_()
    w = (torch.randn(32_000, 512, device="cuda", generator=g) * 0.1).bfloat16()
    ids = torch.randint(0, 32_000, (n,), device="cuda", generator=g)
    logp, _ = fused_linear_logprobs(h, w, ids, chunk_rows=256)
    h64 = h.detach().double().requires_grad_()
    want = (h64 @ w.double().T).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(logp.double(), want, atol=1e-4, rtol=0)
    if n:
        logp.sum().backward()
        want.sum().backward()
        assert (h.grad.double() - h64.grad).norm() / h64.grad.norm() < 5e-3


def test_head_memory_does_not_grow_with_rows():
    w = torch.randn(151_936, 256, device="cuda").bfloat16()
    peaks = []
    for n in (4096, 16_384):
        h = torch.randn(n, 256, device="cuda").bfloat16().requires_grad_()
        ids = torch.randint(0, 151_936, (n,), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fused_linear_logprobs(h, w, ids)[0].sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before - 3 * h.numel() * 2)
    assert peaks[1] < peaks[0] * 1.1 + 2**20


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_packed_equals_padded(dtype, tolerance):
    policy = Policy(tiny_llama().to("cuda", dtype), tiny_tokenizer())
    b = random_rollout(prompts=4, group=6, longest=30).to("cuda")
    with torch.no_grad():
        packed = policy.logprobs(b).logprobs
        policy.padded_reason = "test"
        policy._set_attention("sdpa")
        padded = policy.logprobs(b).logprobs
    torch.testing.assert_close(packed, padded, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_gives_the_cpus_gradient(name):
    required = {"dppo_kl": {"dppo_low": 0.05, "dppo_high": 0.05}, "dro": {"dro_coef": 0.1}}
    config = LossConfig(name, **required.get(name, {}), kl_coef=0.05, kl_in="loss")
    b = random_rollout(prompts=4, group=6, longest=30)
    g = torch.Generator().manual_seed(0)
    n = len(b.target_ids)
    b = replace(
        b,
        old_logprobs=-torch.rand(n, generator=g),
        ref_logprobs=-torch.rand(n, generator=g),
        sampler_logprobs=-torch.rand(n, generator=g),
        selected=torch.rand(n, generator=g) < 0.1,
    )
    lp = -torch.rand(n, generator=g)
    grads = []
    for device in ("cpu", "cuda", "cuda"):
        x = lp.to(device).requires_grad_()
        out = policy_loss(x, b.to(device), config)
        grads.append(torch.autograd.grad(out.loss, x)[0].cpu())
    torch.testing.assert_close(grads[1], grads[0], atol=1e-6, rtol=1e-5)
    assert torch.equal(grads[1], grads[2])


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_fit_and_resume(precision, tmp_path):
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
    from test_fit import ModelCheckpoint, data, module, rollout, rows_of, trainer

    folder = save_tiny(tmp_path / "model")
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    settings = {"accelerator": "gpu", "precision": precision, "max_steps": 3, "accumulate_grad_batches": 2}
    trainer(tmp_path, rollout(), saver, **settings).fit(module(folder), data())
    rows = [r for r in rows_of(tmp_path) if r["loss"]]
    assert len(rows) == 3
    limit = 1e-3 if precision == "32-true" else 0.2
    name = "sampling/sampling_logp_difference/mean"
    assert 0 <= max(float(r[name]) for r in rows if r[name]) < limit
    m = module(folder)
    trainer(tmp_path / "b", rollout(), **settings).fit(m, data(), ckpt_path=tmp_path / "step=1.ckpt")
    assert {p.dtype for p in m.policy.trainable().values()} == {torch.float32}
