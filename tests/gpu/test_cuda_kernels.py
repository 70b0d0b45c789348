"""The kernels on a GPU against fp64: `pytest -m gpu tests/gpu`, then `pytest tests/unit/test_*_triton.py`."""

import gc
from dataclasses import replace

import pytest
import torch
from losses import REQUIRED, assert_as_twin, micro_batch
from models import random_rollout, tiny_llama
from tiny import tiny_tokenizer
from ways import NoGraph

from grpo_lightning.kernels.config import KernelConfig
from grpo_lightning.losses import RECIPES, CorrectionConfig, LossConfig
from grpo_lightning.losses.fused import policy_loss_grad
from grpo_lightning.ops import fused_linear_logprobs
from grpo_lightning.ops.attention.shared_prompts import SharedPrompts
from grpo_lightning.ops.attention.varlen import Dense, Flash, shared_prompt_attention
from grpo_lightning.ops.lora_linear import Adapted, lora_linears
from grpo_lightning.ops.rotary import rotary
from grpo_lightning.ops.swiglu import swiglu
from grpo_lightning.policy.policy import Policy
from grpo_lightning.policy.verification import logprob_distance

pytestmark = pytest.mark.gpu
BODY = KernelConfig(attention="on", lora="on", qkv="on", swiglu="on", norm="on", rotary="on")
EVERYTHING = replace(BODY, head="on", compile="on", loss="on")
GRAPHS = replace(BODY, graphs="on")


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def draw(*shape, seed=0):
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(14, 2, 64), (16, 2, 128), (4, 4, 64)])
def test_shared_prompts_against_fp64(heads, kv_heads, width):
    prompts, rows = [130, 1, 77], [[40, 3, 0, 255], [5], [1, 64, 90]]
    total = sum(prompts) + sum(map(sum, rows))
    layout = SharedPrompts.of(prompts, rows, torch.device("cuda"))
    half = [draw(total, h, width, seed=i).bfloat16() for i, h in enumerate((heads, kv_heads, kv_heads))]
    exact = [x.double().requires_grad_() for x in half]
    half = [x.requires_grad_() for x in half]
    got = shared_prompt_attention(*half, layout, width**-0.5, Flash())
    want = shared_prompt_attention(*exact, layout, width**-0.5, Dense())
    assert relative(got, want) < 5e-3
    dout = draw(*got.shape, seed=9).bfloat16()
    ours = torch.autograd.grad(got, half, dout)
    theirs = torch.autograd.grad(want, exact, dout.double())
    for a, b in zip(ours, theirs, strict=True):
        assert a.isfinite().all()
        assert relative(a, b) < 8e-3


def test_fused_lora_against_fp64():
    x, w, bias = draw(300, 256).bfloat16(), draw(512, 256, seed=1).bfloat16(), draw(512, seed=2).bfloat16()
    a, b = draw(16, 256, seed=3), draw(512, 16, seed=4)
    x.requires_grad_()
    a.requires_grad_()
    b.requires_grad_()
    (y,) = lora_linears(x, [Adapted(a, b, 0.5, w, bias)])
    dy = draw(300, 512, seed=5).bfloat16()
    y.backward(dy)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, w, bias, a, b)]
    want = exact[0] @ exact[1].T + exact[2] + 0.5 * (exact[0] @ exact[3].T) @ exact[4].T
    want.backward(dy.double())
    assert relative(y, want) < 1e-2
    for got, ref in ((x, exact[0]), (a, exact[3]), (b, exact[4])):
        assert relative(got.grad, ref.grad) < 1e-2
    assert a.grad.dtype == torch.float32


