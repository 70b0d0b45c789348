"""Metrics over a sample of the completions are metrics over all of them."""

from dataclasses import replace

import pytest
import torch
from losses import assert_as_twin, micro_batch
from models import random_rollout

from grpo_lightning import losses
from grpo_lightning.losses import CorrectionConfig, LossConfig, fused
from grpo_lightning.metrics.reduce import combine, ratio, values
from grpo_lightning.packing.geometry import sampling_weights
from grpo_lightning.rollout import micro_batches as parts
from grpo_lightning.rollout.micro_batches import with_fair_sample

LENGTHS = [5, 0, 1, 40, 7, 7, 3, 12, 9, 2]


@pytest.mark.parametrize("draws", [1, 3, 6, 30])
def test_the_sample_is_unbiased_and_knows_its_tokens(draws):
    y = torch.randn(len(LENGTHS), generator=torch.Generator().manual_seed(0)).double()
    found = torch.tensor([sampling_weights(LENGTHS, draws, (i + 0.5) / 4000) for i in range(4000)]).double()
    torch.testing.assert_close(
        found.mean(0), torch.tensor([float(n > 0) for n in LENGTHS]).double(), atol=0.025, rtol=0
    )
    assert (found @ torch.tensor(LENGTHS).double()).tolist() == pytest.approx([sum(LENGTHS)] * 4000)
    assert (found @ y).mean() == pytest.approx(float(y.sum() - y[1]), abs=0.05)
    assert int((found > 0).sum(1).max()) <= draws


def window(groups=40, alive=2, longest=30):
    b = random_rollout(prompts=groups, group=4, longest=longest, seed=1)
    a = torch.where(b.group_ids[b.sequence_ids] < alive, b.advantages, 0.0)
    g = torch.Generator().manual_seed(2)
    return replace(b, advantages=a, sampler_logprobs=-torch.rand(len(b.target_ids), generator=g))


def without_signal(b):
    """Returns [S], which completions have an advantage of 0."""
    return torch.tensor([bool((b.advantages[b.sequence_ids == s] == 0).all()) for s in range(len(b.lengths))])


def test_few_completions_of_dead_groups_run_and_all_that_train():
    b = window()
    sample = with_fair_sample(b, seed=0)
    weights = sample.sample_weights
    still = without_signal(sample)
    assert int((~still).sum()) == int((~without_signal(b)).sum())
    assert (weights[~still] == 1).all()
    assert parts.FEWEST <= int(still.sum()) <= parts.COMPLETIONS - int((~still).sum())
    assert float((weights * torch.tensor(sample.lengths)).sum()) == pytest.approx(sum(b.lengths))
    assert torch.equal(with_fair_sample(b, seed=0).target_ids, sample.target_ids)
    assert with_fair_sample(b, seed=1).lengths != sample.lengths
    assert (
        with_fair_sample(replace(b, policy_versions=(1,) * len(b.lengths)), seed=0).lengths != sample.lengths
    )


@pytest.mark.parametrize("alive", [0, 40])
def test_nobody_trains_or_everybody(alive):
    b = window(alive=alive)
    sample = with_fair_sample(b, seed=0)
    assert len(sample.lengths) <= parts.COMPLETIONS if alive == 0 else sample.lengths == b.lengths


def test_few_dead_completions_all_run_and_stand_for_themselves():
    b = window(groups=4, alive=1)
    sample = with_fair_sample(b, seed=0)
    assert sum(sample.lengths) == sum(b.lengths)
    assert (sample.sample_weights == 1).all()


