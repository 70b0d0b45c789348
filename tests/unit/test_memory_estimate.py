"""The estimate of what a micro-batch needs, the number of micro-batches that follows, and those without
tokens."""

from dataclasses import replace

import pytest
import torch
from models import random_rollout, tiny_llama
from tiny import tiny_tokenizer

from grpo_lightning.errors import ConfigError
from grpo_lightning.losses import LossConfig, policy_loss
from grpo_lightning.ops.zero_grad import tied
from grpo_lightning.packing.geometry import SequenceLayout
from grpo_lightning.policy.policy import Policy
from grpo_lightning.rollout.micro_batch_sizing import (
    FRACTION,
    KEPT,
    Estimate,
    MicroBatchSizer,
    check_micro_batches,
)


def test_memory_through_the_origin_is_predicted_exactly():
    e = Estimate()
    assert e.predict((100, 80)) is None
    e.observe((100, 80), 1000)
    assert e.predict((200, 160)) == 2000
    assert e.predict((50, 40)) == 1000  # smaller micro-batches count as this one until they are seen
    e.observe((50, 40), 500)
    assert e.predict((50, 40)) == 500


def test_a_constant_shows_once_two_sizes_are_known():
    e = Estimate()
    e.observe((100,), 600 + 100)
    assert e.predict((400,)) == 4 * 700
    e.observe((200,), 600 + 200)
    assert e.constant == pytest.approx(600)
    assert e.predict((400,)) == pytest.approx(600 + 400)


def test_an_observation_above_the_prediction_raises_it_at_once():
    e = Estimate()
    for size in (100, 200, 400):
        e.observe((size,), 600 + size)
    e.observe((300,), 2000)
    assert e.predict((300,)) == 2000
    assert e.predict((600,)) == 4000
    assert e.predict((100,)) == 2000


@pytest.mark.parametrize("seed", range(20))
def test_no_bound_is_below_the_need(seed):
    """Whatever the constant and the slopes, in whatever order micro-batches come; the least is not far."""
    g = torch.Generator().manual_seed(seed)

    def numbers(low, high, n):
        return torch.randint(low, high, (n,), generator=g).tolist()

    constant, *slopes = (x * y for x, y in zip(numbers(0, 1000, 4), numbers(0, 2, 4), strict=True))
    e = Estimate()
    for _ in range(2 * KEPT):
        sizes = tuple(numbers(1, 500, 3))
        need = constant + sum(a * x for a, x in zip(slopes, sizes, strict=True))
        bound = e.predict(sizes)
        assert bound is None or bound >= need * (1 - 1e-9)
        e.observe(sizes, need)
        assert e.predict(sizes) == pytest.approx(need, rel=1e-9, abs=1e-6)
        assert len(e.seen) <= KEPT


class Fake:
    """A device on which a micro-batch of n rows needs `constant + n` bytes."""

    def __init__(self, free, constant=0):
        self.free, self.constant = free, constant

    def begin(self):
        pass

    def needed(self):
        raise AssertionError("the test observes by itself")

    def available(self):
        return self.free / FRACTION


class Rows:
    def sizes(self, shape):
        return (shape.num_tokens,)


def equal_completions(count, length):
    return SequenceLayout.of((0,) * count, (length + 1,) * count, tuple(range(count)))


