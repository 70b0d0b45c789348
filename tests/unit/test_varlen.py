"""Attention with shared prompts: two calls merged are one softmax, forward and backward."""

import random
import warnings

import pytest
import torch

from grpo_lightning.ops.attention.shared_prompts import SharedPrompts
from grpo_lightning.ops.attention.varlen import Dense, shared_prompt_attention
from grpo_lightning.packing.geometry import SequenceLayout

CASES = {
    "two groups": ([4, 3], [[2, 5, 1], [3, 0]]),
    "one token": ([1], [[1]]),
    "nothing but prompts": ([3, 2], [[0], []]),
    "one of several": ([3], [[0, 4, 0]]),
    "no prompt left": ([0, 2], [[], [3]]),
    "one completion each": ([2, 2], [[3], [4]]),
    "shared and not": ([2, 4, 0, 3], [[3], [1, 2], [2, 1], [4, 2]]),
}


def inputs(rows, heads=4, kv_heads=2, width=8, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(h):
        return torch.randn(rows, h, width, generator=g, dtype=torch.float64).requires_grad_()

    return draw(heads), draw(kv_heads), draw(kv_heads)


def dense(q, k, v, prompts, rows, scale):
    """One explicit mask over T."""
    segment, group, position = [], [], []
    for g, (p, own) in enumerate(zip(prompts, rows, strict=True)):
        segment += [0] * p + [s + 1 for s, n in enumerate(own) for _ in range(n)]
        group += [g] * (p + sum(own))
        position += [*range(p), *(p + i for n in own for i in range(n))]
    s, g, t = (torch.tensor(x) for x in (segment, group, position))
    mask = (g[:, None] == g) & ((s[:, None] == s) | (s == 0)) & (t[:, None] >= t)
    return torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=mask, scale=scale, enable_gqa=True
    ).transpose(0, 1)


@pytest.mark.parametrize("filled", [False, True])
def test_every_row_is_in_a_segment(filled):
    """Kernels leave what no segment holds as it was."""
    draw = random.Random(0)
    for _ in range(300):
        prompts = [draw.randint(0, 700) for _ in range(draw.randint(1, 6))]
        rows = [[draw.randint(0, 90) for _ in range(draw.randint(1, 9))] for _ in prompts]
        x = SharedPrompts.of(prompts, rows, torch.device("cpu"), filled=filled)
        total = sum(prompts) + sum(map(sum, rows)) if x.order is None else len(x.order)
        ends = [
            int(e[-1])
            for e in (
                x.self_attention.query,
                x.self_attention.key,
                x.prefix_attention.key,
                x.prefix_attention.query,
            )
        ]
        regions = [r.stop - r.start for r in (x.prompts, x.completions)]
        assert ends == [total, total, *regions]
        assert x.completions.stop == total
        for spans in (x.self_attention, x.prefix_attention):
            for end, longest in ((spans.query, spans.longest_query), (spans.key, spans.longest_key)):
                lengths = end.diff()
                assert (lengths > 0).all()
                assert longest >= max(lengths.tolist(), default=0)


def test_single_completions_beside_shared_prompts_make_no_shape_of_their_own():
    both, shared = (
        SharedPrompts.of([4, 3], rows, torch.device("cpu"), filled=True).shape
        for rows in ([[2, 5, 1], [3, 0]], [[2, 5, 1], [3, 1]])
    )
    assert both == shared
    alone = SharedPrompts.of([4, 3], [[2, 0], [3, 0]], torch.device("cpu"), filled=True).shape
    assert alone.prompts.rows == alone.completions.rows == 0


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_equals_one_softmax(name, filled):
    prompts, rows = CASES[name]
    total = sum(prompts) + sum(map(sum, rows))
    q, k, v = inputs(total)
    layout = SharedPrompts.of(prompts, rows, q.device, filled=filled)
    order, places = (torch.arange(total) if x is None else x for x in (layout.order, layout.places))
    assert torch.equal(order[places], torch.arange(total))
    got = shared_prompt_attention(q[order], k[order], v[order], layout, 0.3, Dense())[places]
    want = dense(q, k, v, prompts, rows, 0.3)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    dout = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(got, (q, k, v), dout)
    theirs = torch.autograd.grad(want, (q, k, v), dout)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_what_the_flash_kernels_do_not_cover_is_said_once():
    from grpo_lightning.ops.attention.packed import (
        PackedLayout,
        _say_once,
        packed_attention,
        why_not_segments,
    )

    zeros = torch.zeros(4, dtype=torch.int64)
    layout = PackedLayout.of(SequenceLayout.of([2], [3], [0]), zeros, torch.arange(4), segments=True)
    q = torch.randn(1, 2, 4, 8)
    _say_once.cache_clear()
    with pytest.warns(UserWarning, match="float32 on cpu"):
        packed_attention(q, q, q, layout, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed_attention(q, q, q, layout, 1.0)
    half = torch.empty(1, 2, 4, 12, dtype=torch.bfloat16, device="meta")
    assert "multiples of 8" in why_not_segments(_on_cuda(half), layout, None)
    assert "window of 3" in why_not_segments(_on_cuda(half[..., :8]), layout, 3)
    assert why_not_segments(_on_cuda(half[..., :8]), layout, 4) is None


def _on_cuda(x):
    from types import SimpleNamespace

    return SimpleNamespace(is_cuda=True, dtype=x.dtype, shape=x.shape, device=x.device)


def test_gradcheck():
    prompts, rows = CASES["two groups"]
    q, k, v = inputs(18, heads=2, kv_heads=1, width=3)
    layout = SharedPrompts.of(prompts, rows, q.device)
    assert torch.autograd.gradcheck(
        lambda q, k, v: shared_prompt_attention(q, k, v, layout, 0.5, Dense()), (q, k, v)
    )


def test_completions_do_not_see_each_other():
    prompts, rows = CASES["two groups"]
    q, k, v = (x.detach() for x in inputs(18))
    layout = SharedPrompts.of(prompts, rows, q.device)
    before = shared_prompt_attention(q, k, v, layout, 0.5, Dense())
    first = layout.completions.start  # of the first completion of the first group
    assert layout.order[first : first + 2].tolist() == [4, 5]
    k[first : first + 2] += 1.0
    after = shared_prompt_attention(q, k, v, layout, 0.5, Dense())
    moved = (before != after).any(-1).any(-1)
    assert moved.nonzero().flatten().tolist() == [first, first + 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "heads", "width"), [(1, 1, 8), (7, 3, 12), (9, 2, 64)])
def test_kernel_merges_as_its_twin(dtype, rows, heads, width):
    from grpo_lightning.ops.attention import varlen_triton

    g = torch.Generator().manual_seed(0)
    out, more = (torch.randn(rows, heads, width, generator=g).to(dtype) for _ in range(2))
    whole = 30 * torch.randn(heads, rows + 2, generator=g)
    lse, mass = whole[:, 2:], 30 * torch.randn(heads, rows, generator=g)
    exact = [x.double().clone() for x in (out, lse, more, mass)]
    Dense().merge(*exact)
    before = whole[:, :2].clone()
    varlen_triton.merge(out, lse, more, mass)
    eps = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact[0], atol=eps, rtol=eps)
    torch.testing.assert_close(lse.double(), exact[1], atol=1e-5, rtol=1e-6)
    assert torch.equal(lse, mass)
    assert torch.equal(whole[:, :2], before)
