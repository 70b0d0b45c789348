"""`fused.policy_loss` is `losses.policy_loss` in value, gradient and statistics."""

from dataclasses import replace

import pytest
import torch
from losses import REQUIRED
from models import random_rollout

from grpo_lightning import losses
from grpo_lightning.losses import RECIPES, CorrectionConfig, LossConfig, fused, register_surrogate
from grpo_lightning.losses.surrogate_table import SURROGATES
from grpo_lightning.metrics.reduce import values


def case(seed=1):
    b = random_rollout(seed=seed)
    g = torch.Generator().manual_seed(seed)
    n = len(b.target_ids)

    def draw():
        return -torch.rand(n, generator=g, dtype=torch.float64)

    b = replace(
        b,
        old_logprobs=draw(),
        ref_logprobs=draw(),
        sampler_logprobs=draw(),
        selected=torch.rand(n, generator=g) < 0.3,
    )
    return b, draw(), -draw()


def run(function, b, config, logprobs, entropy, **weights):
    lp, h = logprobs.clone().requires_grad_(), entropy.clone().requires_grad_()
    out = function(lp, b, config, h, **weights)
    return out, torch.autograd.grad(3.0 * out.loss, (lp, h), allow_unused=True)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
def test_equals_the_definition(name, entropy_coef):
    b, logprobs, entropy = case()
    config = LossConfig(
        name,
        kl_coef=0.04,
        entropy_coef=entropy_coef,
        correction=CorrectionConfig() if name == "real" else CorrectionConfig(mode="mask", low=0.8, high=1.5),
        **REQUIRED.get(name, {}),
    )
    for weights in ({}, {"kl_coef": 0.3, "entropy_coef": 2 * entropy_coef}):
        want, grads = run(losses.policy_loss, b, config, logprobs, entropy, **weights)
        got, ours = run(fused.policy_loss, b, config, logprobs, entropy, **weights)
        assert got.loss.item() == want.loss.item()
        torch.testing.assert_close(ours[0], grads[0], atol=1e-15, rtol=1e-13)
        assert grads[0].abs().max() > 0
        assert (ours[1] is None) == (grads[1] is None) == (entropy_coef == 0)
        if entropy_coef:
            torch.testing.assert_close(ours[1], grads[1], atol=1e-15, rtol=1e-13)
        assert values(got.stats) == values(want.stats)


def test_the_derivative_is_returned_without_a_graph():
    b, logprobs, entropy = case()
    out = fused.policy_loss_grad(logprobs, b, LossConfig("dapo"), entropy)
    assert out.dlogprobs.shape == logprobs.shape
    assert out.dentropy is None
    assert not out.loss.requires_grad
    assert not out.dlogprobs.requires_grad


def test_nothing_to_train_is_still_attached():
    lp = torch.zeros(0, requires_grad=True)
    out = fused.policy_loss(lp, random_rollout().take([]), LossConfig("dapo"))
    out.loss.backward()
    assert lp.grad is not None
    assert out.loss.item() == 0.0


def test_a_surrogate_of_ones_own():
    @register_surrogate("twice")
    def twice(advantages, logprobs):
        return -2 * advantages * logprobs

    try:
        b, logprobs, entropy = case()
        own = LossConfig("dapo", surrogate="twice")
        _, (got, _) = run(fused.policy_loss, b, own, logprobs, entropy)
        _, (want, _) = run(losses.policy_loss, b, LossConfig("gpg"), logprobs, entropy)
        torch.testing.assert_close(got, 2 * want)
    finally:
        del SURROGATES["twice"]
