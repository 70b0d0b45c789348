"""The head through exponentials against fp64: in fp32 under Triton's interpreter, in bf16 on a GPU."""

import pytest
import torch
from ways import calls_through_logits

from grpo_lightning.ops import fused_linear_logprobs
from grpo_lightning.ops.lm_head.chunked_logits import Logits
from grpo_lightning.ops.lm_head.rows import Head, Inputs, Scores

head_gemm = pytest.importorskip("grpo_lightning.ops.lm_head.fused_gemm", reason="Triton is for Linux")
GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
FAR = 5e-3 if GPU else 1e-5  # of a gradient, in its norm
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where numbers leave the range


@pytest.fixture(autouse=True)
def redone(monkeypatch):
    """Lets a CPU go this way; lists the calls that went through logits instead."""
    calls = calls_through_logits(monkeypatch)
    if not GPU:
        monkeypatch.setattr(head_gemm, "suits", lambda hidden, weight: True)
    return calls


def draw(*shape, seed=0, scale=1.0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return x.to(DEVICE, DTYPE)


def chosen(n, vocabulary):
    ids = torch.randint(0, vocabulary, (n,), generator=torch.Generator().manual_seed(7))
    ids[:1], ids[-1:] = 0, vocabulary - 1
    return ids.to(DEVICE)


def reference(hidden, weight, ids, tau=1.0, bias=None, softcap=None, logit_scale=1.0):
    z = hidden @ weight.T
    z = (z if bias is None else z + bias) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = (z / tau).log_softmax(-1)
    own = logp.gather(1, ids[:, None])
    odds = (z / tau).scatter(1, ids[:, None], -torch.inf).logsumexp(1) - (z / tau).gather(1, ids[:, None])[
        :, 0
    ]
    assert torch.allclose(own[:, 0], -torch.nn.functional.softplus(odds))
    return -torch.nn.functional.softplus(odds), -(logp.exp() * logp).sum(1)


def relative(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


def compare(hidden, weight, ids, tau=1.0, bias=None, entropy=False, far=FAR, chunk_rows=None, **options):
    """Asserts values and the gradients of all that require one; returns the log-probabilities."""
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]
    theirs = (*exact, None)[:3]
    wide = tau.double()[:, None] if isinstance(tau, torch.Tensor) else tau
    how = {"entropy_grad": entropy, "chunk_rows": chunk_rows, "backend": "triton"}
    logp, h = fused_linear_logprobs(hidden, weight, ids, tau, bias=bias, **how, **options)
    want, want_h = reference(theirs[0], theirs[1], ids, wide, theirs[2], **options)
    torch.testing.assert_close(logp.double(), want, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(h.double(), want_h, atol=1e-4, rtol=1e-4)
    assert (logp <= 0).all()
    assert (h >= 0).all()
    assert h.requires_grad == entropy
    g = torch.linspace(-1, 2, len(ids), device=DEVICE)
    e = g.flip(0).clone() if entropy else torch.zeros_like(g)
    ours = [x for x in leaves if x.requires_grad]
    got = torch.autograd.grad(logp @ g + (h @ e if entropy else 0), ours)
    expected = torch.autograd.grad(
        want @ g.double() + want_h @ e.double(), [x for x in exact if x.requires_grad]
    )
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) < far
    return logp


@pytest.mark.parametrize("entropy", [False, True], ids=["logp", "entropy"])
@pytest.mark.parametrize("trains", ["hidden", "head", "all"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("vocabulary", [7, 131, 257, 997])
def test_values_and_gradients(vocabulary, softcap, trains, entropy, redone):
    """129 rows in two chunks, each with an own temperature; the second chunk is one row."""
    h, w, b = draw(129, 24), draw(vocabulary, 24, seed=1, scale=0.6), draw(vocabulary, seed=2)
    h.requires_grad_(trains != "head")
    for x in (w, b):
        x.requires_grad_(trains != "hidden")
    tau = torch.linspace(0.5, 2, 129, device=DEVICE)
    ids = chosen(129, vocabulary)
    compare(h, w, ids, tau, b, entropy, chunk_rows=128, softcap=softcap, logit_scale=1.3)
    assert not redone


@pytest.mark.parametrize("n", [0, 1, 127, 300])
@pytest.mark.parametrize("trains", [False, True])
def test_rows_without_bias_and_softcap(n, trains, redone):
    h, w = draw(n, 40).requires_grad_(), draw(300, 40, seed=1, scale=0.4).requires_grad_(trains)
    compare(h, w, chosen(n, 300), entropy=trains)
    assert not redone


def test_scores_are_the_same_bits_with_a_gradient_and_in_other_chunks():
    h, w, ids = draw(300, 40), draw(700, 40, seed=1, scale=0.4), chosen(300, 700)
    plain = fused_linear_logprobs(h, w, ids, backend="triton")
    h.requires_grad_()
    for options in ({}, {"chunk_rows": 128}, {"entropy_grad": True}):
        for a, b in zip(plain, fused_linear_logprobs(h, w, ids, backend="triton", **options), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("p", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("again", [False, True])
def test_near_certain_tokens_keep_value_and_gradient(p, again, redone):
    v = 304
    gap = torch.tensor((1 - p) * (v - 1) / p, dtype=torch.float64).log().item()
    w = torch.eye(v, device=DEVICE, dtype=DTYPE).requires_grad_(again)
    h = torch.zeros(2, v, device=DEVICE, dtype=DTYPE)
    h[:, 4] = gap
    ids = torch.tensor([4, 4], device=DEVICE)
    logp = compare(h.requires_grad_(), w, ids, far=1e-2 if GPU else 1e-4)
    want, _ = reference(h.detach().double(), w.detach().double(), ids)
    assert logp.tolist() == pytest.approx(want.tolist(), rel=1e-4)
    assert (logp < 0).all()
    assert not redone


@pytest.mark.parametrize(("gap", "again"), [(60.0, 0), (75.0, 1), (200.0, 1)])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_improbable_tokens(gap, again, trains, entropy, redone):
    """One of e^-60 goes this way; a rarer one takes its whole call through logits, with no worse gradient."""
    v = 304
    w = (torch.eye(v, device=DEVICE) + draw(v, v, scale=0.02).float()).to(DTYPE).requires_grad_(trains)
    h = draw(5, v, scale=0.1)
    h[2, 4] = gap
    ids = torch.tensor([3, 4, 9, 0, 303], device=DEVICE)
    logp = compare(h.requires_grad_(), w, ids, entropy=entropy, far=FAR if GPU else 1e-4)
    assert -gap - 4 < logp[2] < -gap + 4
    assert len(redone) == again


@pytest.mark.parametrize("trains", [False, True])
def test_nan_stays_in_its_row(trains):
    h, w = draw(5, 24), draw(131, 24, seed=1, scale=0.3).requires_grad_(trains)
    h[1, 3] = torch.nan
    h.requires_grad_()
    logp, entropy = fused_linear_logprobs(h, w, chosen(5, 131), backend="triton")
    logp.sum().backward()
    bad = torch.tensor([False, True, False, False, False], device=DEVICE)
    for x in (logp, entropy, h.grad.sum(1)):
        assert torch.equal(x.isnan(), bad)


@pytest.mark.parametrize("layout", ["columns", "transposed", "offset", "one row"])
@pytest.mark.parametrize("trains", [False, True])
def test_rows_that_the_copy_engine_cannot_load(layout, trains, redone):
    n, k = 1 if layout == "one row" else 33, 24
    memory = torch.zeros(k * 2 * n + 1, device=DEVICE, dtype=DTYPE)
    h = {
        "columns": lambda: memory[:-1].view(n, 2 * k)[:, ::2],
        "transposed": lambda: memory[: n * k].view(k, n).T,
        "offset": lambda: memory[1 : 1 + n * k].view(n, k),
        "one row": lambda: memory.as_strided((1, k), (1, 1)),
    }[layout]()
    h.copy_(draw(n, k)).requires_grad_()
    w = draw(257, k, seed=1, scale=0.3).requires_grad_(trains)
    compare(h, w, chosen(n, 257), entropy=trains, chunk_rows=16)
    assert not redone


def test_no_memory_is_read_before_it_is_written(monkeypatch, redone):
    h, w, b = draw(200, 24), draw(131, 24, seed=1, scale=0.3), draw(131, seed=2)
    for empty in ("empty", "empty_like"):
        real = getattr(torch, empty)

        def poisoned(*args, real=real, **options):
            x = real(*args, **options)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        monkeypatch.setattr(torch, empty, poisoned)
    for trains in (False, True):
        h.grad = None
        compare(h.requires_grad_(), w.requires_grad_(trains), chosen(200, 131), 0.9, b, chunk_rows=128)
    assert not redone


def test_a_saturated_softcap(redone):
    h, w = draw(40, 24, scale=3.0).requires_grad_(), draw(131, 24, seed=1, scale=3.0)
    compare(h, w, chosen(40, 131), entropy=True, softcap=5.0)
    assert not redone


def test_chunks_fit_the_budget_and_the_cache():
    def rows(n, vocabulary, entry_bytes, chunk_rows=None):
        tensors = (torch.empty(n, 8, device="meta"), torch.empty(vocabulary, 8, device="meta"))
        x = Inputs(*tensors, None, None, None, Head(), chunk_rows)
        return head_gemm._rows(x, entry_bytes)

    on_cpu = 64 << 20
    assert rows(16_384, 151_936, 2) == on_cpu // (2 * 151_943 + 8 * 594) // 128 * 128
    assert rows(16_384, 151_936, 0) == 2048
    assert rows(100, 997, 2) == 100
    assert rows(0, 997, 2) == 1
    assert rows(300, 997, 2, chunk_rows=128) == 128


def test_gradient_rows_sum_to_nothing():
    """Adding a constant to all logits changes nothing, so that a row of the gradient adds up to 0."""
    h, w, ids = draw(33, 24), draw(131, 24, seed=1, scale=0.3), chosen(33, 131)
    tau = torch.full((33,), 0.7, device=DEVICE)
    x = Inputs(h, w, None, ids, tau, Head(), 16)
    way = head_gemm.FusedGemmHead(Logits(None))
    logp, entropy, *_ = way.scores(x, want_u=False)
    g = torch.linspace(-1, 1, 33, device=DEVICE)
    for at, q in way.gradient_rows(x, Scores(logp, entropy), g, g.flip(0)):
        assert q.shape == (at.stop - at.start, 131)
        assert q.double().sum(1).abs().max() < 2 * FAR


def test_only_some_calls_suit(monkeypatch):
    monkeypatch.undo()
    h, w = (torch.randn(4, 24, device=DEVICE).bfloat16() for _ in range(2))
    assert head_gemm.suits(h, w) == GPU
    assert not head_gemm.suits(h.float(), w.float())
    assert not head_gemm.suits(h.half(), w.half())
    assert not head_gemm.suits(h[:, :20], w[:, :20].contiguous())