def test_siblings_share_x_in_bf16():
    """Rows of h and dh lie apart, and their products are written in place."""
    x = draw(300, 256).bfloat16().requires_grad_()
    layers = []
    for i, (width, rank) in enumerate(((512, 16), (128, 8), (128, 3))):
        a, b = draw(rank, 256, seed=3 + i), draw(width, rank, seed=6 + i)
        weight, bias = draw(width, 256, seed=9 + i).bfloat16(), draw(width, seed=12 + i).bfloat16()
        layers.append(Adapted(a.requires_grad_(), b.requires_grad_(), 0.5 + i, weight, bias))
    inputs = [x, *(t for m in layers for t in (m.a, m.b))]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    dys = [draw(300, len(m.b), seed=20 + i).bfloat16() for i, m in enumerate(layers)]
    y = lora_linears(x, layers)
    pairs = zip(layers, exact[1::2], exact[2::2], strict=True)
    want = [
        exact[0] @ m.weight.double().T + m.bias.double() + m.scaling * exact[0] @ a.T @ b.T
        for m, a, b in pairs
    ]
    got = torch.autograd.grad(y, inputs, dys)
    reference = torch.autograd.grad(want, exact, [d.double() for d in dys])
    for ours, theirs in zip((*y, *got), (*want, *reference), strict=True):
        assert relative(ours, theirs) < 1e-2
    assert all(g.dtype == torch.float32 for g in got[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3000, 896), (700, 14, 64), (5, 8192), (17, 4864)])
def test_swiglu_against_its_twin(dtype, shape):
    x, u = (draw(*shape, seed=i).to(dtype).requires_grad_() for i in range(2))
    dy = draw(*shape, seed=4).to(dtype)
    found = []
    for backend in ("triton", "torch"):
        product = swiglu(x, u, backend)
        found.append([product, *torch.autograd.grad(product, [x, u], dy)])
    for a, b in zip(*found, strict=True):
        assert relative(a, b) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(3001, 14, 2, 64), (700, 40, 8, 128), (65, 32, 32, 80), (1, 64, 8, 128), (9, 1, 1, 256)]
)
def test_rotary_against_its_twin(dtype, shape):
    """Of slices of one product, with gradients [1, heads, T, D] and with one that is spread over all."""
    tokens, heads, kv_heads, width = shape
    product = draw(1, tokens, heads + 2 * kv_heads, width).to(dtype).requires_grad_()
    angles = draw(1, tokens, width, seed=1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    dy = [draw(1, n, tokens, width, seed=n).to(dtype).transpose(1, 2) for n in (heads, kv_heads)]
    found = []
    for backend in ("triton", "torch"):
        parts = product[:, :, :heads], product[:, :, heads:-kv_heads]
        out = rotary(*parts, cos, sin, backend)
        spread = torch.autograd.grad(sum(y.sum() for y in out), product, retain_graph=True)
        found.append([*out, *torch.autograd.grad(out, product, dy), *spread])
    for a, b in zip(*found, strict=True):
        assert relative(a, b) < 2 * torch.finfo(dtype).eps


def test_head_in_chunks_with_softcap_and_temperatures():
    h, w = draw(1000, 512).bfloat16().requires_grad_(), (draw(32_001, 512, seed=1) * 0.1).bfloat16()
    ids = torch.randint(0, 32_001, (1000,), device="cuda")
    tau = torch.linspace(0.3, 2.0, 1000, device="cuda")
    logp, entropy = fused_linear_logprobs(
        h, w, ids, tau, softcap=30.0, entropy_grad=True, chunk_rows=384, backend="triton"
    )
    h64 = h.detach().double().requires_grad_()
    x = (30 * torch.tanh(h64 @ w.double().T / 30) / tau.double()[:, None]).log_softmax(-1)
    want, want_entropy = x.gather(1, ids[:, None])[:, 0], -(x.exp() * x).sum(1)
    torch.testing.assert_close(logp.double(), want, atol=1e-4, rtol=0)
    torch.testing.assert_close(entropy.double(), want_entropy, atol=1e-4, rtol=1e-5)
    g, e = draw(1000, seed=2), draw(1000, seed=3)
    torch.autograd.backward([logp, entropy], [g, e])
    torch.autograd.backward([want, want_entropy], [g.double(), e.double()])
    assert relative(h.grad, h64.grad) < 5e-3


LONG = (2048, 0, 1, 700, 513, 512, 511, 90)


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"real", "fipo"}))
@pytest.mark.parametrize("lengths", [LONG, (3, 0, 1, 5)], ids=str)
def test_loss_against_fp64(name, lengths):
    made = {k: x.to("cuda") for k, x in micro_batch(lengths, spread=0.05).items()}
    for correction in (CorrectionConfig(), CorrectionConfig(mode="mask", low=0.95, high=1.05)):
        config = LossConfig(
            name, kl_coef=0.04, entropy_coef=0.01, correction=correction, **REQUIRED.get(name, {})
        )
        assert_as_twin(config, **made)


