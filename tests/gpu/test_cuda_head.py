"""The head through exponentials on a GPU: bf16 at real sizes, memory, compilations, waits; `pytest -m gpu`.

tests/unit/test_head_gemm.py runs there too, in bf16.
"""

import warnings

import pytest
import torch
from ways import calls_through_logits

from grpo_lightning.ops import fused_linear_logprobs
from grpo_lightning.ops.lm_head import fused_gemm as head_gemm
from grpo_lightning.ops.lm_head import fused_gemm_triton as head_gemm_triton

pytestmark = pytest.mark.gpu
VOCABULARY = 151_936


@pytest.fixture(autouse=True)
def redone(monkeypatch):
    """Lists the calls that went through logits."""
    return calls_through_logits(monkeypatch)


def draw(*shape, seed=0, scale=1.0):
    return (
        torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)) * scale
    ).to(torch.bfloat16)


def inputs(n, width, vocabulary=VOCABULARY, spread=2.0):
    ids = torch.randint(0, vocabulary, (n,), device="cuda", generator=torch.Generator("cuda").manual_seed(5))
    return draw(n, width), draw(vocabulary, width, seed=1, scale=spread * width**-0.5), ids


def head(*args, **options):
    return fused_linear_logprobs(*args, backend="triton", **options)


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize(
    ("n", "width", "vocabulary"),
    [(1, 896, VOCABULARY), (127, 2048, VOCABULARY), (300, 4096, VOCABULARY), (700, 520, 32_001)],
)
@pytest.mark.parametrize("trains", ["hidden", "head"])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_against_fp64(n, width, vocabulary, trains, entropy, softcap, redone):
    h, w, ids = inputs(n, width, vocabulary)
    bias, tau = draw(vocabulary, seed=2), torch.linspace(0.6, 1.6, n, device="cuda")
    leaves = [h, w, bias] if trains == "head" else [h]
    for x in leaves:
        x.requires_grad_()
    logp, spread = head(h, w, ids, tau, bias=bias, softcap=softcap, entropy_grad=entropy, chunk_rows=256)
    g, e = draw(n, seed=3).float(), draw(n, seed=4).float() * entropy
    got = torch.autograd.grad(logp @ g + (spread @ e if entropy else 0), leaves)
    exact = {x: x.detach().double().requires_grad_() for x in (h, w, bias)}
    z = exact[h] @ exact[w].T + exact[bias]
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    every = (z / tau[:, None]).log_softmax(-1)
    want, want_spread = every.gather(1, ids[:, None])[:, 0], -(every.exp() * every).sum(1)
    torch.testing.assert_close(logp.double(), want, atol=1e-4, rtol=0)
    torch.testing.assert_close(spread.double(), want_spread, atol=1e-4, rtol=1e-5)
    wanted = torch.autograd.grad(want @ g.double() + want_spread @ e.double(), [exact[x] for x in leaves])
    for ours, theirs in zip(got, wanted, strict=True):
        assert relative(ours, theirs) < 5e-3
    assert not redone


@pytest.mark.parametrize("width", [896, 4096])
@pytest.mark.parametrize("mode", ["no gradient", "frozen", "entropy"])
def test_the_workspace_is_600_mib_for_any_number_of_rows(width, mode, redone):
    w = draw(VOCABULARY, width, scale=width**-0.5)
    peaks = []
    for n in (128, 4096, 16_384, 40_000):  # the first only warms up
        h, ids = draw(n, width).requires_grad_(mode != "no gradient"), torch.arange(n, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logp, entropy = head(h, w, ids, entropy_grad=mode == "entropy")
        if logp.requires_grad:
            (logp + entropy).sum().backward()
        of_rows = {"no gradient": 0, "frozen": 2, "entropy": 1}[mode] * h.numel() * 2 + 100 * n
        peaks.append(torch.cuda.max_memory_allocated() - before - of_rows)
        del h, ids, logp, entropy
    assert max(peaks) < 600 << 20
    assert not redone


def test_scores_are_the_same_bits_with_a_gradient_and_in_other_chunks():
    h, w, ids = inputs(2500, 896)
    plain = head(h, w, ids)
    h.requires_grad_()
    for options in ({}, {"chunk_rows": 256}, {"entropy_grad": True}):
        for a, b in zip(plain, head(h, w, ids, **options), strict=True):
            assert torch.equal(a, b)
    grads = [torch.autograd.grad(head(h, w, ids)[0].sum(), h)[0] for _ in range(2)]
    assert torch.equal(*grads)


def variants():
    kernels = (head_gemm_triton._multiply, head_gemm_triton._own, head_gemm_triton._finish)
    return sum(len(caches[0]) for k in kernels for caches in k.device_caches.values())


def test_lengths_temperatures_and_chunks_compile_nothing():
    h, w, ids = inputs(1000, 896, 32_001)
    h.requires_grad_()

    def run(first, last, temperature, chunk_rows=None):
        part = slice(first, last)
        for entropy in (False, True):
            options = {"entropy_grad": entropy, "chunk_rows": chunk_rows}
            logp, spread = head(h[part], w, ids[part], temperature, **options)
            (logp + spread).sum().backward()
        with torch.no_grad():
            head(h[part], w, ids[part], temperature)

    run(0, 128, 1.0)
    before = variants()
    for i, n in enumerate((1, 2, 16, 17, 127, 128, 129, 999)):
        run(0, n, 0.5 + i / 7, chunk_rows=(None, 100, 1, 16)[i % 4])
        run(1, n + 1, torch.linspace(0.5, 2, n, device="cuda"))
    assert variants() == before


def test_one_improbable_token_takes_its_call_through_logits(redone):
    h, w, ids = inputs(600, 896)
    with torch.no_grad():
        h[77] = -40 * w[ids[77]] / w[ids[77]].float().square().sum()
        assert head(h, w, ids)[0][77] > -62
        assert not redone
        h[77] *= 6
    h.requires_grad_()
    logp, entropy = head(h, w, ids, entropy_grad=False)
    assert redone == [True]
    assert logp[77] < -200
    logp.sum().backward()
    h64 = h.detach().double().requires_grad_()
    want = (h64 @ w.double().T).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    want.sum().backward()
    torch.testing.assert_close(logp.double(), want, atol=1e-4, rtol=1e-5)  # 278 nats
    assert relative(h.grad, h64.grad) < 5e-3
    assert entropy.isfinite().all()


@pytest.mark.parametrize("entropy", [False, True])
def test_the_host_waits_once(entropy):
    h, w, ids = inputs(5000, 896)
    h.requires_grad_()
    head(h, w, ids)[0].sum().backward()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            logp, spread = head(h, w, ids, entropy_grad=entropy)
            (logp + spread).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([x for x in waits if "synchroniz" in str(x.message)]) == 1


def test_nan_stays_in_its_row():
    h, w, ids = inputs(40, 896)
    h[3, 0] = torch.nan
    logp, entropy = head(h, w, ids)
    assert logp.isnan().nonzero()[:, 0].tolist() == [3]
    assert entropy.isnan().nonzero()[:, 0].tolist() == [3]


def test_what_does_not_suit_goes_through_logits(redone):
    h, w, ids = inputs(40, 900)
    assert not head_gemm.suits(h, w)  # rows of 1,800 bytes
    head(h, w, ids)
    head(h[:, :896].float(), w[:, :896].float().contiguous(), ids)
    assert len(redone) == 2
    assert not head_gemm.suits(h[:, :896], w[:, :896])
    assert head_gemm.suits(h[:, :896], w[:, :896].contiguous())
