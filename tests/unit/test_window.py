"""What is chosen once per window: the same for any split and any number of ranks."""

from dataclasses import replace

import pytest
import torch
from models import random_rollout

from grpo_lightning.errors import ConfigError
from grpo_lightning.losses import LossConfig
from grpo_lightning.losses.token_selection import choose_tokens, hashed, quantile


def scored(seed=0, **changes):
    b = random_rollout(prompts=4, group=4, seed=seed, **changes)
    g = torch.Generator().manual_seed(seed)
    n = len(b.target_ids)
    return replace(
        b,
        old_logprobs=-3 * torch.rand(n, generator=g),
        old_entropies=torch.rand(n, generator=g),
    )


CONFIGS = {
    "kl_cov": LossConfig("kl_cov", cov_frac=0.2),
    "clip_cov": LossConfig("clip_cov", cov_frac=0.1, cov_low=-1.0, cov_high=5.0),
    "top_entropy": LossConfig("dapo", top_entropy_quantile=0.3),
}


def chosen(parts, name):
    field = "entropy_keep" if name == "top_entropy" else "selected"
    return torch.cat([getattr(p, field) for p in parts])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("m", [2, 5])
def test_any_split_chooses_the_same_tokens(name, m):
    b, config = scored(), CONFIGS[name]
    whole = choose_tokens([b], config, seed=1, gather=lambda x: [x])
    parts = choose_tokens(b.split(m), config, seed=1, gather=lambda x: [x])
    assert 0 < chosen(whole, name).sum() < len(b.target_ids)
    assert torch.equal(chosen(whole, name), chosen(parts, name))
    assert parts[0].normalizers == whole[0].normalizers


class Ranks:
    """Two ranks in lock step: `gather` of each sees what both gave, call by call."""

    def __init__(self, run):
        self.calls = [[], []]
        for _ in range(6):  # each round knows the answers of the round before
            self.results = [self._one(run, rank) for rank in (0, 1)]

    def _one(self, run, rank):
        other, mine, seen = self.calls[1 - rank], [], iter(range(100))

        def gather(x):
            i = next(seen)
            mine.append(x)
            theirs = other[i] if i < len(other) else x
            return [x, theirs] if rank == 0 else [theirs, x]

        result = run(rank, gather)
        self.calls[rank] = mine
        return result


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_choose_what_one_would(name):
    b, config = scored(seed=3), CONFIGS[name]
    whole = chosen(choose_tokens([b], config, seed=1, gather=lambda x: [x]), name)
    halves = [b.take(range(8)), b.take(range(8, 16))]
    ranks = Ranks(lambda rank, g: choose_tokens([halves[rank]], config, seed=1, gather=g, rank=rank))
    assert torch.equal(torch.cat([chosen(r, name) for r in ranks.results]), whole)


def test_golden_kl_cov_selects_the_largest_covariance():
    b = scored()
    picked = chosen(choose_tokens([b], CONFIGS["kl_cov"], seed=0, gather=lambda x: [x]), "kl_cov")
    a, old = b.advantages.double(), b.old_logprobs.double()
    covariance = (a - a.mean()) * (old - old.mean())
    count = max(1, int(0.2 * len(a)))
    assert set(picked.nonzero().flatten().tolist()) == set(covariance.topk(count).indices.tolist())


def test_equal_covariances_go_to_the_first():
    """Without signal every covariance is 0; the penalty still falls on the agreed number of tokens."""
    b = scored(seed=3)
    b = replace(b, advantages=torch.zeros_like(b.advantages))
    whole = chosen(choose_tokens([b], CONFIGS["kl_cov"], seed=0, gather=lambda x: [x]), "kl_cov")
    count = max(1, int(CONFIGS["kl_cov"].cov_frac * len(whole)))
    assert whole.tolist() == [True] * count + [False] * (len(whole) - count)
    halves = [b.take(range(8)), b.take(range(8, 16))]
    ranks = Ranks(
        lambda rank, g: choose_tokens([halves[rank]], CONFIGS["kl_cov"], seed=0, gather=g, rank=rank)
    )
    assert torch.equal(torch.cat([chosen(r, "kl_cov") for r in ranks.results]), whole)


def test_clip_cov_stays_inside_its_bounds_and_follows_the_seed():
    b = scored()
    config = LossConfig("clip_cov", cov_frac=0.05, cov_low=0.1, cov_high=1.0)
    a, old = b.advantages.double(), b.old_logprobs.double()
    covariance = (a - a.mean()) * (old - old.mean())
    picks = [
        tuple(
            chosen(choose_tokens([b], config, seed=s, gather=lambda x: [x]), "clip_cov")
            .nonzero()
            .flatten()
            .tolist()
        )
        for s in range(8)
    ]
    assert len(set(picks)) > 1
    assert all(0.1 < covariance[n] < 1.0 for pick in picks for n in pick)
    assert {len(p) for p in picks} == {max(1, int(0.05 * len(a)))}


def test_nothing_inside_the_bounds_selects_nothing():
    config = LossConfig("clip_cov", cov_low=100.0, cov_high=200.0)
    assert not chosen(choose_tokens([scored()], config, seed=0, gather=lambda x: [x]), "clip_cov").any()


def test_golden_top_entropy_quantile():
    x = torch.tensor([2.0, 0.5, 0.2, 0.3, 1.0])
    assert quantile(x, 0.6).item() == pytest.approx(0.7)
    torch.testing.assert_close(quantile(x, 0.25), torch.quantile(x, 0.25))
    assert quantile(torch.zeros(0), 0.5) == 0


def test_hashes_are_uniform_and_depend_on_the_seed():
    x = hashed(torch.arange(20_000), 7)
    assert x.mean().item() == pytest.approx(0.5, abs=0.01)
    assert x.std().item() == pytest.approx(12**-0.5, abs=0.01)
    assert len(x.unique()) == 20_000
    assert not torch.equal(x, hashed(torch.arange(20_000), 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "dppo_kl", "dppo_low": 0.0}, "dppo_low is 0.0; it must be given, > 0, for dppo_kl"),
        ({"name": "dro"}, "dro_coef is None"),
        ({"name": "cispo", "cispo_weight_max": 0.2}, "absolute"),
        ({"name": "cispo", "ratio_level": "sequence"}, r"ratio_level is 'sequence'"),
        ({"name": "real", "top_entropy_quantile": 0.5}, "whole groups"),
        (
            {"kl_coef": 0.1, "kl_estimator": "k1", "kl_bias_correction": False},
            "kl_bias_correction",
        ),
        ({"name": "dapo", "top_entropy_quantile": 0.0}, r"in \(0, 1\]"),
    ],
)
def test_configs_that_cannot_work(changes, message):
    with pytest.raises(ConfigError, match=message):
        LossConfig(**changes)