def test_the_loss_compiles_once_for_all_lengths():
    from grpo_lightning.losses.fused.kernel_triton import loss_kernel

    def variants():
        return sum(len(caches[0]) for caches in loss_kernel.device_caches.values())

    for step in range(20):
        made = micro_batch((1 + 97 * step, step, 0, 1), seed=step)
        b, logprobs = made["batch"].to("cuda"), made["logprobs"].to("cuda")
        logprobs = torch.cat([logprobs, logprobs])[len(logprobs) :]  # wherever it begins
        policy_loss_grad(logprobs, b, LossConfig("gspo", clip_high=0.1 + step), backend="triton")
        if step == 0:
            known = variants()
    assert variants() == known > 0


def lora_policy(dtype=torch.bfloat16, kernels=None):
    from peft import LoraConfig, get_peft_model

    base = tiny_llama(hidden_size=256, intermediate_size=512, head_dim=64, vocab_size=2048)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(base.to("cuda", dtype), lora)
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.05)
    policy = Policy(model, tiny_tokenizer())
    if kernels is not None:
        policy.prepare(kernels, torch.device("cuda"))
    return policy


def gradient(policy, b):
    policy.zero_grad(set_to_none=True)
    (policy.logprobs(b).logprobs * b.advantages).sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.trainable().values()])


def test_a_whole_policy_is_as_near_to_fp32_as_without_kernels():
    b = random_rollout(prompts=5, group=6, longest=60, vocab=2048).to("cuda")
    exact = gradient(lora_policy(torch.float32), b)
    plain = relative(gradient(lora_policy(), b), exact)
    fast = lora_policy(kernels=EVERYTHING)
    assert relative(gradient(fast, b), exact) < 1.5 * plain + 1e-3
    assert logprob_distance(fast, b).mean() < 0.05


def test_the_body_alone_takes_every_exchange_and_stays_as_near():
    b = random_rollout(prompts=5, group=6, longest=60, vocab=2048).to("cuda")
    exact = gradient(lora_policy(torch.float32), b)
    fast = lora_policy(kernels=BODY)
    names = [type(m).__name__ for m in fast.modules()]
    for start, count in (("SharingFused", 10), ("Fused", 4), ("Swiglu", 2), ("Kernel", 5), ("Rotary", 2)):
        assert sum(n.startswith(start) for n in names) == count
    plain = relative(gradient(lora_policy(), b), exact)
    assert relative(gradient(fast, b), exact) < 1.5 * plain + 1e-3


def test_completions_do_not_see_their_neighbours():
    policy = lora_policy(kernels=KernelConfig(attention="on"))
    b = random_rollout(prompts=3, group=4, longest=40, vocab=2048, seed=2).to("cuda")
    alone = b.take([5])
    with torch.no_grad():
        among = policy.logprobs(b).logprobs[b.sequence_ids == 5]
        torch.testing.assert_close(policy.logprobs(alone).logprobs, among, atol=0.05, rtol=0)


