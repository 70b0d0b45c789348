"""The fused LoRA layer against its formula, and against peft's own layers in a model."""

import pytest
import torch
from models import random_rollout, tiny_llama
from tiny import tiny_tokenizer

from grpo_lightning.kernels.config import KernelConfig
from grpo_lightning.ops.lora_linear import Adapted, lora_linears


def parts(dtype=torch.float64, master=None, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, w, bias = draw(2, 5, 8).to(dtype), draw(7, 8).to(dtype), draw(7).to(dtype)
    a, b = draw(3, 8).to(master or dtype), draw(7, 3).to(master or dtype)
    return x.requires_grad_(), w, bias, a.requires_grad_(), b.requires_grad_()


def formula(x, w, bias, a, b, s):
    return torch.nn.functional.linear(x, w, bias) + s * (x @ a.T) @ b.T


def lora_linear(x, w, bias, a, b, s):
    return lora_linears(x, [Adapted(a, b, s, w, bias)])[0]


def lora_delta(y, x, a, b, s):
    return lora_linears(x, [Adapted(a, b, s, y=y)])[0]


@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck(with_bias):
    x, w, bias, a, b = parts()
    bias = bias if with_bias else None
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, w, bias, a, b, 0.5), (x, a, b))
    y = torch.randn(2, 5, 7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda y, x, a, b: lora_delta(y, x, a, b, 0.5), (y, x, a, b))
    torch.testing.assert_close(lora_linear(x, w, bias, a, b, 0.5), formula(x, w, bias, a, b, 0.5))


def test_bf16_keeps_fp32_masters_and_their_gradients():
    x, w, bias, a, b = parts(torch.bfloat16, torch.float32)
    y = lora_linear(x, w, bias, a, b, 2.0)
    y.backward(torch.ones_like(y))
    assert (y.dtype, a.grad.dtype, b.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, w, bias, a, b)]
    want = formula(*exact, 2.0)
    want.sum().backward()
    assert (y.double() - want).norm() / want.norm() < 1e-2
    for got, ref in ((a, exact[3]), (b, exact[4]), (x, exact[0])):
        assert (got.grad.double() - ref.grad).norm() / ref.grad.norm() < 1e-2


def several(dtype=torch.float64, master=None):
    """Three layers over one x: of other widths, ranks and scalings, one of which has computed its base."""
    x, w, bias, a, b = parts(dtype, master)
    g = torch.Generator().manual_seed(7)

    def draw(*shape, kind=master or dtype):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(kind)

    own = draw(2, 5, 6, kind=dtype).requires_grad_()
    second = Adapted(draw(2, 8).requires_grad_(), draw(4, 2).requires_grad_(), 2.0, draw(4, 8, kind=dtype))
    third = Adapted(draw(5, 8).requires_grad_(), draw(6, 5).requires_grad_(), 0.7, y=own)
    return x, [Adapted(a, b, 0.5, w, bias), second, third]


def one_by_one(x, layers):
    return [
        (torch.nn.functional.linear(x, m.weight, m.bias) if m.y is None else m.y)
        + m.scaling * x @ m.a.T @ m.b.T
        for m in layers
    ]


def trained(x, layers):
    return [x, layers[2].y, *(t for m in layers for t in (m.a, m.b))]


def test_several_layers_over_one_x():
    x, layers = several()

    def op(x, y, *adapters):
        pairs = zip(layers, adapters[::2], adapters[1::2], strict=True)
        made = [m._replace(a=a, b=b) for m, a, b in pairs]
        return tuple(lora_linears(x, [*made[:2], made[2]._replace(y=y)]))

    assert torch.autograd.gradcheck(op, trained(x, layers))
    with torch.no_grad():
        for got, want in zip(lora_linears(x, layers), one_by_one(x, layers), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 2)])
