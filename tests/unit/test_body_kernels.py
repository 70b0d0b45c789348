"""SwiGLU and rotary embeddings: twins and kernels against fp64, twins against stock modules."""

import pytest
import torch

from grpo_lightning.ops.rotary import rotary
from grpo_lightning.ops.swiglu import swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter cuts bf16 instead of rounding it.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-12}


def draw(*shape, seed=0, dtype=torch.float32, scale=1.0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return x.to(DEVICE, dtype)


def assert_near(got, want, dtype):
    gap = (got.double() - want.double()).norm().item()
    assert gap <= TOLERANCE[dtype] * max(want.double().norm().item(), 1.0), gap


def backends():
    try:
        import grpo_lightning.ops.rotary_triton
        import grpo_lightning.ops.swiglu_triton  # noqa: F401
    except ImportError:
        return ["torch"]
    return ["torch", "triton"]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh memory is NaN, and so is what lies behind it: what a kernel leaves out or writes beside shows."""
    stock, behind = torch.empty, []

    def empty(*shape, dtype=torch.float32, device=None):
        size = torch.Size(shape[0] if isinstance(shape[0], tuple | list) else shape)
        memory = stock(size.numel() + 8192, dtype=dtype, device=device).fill_(torch.nan)
        behind.append(memory[size.numel() :])
        return memory[: size.numel()].view(size)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", lambda x: empty(x.shape, dtype=x.dtype, device=x.device))
    yield
    assert all(rest.isnan().all() for rest in behind)


def run(op, inputs, seed=9):
    y = op(*inputs)
    dy = draw(*y.shape, seed=seed, dtype=y.dtype)
    trained = [t for t in inputs if t.requires_grad]
    return y.detach(), torch.autograd.grad(y, trained, dy)


def exactly(op, inputs, dtype, seed=9):
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    y = op(*wide)
    dy = draw(*y.shape, seed=seed, dtype=dtype).double()
    return y.detach(), torch.autograd.grad(y, [t for t in wide if t.requires_grad], dy)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (2, 3, 130), (3, 2049), (0, 8)])
def test_swiglu_against_fp64(backend, dtype, shape):
    inputs = [draw(*shape, seed=i, dtype=dtype, scale=3.0).requires_grad_() for i in range(2)]
    got = run(lambda g, u: swiglu(g, u, backend), inputs)
    want = exactly(lambda g, u: torch.nn.functional.silu(g) * u, inputs, dtype)
    assert_near(got[0], want[0], dtype)
    for a, b, t in zip(got[1], want[1], inputs, strict=True):
        assert a.dtype == dtype
        assert a.shape == t.shape
        assert_near(a, b, dtype)


@pytest.mark.parametrize("backend", backends())
def test_swiglu_of_extreme_and_strided_numbers(backend):
    g = torch.tensor([[-1e4, -90.0, -0.0, 90.0, 1e4, 7.0]], device=DEVICE).T.requires_grad_()
    u = draw(12, 6)[:6, ::6].requires_grad_()
    y, (dg, du) = run(lambda g, u: swiglu(g, u, backend), [g, u])
    want, exact = exactly(lambda g, u: torch.nn.functional.silu(g) * u, [g, u], torch.float32)
    for a, b in ((y, want), (dg, exact[0]), (du, exact[1])):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)
    dy = draw(1, 1).expand(6, 1)
    for a in torch.autograd.grad(swiglu(g, u, backend), [g, u], dy):
        assert a.isfinite().all()


def eager_rotary(q, k, cos, sin):
    """As in transformers, over [T, heads, D]."""

    def turned(x):
        a, b = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]

    return turned(q), turned(k)


def heads(tokens, q_heads, kv_heads, width, dtype):
    """Returns q, k, cos and sin; the halves of a head have angles of their own."""
    q, k = (draw(tokens, n, width, seed=i, dtype=dtype, scale=3.0) for i, n in enumerate((q_heads, kv_heads)))
    angles = draw(tokens, width, seed=2, scale=3.0)
    return q.requires_grad_(), k.requires_grad_(), angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (5, 4, 2, 16),
        (1, 1, 1, 2),
        (7, 14, 2, 64),
        (3, 3, 3, 80),
        (2, 40, 8, 128),
        (33, 6, 1, 6),
        (0, 4, 2, 8),
    ],
)
def test_rotary_against_fp64(backend, dtype, shape):
    q, k, cos, sin = heads(*shape, dtype)
    got = rotary(q, k, cos, sin, backend)
    wide = [t.detach().double().requires_grad_() for t in (q, k)]
    want = eager_rotary(*wide, cos.double(), sin.double())
    dy = [draw(*y.shape, seed=4 + i, dtype=dtype) for i, y in enumerate(got)]
    back = torch.autograd.grad(got, (q, k), dy)
    exact = torch.autograd.grad(want, wide, [d.double() for d in dy])
    for a, b, t in zip((*got, *back), (*want, *exact), (q, k, q, k), strict=True):
        assert a.dtype == dtype
        assert a.shape == t.shape
        assert a.is_contiguous()
        assert_near(a, b, dtype)


@pytest.mark.parametrize("backend", backends())
def test_rotary_of_slices_and_with_strided_and_expanded_gradients(backend):
    """As they come: parts of one product, gradients [1, heads, T, D] or spread over tokens or heads."""
    *_, cos, sin = heads(9, 4, 2, 16, torch.float32)
    product = draw(9, 8 * 16).requires_grad_()
    parts = product.view(1, 9, 8, 16)
    got = rotary(parts[:, :, :4], parts[:, :, 4:6], cos[None], sin[None], backend)
    wide = product.detach().double().requires_grad_()
    rows = wide.view(9, 8, 16)
    want = eager_rotary(rows[:, :4], rows[:, 4:6], cos.double(), sin.double())
    gradients = (
        [draw(1, n, 9, 16, seed=n).transpose(1, 2) for n in (4, 2)],
        [draw(1, 1, n, 16, seed=n).expand(1, 9, n, 16) for n in (4, 2)],
        [draw(1, 9, 1, 16, seed=n).expand(1, 9, n, 16) for n in (4, 2)],
        [draw(1, 9, n, 1, seed=n).expand(1, 9, n, 16) for n in (4, 2)],
        [draw(1, 9, n, 32, seed=n)[..., ::2] for n in (4, 2)],
        [torch.ones((), device=DEVICE).expand(1, 9, n, 16) for n in (4, 2)],
    )
    for a, b in zip(got, want, strict=True):
        assert_near(a[0], b, torch.float32)
    for dy in gradients:
        (back,) = torch.autograd.grad(got, product, dy, retain_graph=True)
        (exact,) = torch.autograd.grad(want, wide, [d[0].double() for d in dy], retain_graph=True)
        assert_near(back, exact, torch.float32)


@pytest.mark.parametrize("backend", backends())
def test_rotary_where_one_of_both_has_a_gradient(backend):
    q, k, cos, sin = heads(5, 4, 2, 8, torch.float32)
    both = torch.autograd.grad(rotary(q, k, cos, sin, backend)[0].square().sum(), q)[0]
    alone = rotary(q, k.detach(), cos, sin, backend)[0].square().sum()
    assert torch.equal(torch.autograd.grad(alone, q)[0], both)


def test_gradcheck():
    x = draw(3, 5, dtype=torch.float64).requires_grad_()
    u = draw(3, 5, seed=2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda g, u: swiglu(g, u, "torch"), (x, u))
    q, k, cos, sin = heads(3, 2, 1, 6, torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: rotary(q, k, cos, sin, "torch"), (q, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_twin_rounds_as_transformers_does(dtype):
    x, u = draw(9, 33, dtype=dtype), draw(9, 33, seed=1, dtype=dtype)
    assert torch.equal(swiglu(x, u, "torch"), torch.nn.functional.silu(x) * u)


def test_a_second_backward_through_a_kept_graph_gives_the_same():
    """Nothing that is kept for the backward is written to."""
    g, u = draw(4, 6).requires_grad_(), draw(4, 6, seed=1).requires_grad_()
    for backend in backends():
        y = swiglu(g, u, backend).square().sum()
        first = torch.autograd.grad(y, (g, u), retain_graph=True)
        for a, b in zip(first, torch.autograd.grad(y, (g, u)), strict=True):
            assert torch.equal(a, b)