def test_nothing_compiles_after_the_third_step():
    """Triton's and torch's compilers, over 30 batches of other lengths."""
    import triton
    from torch._dynamo.utils import counters

    compiled = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **kwargs: compiled.append(kwargs["repr"])
    torch._dynamo.reset()  # its limit of variants is one for all tests of a process
    try:
        policy = lora_policy(kernels=EVERYTHING)
        for step in range(30):
            b = random_rollout(prompts=2 + step % 5, group=4, longest=20 + 3 * step, vocab=2048, seed=step)
            gradient(policy, b.to("cuda"))
            if step == 2:
                known, graphs = len(compiled), counters["stats"]["unique_graphs"]
        assert compiled[known:] == []
        assert counters["stats"]["unique_graphs"] == graphs > 0
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None


def adapter_gradient(policy, *batches):
    policy.zero_grad()
    for batch in batches:
        policy.logprobs(batch).logprobs.square().sum().backward()
    return {n: p.grad.clone() for n, p in policy.trainable().items()}


def replayed_gradient(policy, batch):
    """The first batch of a shape runs without a graph."""
    adapter_gradient(policy, batch)
    captures = policy.graphs.captures
    found = adapter_gradient(policy, batch)
    assert policy.graphs.captures == captures + 1
    return found


def test_graphs_give_the_gradient_of_a_call():
    """One shape, with other tokens and lengths each time."""
    batches = [random_rollout(seed=s, prompts=2 + s % 2, longest=9).to("cuda") for s in range(6)]
    policy = lora_policy(kernels=BODY)
    want = [adapter_gradient(policy, b) for b in batches]
    policy.prepare(GRAPHS, torch.device("cuda"))
    for batch, expected in zip(batches, want, strict=True):
        for name, got in adapter_gradient(policy, batch).items():
            assert relative(got, expected[name]) < 3e-2, name
    assert policy.graphs.captures == len(policy.graphs._captured) == 1


