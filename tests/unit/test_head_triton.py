"""The row kernel against its twin and against fp64; under Triton's interpreter where there is no GPU."""

import pytest
import torch

from grpo_lightning.errors import ConfigError
from grpo_lightning.ops import fused_linear_logprobs
from grpo_lightning.ops.lm_head import rows as twin
from grpo_lightning.ops.lm_head.rows import Head, rows_in_budget
from grpo_lightning.utils.dispatch import use_triton

head_triton = pytest.importorskip("grpo_lightning.ops.lm_head.rows_triton", reason="Triton is for Linux")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = [Head(), Head(logit_scale=1.3), Head(softcap=3.0, logit_scale=0.7)]


def draw(*shape, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("vocabulary", [1, 7, 131, 5003])
@pytest.mark.parametrize("head", HEADS, ids=["plain", "scaled", "capped"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_rows_equal_the_twin_in_fp64(vocabulary, head, with_bias):
    z = draw(5, vocabulary, scale=3.0)
    ids = torch.tensor([0, vocabulary - 1, vocabulary // 2, vocabulary // 3, 0], device=DEVICE)
    tau = torch.tensor([1.0, 0.7, 2.0, 0.1, 1.0], device=DEVICE)
    g, e = draw(5, seed=1), draw(5, seed=2)
    bias = draw(vocabulary, seed=3) if with_bias else None
    want_q = poisoned(5, vocabulary, dtype=torch.float64)
    wide = None if bias is None else bias.double()
    want, want_entropy = twin.score_rows(
        z.double(), ids, tau.double(), head, wide, q=want_q, g=g.double(), e=e.double()
    )
    q = poisoned(5, vocabulary)
    logp, entropy = head_triton.score_rows(z.clone(), ids, tau, head, bias, q=q, g=g, e=e)
    torch.testing.assert_close(logp.double(), want, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), want_entropy, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(q.double(), want_q, atol=1e-4, rtol=1e-4)
    assert (logp <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_rows_may_lie_over_the_logits(dtype):
    """The buffer's second half is left over from wider numbers, which must not be read again."""
    z = draw(6, 5003, scale=2.0)
    ids = torch.arange(6, device=DEVICE) * 900
    tau = torch.full((6,), 0.9, device=DEVICE)
    apart = poisoned(6, 5003, dtype=dtype)
    head_triton.score_rows(z.clone(), ids, tau, Head(), None, q=apart)
    over = z.view(dtype)[:, :5003]
    head_triton.score_rows(z, ids, tau, Head(), None, q=over)
    assert torch.equal(over, apart)


@pytest.mark.parametrize("p", [1e-3, 1e-5, 1e-7])
def test_near_certain_tokens_keep_value_and_gradient(p):
    v = 300
    gap = torch.tensor((1 - p) * (v - 1) / p, dtype=torch.float64).log().item()
    z = torch.zeros(1, v, device=DEVICE)
    z[0, 4] = gap
    q = poisoned(1, v)
    ids, tau = torch.tensor([4], device=DEVICE), torch.ones(1, device=DEVICE)
    logp, _ = head_triton.score_rows(z.clone(), ids, tau, Head(), None, q=q)
    want = -torch.log1p(torch.tensor((v - 1) * torch.tensor(-gap).double().exp().item(), dtype=torch.float64))
    assert logp.item() == pytest.approx(want.item(), rel=1e-4)
    assert q[0, 4].item() == pytest.approx(-torch.expm1(want).item(), rel=1e-4)


@pytest.mark.parametrize("z", [80.0, -80.0, 3e4])
def test_extreme_logits_are_finite(z):
    rows = torch.tensor([[z, -z, 0.0], [z, z, z]], device=DEVICE)
    ids, tau = torch.tensor([1, 2], device=DEVICE), torch.full((2,), 0.1, device=DEVICE)
    q = poisoned(2, 3)
    e = torch.ones(2, device=DEVICE)
    logp, entropy = head_triton.score_rows(rows, ids, tau, Head(), None, q=q, g=e, e=e)
    for x in (logp, entropy, q):
        assert x.isfinite().all()


@pytest.mark.parametrize("n", [0, 1, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", ["hidden", "head", "nothing"])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_the_whole_op_with_either_backend(n, dtype, trains, entropy_grad):
    found = {}
    for backend in ("torch", "triton"):
        h, w, b = draw(n, 16).to(dtype), draw(131, 16, seed=1).to(dtype), draw(131, seed=2).to(dtype)
        wide = draw(n, 32).to(dtype)[:, ::2].copy_(h)  # strided
        wide.requires_grad_(trains != "nothing")
        w.requires_grad_(trains == "head")
        b.requires_grad_(trains == "head")
        ids, tau = torch.arange(n, device=DEVICE) * 14, torch.linspace(0.5, 2, n, device=DEVICE)
        logp, entropy = fused_linear_logprobs(
            wide, w, ids, tau, bias=b, softcap=5.0, entropy_grad=entropy_grad, chunk_rows=4, backend=backend
        )
        out = {"logp": logp, "entropy": entropy}
        if trains != "nothing":
            (logp.sum() + (entropy.sum() * 0.3 if entropy_grad else 0.0)).backward()
            out |= {"dh": wide.grad} | ({"dw": w.grad, "db": b.grad} if trains == "head" else {})
        found[backend] = out
    tolerance = {"atol": 2e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    for name, want in found["torch"].items():
        torch.testing.assert_close(
            found["triton"][name], want, **tolerance, msg=lambda m, name=name: name + m
        )
    torch.testing.assert_close(found["triton"]["logp"], found["torch"]["logp"], atol=1e-4, rtol=0)


def test_transposed_hidden_states():
    w, ids = draw(131, 16, seed=1), torch.arange(9, device=DEVICE) * 14
    found = []
    for h in (draw(9, 16).requires_grad_(), draw(9, 16).T.contiguous().T.requires_grad_()):
        fused_linear_logprobs(h, w, ids, backend="triton")[0].sum().backward()
        found.append(h.grad)
    torch.testing.assert_close(*found)


def test_rows_are_scaled_and_rounded_once():
    x, g = draw(5, 130).bfloat16(), draw(5, seed=1)
    want = (x.double() * g.double()[:, None]).bfloat16()
    # The interpreter cuts bf16 instead of rounding it.
    last_bit = 2**-8 if DEVICE == "cuda" else 2**-7
    torch.testing.assert_close(head_triton.scale_rows(x, g), want, atol=0, rtol=last_bit)
    strided = draw(5, 260)[:, :130]
    torch.testing.assert_close(head_triton.scale_rows(strided, g), twin.scale_rows(strided, g))


def test_backends():
    cpu = torch.device("cpu")
    assert not use_triton(cpu)
    assert not use_triton(torch.device("cuda"), "torch")
    assert use_triton(cpu, "triton")
    with pytest.raises(ConfigError, match="backend is"):
        use_triton(cpu, "cuda")


def test_chunks_follow_the_budget():
    cuda = torch.device("cuda")
    assert rows_in_budget(16_384, 4 * 151_936, cuda) == 1024
    assert rows_in_budget(16_384, 4 * 32_000, cuda) == 4864
    assert rows_in_budget(100, 4 * 32_000, cuda) == 100
    assert rows_in_budget(0, 4 * 32_000, cuda) == 1
    assert rows_in_budget(16_384, 4 * 151_936, torch.device("cpu")) == 110