def test_layers_that_nobody_asks_get_no_gradient(asked, monkeypatch):
    stock = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: stock(*a, **k).fill_(torch.nan))
    x, layers = several()
    inputs, gradients = trained(x, layers), []
    for f in (lora_linears, one_by_one):
        y = f(x, layers)
        loss = sum((y[i] * y[i].detach().cos()).sum() for i in asked)
        gradients.append(torch.autograd.grad(loss, inputs, allow_unused=True))
    for got, want in zip(*gradients, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want)


def test_several_layers_in_bf16():
    x, layers = several(torch.bfloat16, torch.float32)
    inputs = trained(x, layers)
    y = lora_linears(x, layers)
    exact = {id(t): t.detach().double().requires_grad_(t.requires_grad) for t in inputs}
    wide = [
        Adapted(
            exact[id(m.a)], exact[id(m.b)], m.scaling,
            None if m.weight is None else m.weight.double(), None if m.bias is None else m.bias.double(),
            None if m.y is None else exact[id(m.y)],
        )
        for m in layers
    ]  # fmt: skip
    want = one_by_one(exact[id(x)], wide)
    got = torch.autograd.grad(sum(t.sum() for t in y), inputs)
    reference = torch.autograd.grad(sum(t.sum() for t in want), [exact[id(t)] for t in inputs])
    assert [g.dtype for g in got] == [t.dtype for t in inputs]
    for a, b in zip((*y, *got), (*want, *reference), strict=True):
        assert (a.double() - b).norm() / b.norm() < 2e-2


def test_an_input_that_needs_no_gradient_gets_none():
    x, w, bias, a, b = parts()
    lora_linear(x.detach(), w, bias, a, b, 1.0).sum().backward()
    assert a.grad.abs().sum() > 0


def lora_policy(fused, **lora):
    from peft import LoraConfig, get_peft_model

    from grpo_lightning.policy.policy import Policy

    torch.manual_seed(0)
    model = get_peft_model(
        tiny_llama(),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **lora),
    )
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.2, generator=g)
    policy = Policy(model, tiny_tokenizer())
    if fused:
        policy.prepare(KernelConfig(lora="on"), torch.device("cpu"))
    return policy, sum(type(m).__name__.startswith("Fused") for m in model.modules())


def run(policy):
    b = random_rollout(seed=3)
    logp, _, _ = policy.logprobs(b)
    logp.sum().backward()
    return logp.detach(), {n: p.grad.clone() for n, p in policy.trainable().items()}


def test_a_model_computes_the_same_with_and_without():
    (ours, count), (theirs, _) = lora_policy(True), lora_policy(False)
    assert count == 14
    (got, gradients), (want, reference) = run(ours), run(theirs)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert gradients.keys() == reference.keys()
    for name, g in reference.items():
        torch.testing.assert_close(gradients[name], g, atol=1e-4, rtol=1e-4)
    assert ours.model.state_dict().keys() == theirs.model.state_dict().keys()


def test_pefts_own_switches_still_work():
    (ours, _), (theirs, _) = lora_policy(True), lora_policy(False)
    b = random_rollout(seed=3)
    with torch.no_grad():
        on = ours.logprobs(b).logprobs
        with ours.reference(), theirs.reference():
            assert torch.equal(ours.logprobs(b).logprobs, theirs.logprobs(b).logprobs)
        ours.model.merge_adapter()
        torch.testing.assert_close(ours.logprobs(b).logprobs, on, atol=1e-4, rtol=0)
        ours.model.unmerge_adapter()
        torch.testing.assert_close(ours.logprobs(b).logprobs, on, atol=1e-4, rtol=0)


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"lora_dropout": 0.5}])
def test_what_the_op_does_not_cover_is_pefts(lora):
    (ours, _), (theirs, _) = lora_policy(True, **lora), lora_policy(False, **lora)
    torch.manual_seed(5)
    got, _ = run(ours)
    torch.manual_seed(5)
    want, _ = run(theirs)
    assert torch.equal(got, want)


def test_autocast_is_pefts():
    (ours, _), (theirs, _) = lora_policy(True), lora_policy(False)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = run(ours)[0], run(theirs)[0]
    assert torch.equal(got, want)