@pytest.mark.parametrize("constant", [0, 50])
@pytest.mark.parametrize("free", [10, 90, 110, 160, 210, 260, 310, 410, 460, 10_000])
def test_as_few_as_fit_and_never_more_than_allowed(free, constant):
    """Eight completions of 50 tokens; after a few steps the number is the least that fits.

    With a constant that nothing has shown yet it may be one more.
    """
    meter, shape = Fake(free, constant), equal_completions(8, 50)
    sizer = MicroBatchSizer("auto", 4, Rows(), meter)
    fits = [n for n in range(1, 5) if constant + 50 * -(-8 // n) <= free]
    chosen = []
    for _ in range(5):
        chosen.append(sizer.count(shape, whole_groups=False))
        for part in shape.split(chosen[-1]):
            rows = shape.take(part).num_tokens
            sizer.estimate.observe((rows,), constant + rows)
    assert chosen[0] == 4
    assert all(n in fits for n in chosen) or not fits
    assert 0 <= chosen[-1] - (min(fits) if fits else 4) <= (constant > 0)


def test_groups_that_must_stay_whole_count_whole():
    shape = SequenceLayout.of((0, 0), (51,) * 8, (0,) * 7 + (1,))
    sizer = MicroBatchSizer("auto", 4, Rows(), Fake(210))
    sizer.estimate.observe((200,), 200)
    assert sizer.count(shape, whole_groups=False) == 2
    assert sizer.count(shape, whole_groups=True) == 4


def test_fixed_numbers_need_no_meter():
    shape = equal_completions(8, 50)
    assert [MicroBatchSizer(w, 4).count(shape, whole_groups=False) for w in ("auto", "all", 1, 3)] == [
        4,
        4,
        1,
        3,
    ]


@pytest.mark.parametrize("value", [0, -1, 5, "al", True, 1.5])
def test_values_that_cannot_be_name_key_value_and_remedy(value):
    with pytest.raises(ConfigError, match=rf"micro_batches is {value!r}; .*grad_batches is 4; .*take auto"):
        check_micro_batches(value, 4)


@pytest.mark.parametrize("whole_groups", [False, True])
def test_an_outline_is_cut_as_its_batch_is(whole_groups):
    b = random_rollout(prompts=4, group=5, seed=2)
    for n in (1, 2, 3):
        parts = b.split(n, whole_groups=whole_groups)
        cuts = b.sequence_layout.split(n, whole_groups=whole_groups)
        assert [p.sequence_layout for p in parts] == [b.sequence_layout.take(c) for c in cuts]
    assert b.sequence_layout.unshared().num_tokens == b.unshared().num_tokens


def test_sizes_are_what_the_policy_runs():
    policy, b = Policy(tiny_llama(), tiny_tokenizer()), random_rollout(prompts=3, group=4, seed=1)
    seen = []
    policy.causal.get_decoder().register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    for settings in ({"shared_prompts": "on"}, {"shared_prompts": "off"}):
        policy.kernels = replace(policy.kernels, **settings)
        rows, targets, pairs = policy.sizes(b.sequence_layout)
        policy.logprobs(b)
        assert (rows, targets) == (seen.pop(), len(b.target_ids))
        assert pairs >= rows
    policy.padded_reason = "test"
    policy._set_attention("sdpa")
    policy.logprobs(b)
    assert policy.sizes(b.sequence_layout)[0] == seen.pop()


def test_the_tie_leaves_gradients_and_makes_missing_ones():
    there, missing = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    there.grad = torch.tensor([1.0, 2.0])
    tied(torch.zeros(0, 3), [there, missing]).sum().backward()
    assert there.grad.tolist() == [1, 2]
    assert missing.grad is not None
    assert missing.grad.tolist() == [0, 0]


@pytest.mark.parametrize("name", ["bnpo", "dapo", "grpo"])
def test_empty_micro_batches_do_not_dilute(name):
    b = random_rollout(prompts=3, group=4, seed=3)
    lp = -torch.rand(len(b.target_ids), generator=torch.Generator().manual_seed(0))

    def loss(most):
        normalizers = replace(b.normalizers, micro_batches=most, empty_micro_batches=most - 2)
        total, start = 0.0, 0
        for part in [b.take([])] * (most - 2) + b.split(2):
            own = lp[start : start + len(part.target_ids)]
            start += len(own)
            total += policy_loss(own, replace(part, normalizers=normalizers), LossConfig(name)).loss.item()
        return total

    assert loss(4) == pytest.approx(loss(2), rel=1e-6)