def test_long_completions_are_few():
    sample = with_fair_sample(window(groups=40, alive=0, longest=2000), seed=0)
    assert len(sample.lengths) == parts.FEWEST


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_metrics_of_the_sample_are_those_of_all(level, mode):
    """Averaged over where the first point lies; TRL divides by all tokens too."""
    correction = CorrectionConfig(level=level, mode=mode, high=1.3)
    config = LossConfig("dapo", correction=correction, clip_low=0.1, clip_high=0.1)
    b = window()
    g = torch.Generator().manual_seed(3)
    logprobs = b.sampler_logprobs + 0.3 * torch.randn(len(b.target_ids), generator=g)
    entropy = torch.rand(len(b.target_ids), generator=g) + (b.advantages == 0)
    b = replace(b, old_logprobs=logprobs - 0.1)
    marked = replace(b, ref_logprobs=logprobs, old_entropies=entropy)
    want = losses.policy_loss(logprobs, b, config, entropy)
    rows = []
    for seed in range(400):
        s = with_fair_sample(marked, seed)
        rows.append(losses.policy_loss(s.ref_logprobs, s, config, s.old_entropies))
    one = values(rows[0].stats)
    truth = values(want.stats)
    torch.testing.assert_close(rows[0].loss, want.loss)
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/high_max"):
        assert one[name] == pytest.approx(truth[name], rel=1e-5), name
    for name in (
        "entropy",
        "sampling/sampling_logp_difference/mean",
        "sampling/prob_error",
        "sampling/importance_sampling_ratio/mean",
    ):
        mean = sum(values(r.stats)[name] for r in rows) / len(rows)
        assert mean == pytest.approx(truth[name], rel=0.05), name
    alone = losses.policy_loss(*_living(logprobs, b, entropy, config))
    assert values(alone.stats)["entropy"] < 0.7 * truth["entropy"]


def _living(logprobs, b, entropy, config):
    s = replace(b, ref_logprobs=logprobs, old_entropies=entropy).without_groups(b.zero_variance_groups())
    return s.ref_logprobs, s, config, s.old_entropies


@pytest.mark.parametrize("name", ["dapo", "gspo", "cispo", "vespo", "sapo"])
@pytest.mark.parametrize("level", ["token", "geometric"])
def test_the_kernel_weighs_as_its_twin(name, level):
    made = micro_batch()
    w = torch.tensor([1.0, 1.0, 7.5, 1.0, 3.25, 1.0, 2.0, 1.0])
    correction = CorrectionConfig(level="token" if name == "vespo" else level, mode="truncate", high=1.3)
    config = LossConfig(name, correction=correction, kl_coef=0.1, off_policy_threshold=0.2)
    weighed = {**made, "batch": replace(made["batch"], sample_weights=w)}
    got, plain = assert_as_twin(config, **weighed), assert_as_twin(config, **made)
    assert torch.equal(got.dlogprobs, plain.dlogprobs)
    assert float(got.loss) == float(plain.loss)
    assert values(got.stats)["entropy"] != values(plain.stats)["entropy"]


def test_weights_survive_a_checkpoint_and_a_split():
    from grpo_lightning.callbacks.rollout_state import batch_state, restore_batch

    sample = with_fair_sample(window(), seed=0)
    again = restore_batch(batch_state(sample))
    assert torch.equal(again.sample_weights, sample.sample_weights)
    assert torch.equal(torch.cat([p.sample_weights for p in sample.split(3)]), sample.sample_weights)


def test_a_ratio_and_its_error():
    g = torch.Generator().manual_seed(0)
    n = torch.randint(1, 9, (500,), generator=g).double()
    found, spread = [], []
    for seed in range(200):
        y = n * (0.3 + torch.randn(500, generator=torch.Generator().manual_seed(seed)).double())
        a, b = (
            dict(zip(("k", "e"), ratio(y[at], n[at]), strict=True)) for at in (slice(0, 100), slice(100, 500))
        )
        both = values(combine([a, b]))
        found.append(both["k"])
        spread.append(both["e"])
    assert torch.tensor(found).mean() == pytest.approx(0.3, abs=0.01)
    assert sum(spread) / 200 == pytest.approx(float(torch.tensor(found).std()), rel=0.15)


def test_the_torch_twin_of_the_op_weighs_too():
    made = micro_batch()
    b = replace(made["batch"], sample_weights=torch.full((8,), 2.0))
    got = fused.policy_loss_grad(made["logprobs"], b, LossConfig("dapo"), made["entropy"])
    want = fused.policy_loss_grad(made["logprobs"], made["batch"], LossConfig("dapo"), made["entropy"])
    assert values(got.stats) == pytest.approx(values(want.stats))