@pytest.mark.parametrize("prompt", [40, 1100], ids="{} tokens".format)
def test_graphs_give_the_bits_of_a_call(prompt):
    """A resumed run starts without graphs.

    Segments are short, since flash adds up dq over every 128 keys in any order.
    """
    prompts = [[5] * 64] * (prompt // 64) + [[7] * (prompt % 64 + 1)]
    batch = random_rollout(prompts=len(prompts), longest=9, prompt_ids=prompts).to("cuda")
    policy = lora_policy(kernels=GRAPHS)
    found = []
    for _ in range(4):  # called, captured and replayed, replayed, replayed
        logprobs = policy.logprobs(batch).logprobs.detach()
        found.append({"logprobs": logprobs, **adapter_gradient(policy, batch)})
    assert policy.graphs.captures == 1
    for again in found[1:]:
        assert again.keys() == found[0].keys()
        assert all(torch.equal(x, again[name]) for name, x in found[0].items())


def test_sixty_steps_capture_few_graphs():
    """Of groups of very different sizes and numbers; kernels are compiled by calls alone."""
    policy = lora_policy(kernels=GRAPHS)
    for seed in range(60):
        prompts = [[5] * (50 + seed)] * (1 + seed * 7 % 16)
        batch = random_rollout(len(prompts), 8, 4 + seed % 13, seed=seed, prompt_ids=prompts).to("cuda")
        assert all(g.isfinite().all() for g in adapter_gradient(policy, batch).values())
    assert policy.graphs.captures == 2  # prompts of up to 1,024 rows together, and of up to 2,048


def test_gradients_of_graphs_add_up():
    policy, batch = lora_policy(kernels=GRAPHS), random_rollout(seed=1).to("cuda")
    once, twice = replayed_gradient(policy, batch), adapter_gradient(policy, batch, batch)
    for name, got in twice.items():
        torch.testing.assert_close(got, 2 * once[name], rtol=1e-4, atol=1e-7)


def test_graphs_see_what_the_optimizer_changed():
    policy, batch = lora_policy(kernels=GRAPHS), random_rollout(seed=1).to("cuda")
    replayed_gradient(policy, batch)
    before = policy.logprobs(batch).logprobs.detach()
    adapter_gradient(policy, batch)
    torch.optim.SGD(policy.trainable().values(), 0.01).step()
    after = policy.logprobs(batch).logprobs.detach()
    with torch.no_grad():
        want = policy.logprobs(batch).logprobs
    assert (after - before).abs().max() > 10 * (after - want).abs().max()


def test_a_second_forward_before_the_backward_runs_without_a_graph():
    policy = lora_policy(kernels=GRAPHS)
    first, second = (random_rollout(seed=s).to("cuda") for s in (1, 2))
    want = replayed_gradient(policy, first)
    policy.zero_grad()
    loss = policy.logprobs(first).logprobs.square().sum()
    policy.logprobs(second)
    loss.backward()
    for name, p in policy.trainable().items():
        assert relative(p.grad, want[name]) < 1e-3, name


def test_a_capture_beside_a_graph_that_is_alive():
    policy = lora_policy(kernels=GRAPHS)
    first, second = (
        random_rollout(prompts=2, prompt_ids=[[5] * n] * 2).to("cuda")
        for n in (40, 700)  # of two shapes
    )
    want = adapter_gradient(policy, second)
    adapter_gradient(policy, first)
    kept = policy.logprobs(first).logprobs
    kept.square().sum().backward()
    for name, got in adapter_gradient(policy, second).items():
        assert relative(got, want[name]) < 1e-3, name
    assert len(policy.graphs._captured) == 2
    assert kept.grad_fn is not None


def test_graphs_with_checkpointed_layers():
    policy, batch = lora_policy(kernels=GRAPHS), random_rollout(seed=1).to("cuda")
    want = adapter_gradient(policy, batch)
    checkpointed = lora_policy()
    checkpointed.causal.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    checkpointed.train()
    checkpointed.prepare(GRAPHS, torch.device("cuda"))
    for name, got in replayed_gradient(checkpointed, batch).items():
        assert relative(got, want[name]) < 3e-2, name


def test_graphs_that_are_garbage_do_not_spoil_a_capture():
    batch = random_rollout(seed=1).to("cuda")
    want = adapter_gradient(lora_policy(kernels=BODY), *batch.split(2))
    for _ in range(3):
        policy = lora_policy(kernels=GRAPHS)
        policy.model.itself = [policy]  # a cycle: only the collector frees it
        gc.set_threshold(50)
        try:
            adapter_gradient(policy, *batch.split(2))
            got = adapter_gradient(policy, *batch.split(2))
        finally:
            gc.set_threshold(700)
        for name, g in got.items():
            assert relative(g, want[name]) < 3e-2, name
        del policy


def test_filled_batches_read_nothing_that_was_not_written():
    """Memory that a call gets holds NaN; a layout that leaves out rows would pass them on."""
    batches = [random_rollout(seed=s, prompts=1 + s, longest=9).to("cuda") for s in range(6)]
    policy = lora_policy(kernels=GRAPHS)
    policy.graphs = NoGraph(policy)
    for batch in batches:
        torch.cuda.empty_cache()
        spoiled = [torch.full((n,), torch.nan, device="cuda") for n in [1 << 28] + [100_000] * 500]
        del spoiled
        assert all(g.isfinite().all() for g in adapter_gradient(policy, batch).values())


def test_a_loss_that_compiles_while_somebody_watches():
    """As vLLM does in the trainer's process."""
    from triton import knobs

    told = []
    knobs.runtime.jit_post_compile_hook = lambda **kwargs: told.append(kwargs)
    try:
        batch = random_rollout(seed=1).to("cuda")
        logprobs = -torch.rand(len(batch.target_ids), device="cuda")
        config = LossConfig("grpo", kl_coef=0.1, kl_estimator="k2", dual_clip=2.5)  # of no other test
        out = policy_loss_grad(
            logprobs, replace(batch, ref_logprobs=logprobs - 0.1), config, backend="triton"
        )
    finally:
        knobs.runtime.jit_post_compile_hook = None
    assert out.loss.isfinite()
