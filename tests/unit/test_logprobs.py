import pytest
import torch

from grpo_lightning.ops import fused_linear_logprobs
from grpo_lightning.ops.lm_head import chunked_logits as module


def reference(hidden, weight, ids, temperature=1.0, bias=None, softcap=None, logit_scale=1.0):
    z = hidden.double() @ weight.double().T
    z = (z if bias is None else z + bias.double()) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = torch.log_softmax(z / temperature, -1)
    return logp.gather(1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(1)


def inputs(n, h=16, v=37, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, v, (n,), generator=g)
    if n > 1:
        ids[0], ids[1] = 0, v - 1
    return torch.randn(n, h, generator=g).to(dtype), torch.randn(v, h, generator=g).to(dtype), ids


@pytest.mark.parametrize("n", [0, 1, 5, 64, 127])
@pytest.mark.parametrize("v", [7, 131, 5003])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.0])
def test_values_against_fp64(n, v, temperature):
    h, w, ids = inputs(n, v=v)
    logp, entropy = fused_linear_logprobs(h, w, ids, temperature, chunk_rows=32)
    want, want_entropy = reference(h, w, ids, temperature)
    torch.testing.assert_close(logp, want.float(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(entropy, want_entropy.float(), atol=1e-4, rtol=1e-5)
    assert logp.dtype == torch.float32


def test_bf16_inputs_keep_fp32_logits():
    h, w, ids = inputs(50, v=997, dtype=torch.bfloat16)
    logp, _ = fused_linear_logprobs(h, w, ids)
    torch.testing.assert_close(logp, reference(h, w, ids)[0].float(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("v", [131, 259, 260])
@pytest.mark.parametrize("trainable", [False, True])
def test_bf16_gradients_are_finite_for_every_vocabulary(v, trainable):
    """On CPUs with AMX oneDNN reads up to 31 numbers past the end of a row, where the fp32 logits lay."""
    h, w, ids = inputs(72, h=32, v=v, dtype=torch.bfloat16)
    h.requires_grad_()
    w.requires_grad_(trainable)
    fused_linear_logprobs(h, w, ids)[0].sum().backward()
    wide = h.detach().double().requires_grad_()
    reference(wide, w.detach(), ids)[0].sum().backward()
    assert (h.grad.double() - wide.grad).norm() <= 0.02 * wide.grad.norm()


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck(trainable, entropy_grad, softcap, with_bias):
    h, w, ids = inputs(6, h=4, v=9, dtype=torch.float64)
    b = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    h.requires_grad_()
    w.requires_grad_(trainable)
    b.requires_grad_(trainable)

    def run(h, w, b):
        out = fused_linear_logprobs(
            h,
            w,
            ids,
            0.7,
            bias=b if with_bias else None,
            softcap=softcap,
            logit_scale=1.3,
            entropy_grad=entropy_grad,
            chunk_rows=4,
        )
        return out if entropy_grad else out[0]

    assert torch.autograd.gradcheck(run, (h, w, b))


def test_float32_gradients_against_fp64():
    h, w, ids = inputs(40, v=501)
    g = torch.randn(40, generator=torch.Generator().manual_seed(3))
    h.requires_grad_()
    fused_linear_logprobs(h, w, ids, chunk_rows=16)[0].backward(g)
    h64 = h.detach().double().requires_grad_()
    reference(h64, w, ids)[0].backward(g.double())
    assert (h.grad - h64.grad).norm() / h64.grad.norm() < 1e-5


@pytest.mark.parametrize("p", [1e-3, 1e-5, 1e-7])
def test_near_certain_tokens_keep_value_and_gradient(p):
    v = 11
    gap = torch.tensor((1 - p) * (v - 1) / p, dtype=torch.float64).log().item()
    w = torch.eye(v)
    h = (torch.nn.functional.one_hot(torch.tensor([4]), v) * gap).float().requires_grad_()
    logp, _ = fused_linear_logprobs(h, w, torch.tensor([4]))
    logp.sum().backward()
    want, _ = reference(h.detach(), w, torch.tensor([4]))
    assert logp.item() == pytest.approx(want.item(), rel=1e-4)
    assert h.grad[0, 4].item() == pytest.approx(-torch.expm1(want).item(), rel=1e-4)
    assert logp.item() < 0


def test_extreme_logits_are_finite():
    h = torch.tensor([[80.0], [-80.0]]).requires_grad_()
    w = torch.tensor([[1.0], [-1.0], [0.0]])
    logp, entropy = fused_linear_logprobs(h, w, torch.tensor([1, 1]), entropy_grad=True)
    (logp + entropy).sum().backward()
    assert torch.isfinite(logp).all()
    assert torch.isfinite(h.grad).all()
    assert (logp <= 0).all()


def saved_bytes(run):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        run()
    return sum(sizes)


def test_frozen_head_saves_one_hidden_and_no_logits():
    h, w, ids = inputs(64, h=16, v=5003)
    h.requires_grad_()
    assert saved_bytes(lambda: fused_linear_logprobs(h, w, ids, chunk_rows=8)) == 64 * 16 * 4


def test_no_logits_for_all_rows_at_once(monkeypatch):
    rows = []
    real = module.wide_product_into
    monkeypatch.setattr(
        module, "wide_product_into", lambda h, w, out: rows.append(h.shape[0]) or real(h, w, out)
    )
    h, w, ids = inputs(100, v=53)
    fused_linear_logprobs(h.requires_grad_(), w, ids, chunk_rows=32)
    assert rows == [32, 32, 32, 4]


def test_no_grad_runs_one_matmul_per_chunk_and_builds_no_gradient():
    h, w, ids = inputs(10)
    h.requires_grad_()
    with torch.no_grad():
        logp, _ = fused_linear_logprobs(h, w, ids)
    assert not logp.requires_grad
    assert saved_bytes(lambda: None) == 0


def test_same_bits_with_and_without_gradient():
    h, w, ids = inputs(33, v=211)
    with torch.no_grad():
        a, _ = fused_linear_logprobs(h, w, ids, chunk_rows=8)
    b, _ = fused_linear_logprobs(h.requires_grad_(), w, ids, chunk_rows=8)
    c, _ = fused_linear_logprobs(h, w.requires_grad_(), ids, chunk_rows=8)
    assert torch.equal(a, b)
    assert torch.equal(a, c)


def test_entropy_is_detached_unless_asked_for():
    h, w, ids = inputs(3)
    assert not fused_linear_logprobs(h.requires_grad_(), w, ids)[1].requires_grad


def test_non_contiguous_hidden_and_empty():
    h, w, ids = inputs(8)
    a, _ = fused_linear_logprobs(h.T.contiguous().T, w, ids)
    torch.testing.assert_close(a, fused_linear_logprobs(h, w, ids)[0])
    logp, _ = fused_linear_logprobs(h[:0].requires_grad_(), w, ids[:0])
    logp.sum().backward()
    assert logp.numel() == 0


def test_temperature_must_be_positive():
    h, w, ids = inputs(3)
    with pytest.raises(ValueError, match="temperature is 0"):
        fused_linear_logprobs(h, w, ids, 0.0)


@pytest.mark.parametrize("rows", [16, 17, 32])
def test_16_bit_gradients_do_not_depend_on_what_lies_beside_a_chunk(rows, monkeypatch):
    """A CPU with AMX multiplied what lies between strided rows by 0, and NaN stays NaN."""
    made = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made(*a, **k).fill_(torch.nan))
    h, w, ids = inputs(rows, v=131, dtype=torch.bfloat16)
    h.requires_grad_()
    fused_linear_logprobs(h, w, ids, 1.0)[0].sum().backward()
    assert torch.isfinite(h.grad).all()
