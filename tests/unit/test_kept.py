"""Kept sets: rescoring makes the ratio of a truncated sampler to its own policy exactly 1."""

import pytest
import torch
from models import random_rollout

from grpo_lightning.engines.hf_sampling import choose
from grpo_lightning.ops import fused_linear_logprobs
from grpo_lightning.ops.lm_head.truncation import kept_logmass, truncate
from grpo_lightning.types import SamplingParams, Truncation

CUTS = [{"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}, {"top_p": 0.7, "top_k": 9, "min_p": 0.02}]


def head(rows=64, hidden=16, vocab=97, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, hidden, generator=g), torch.randn(vocab, hidden, generator=g) * 0.4


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "logit_scale": 0.5}])
def test_engine_and_policy_agree_once_rescored(cut, temperature, options):
    h, w = head()
    sampling = SamplingParams(temperature=temperature, **cut)
    logits = h @ w.T * options.get("logit_scale", 1.0)
    if cap := options.get("softcap"):
        logits = cap * torch.tanh(logits / cap)
    u = torch.rand(len(h), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids, sampled = choose(logits, sampling, u)
    logp, _ = fused_linear_logprobs(h, w, ids, temperature, **options)
    mass = kept_logmass(h, w, ids, temperature, kept=sampling.truncation, chunk_rows=10, **options)
    assert (logp - sampled).exp().mean() < 0.97, "the cut has to take something away"
    torch.testing.assert_close(sampled + mass, logp, atol=2e-5, rtol=0)


def test_a_token_outside_counts_as_kept():
    h, w = head(rows=3)
    worst = (h @ w.T).argmin(1)
    best = (h @ w.T).argmax(1)
    kept = Truncation(top_k=1)
    p = (h @ w.T).softmax(1)
    want = (p.gather(1, worst[:, None]) + p.gather(1, best[:, None])).log()[:, 0]
    torch.testing.assert_close(kept_logmass(h, w, worst, kept=kept), want)
    torch.testing.assert_close(
        kept_logmass(h, w, best, kept=kept), p.gather(1, best[:, None]).log()[:, 0], atol=1e-6, rtol=1e-5
    )


def test_the_mass_never_exceeds_one():
    h, w = head()
    mass = kept_logmass(h, w, (h @ w.T).argmax(1), kept=Truncation(top_p=0.999999))
    assert mass.max() <= 0


def test_truncation_of_sampling():
    assert SamplingParams().truncation is None
    assert SamplingParams(min_p=0.0).truncation is None
    assert SamplingParams(top_p=0.9, min_p=0.1).truncation == Truncation(0.9, 0, 0.1)
    z = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    assert truncate(z, Truncation(top_k=2)).isfinite().sum() == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, []),
        ({"top_p": 0.5}, []),
        ({"repetition_penalty": 1.1}, ["repetition_penalty"]),
        ({"regex": "a+"}, ["regex"]),
        ({"extra": {"presence_penalty": 0.5, "skip_special_tokens": False}}, ["presence_penalty"]),
    ],
)
def test_what_makes_probabilities_incomparable(changes, named):
    assert SamplingParams(**changes).off_policy_options == named


def test_rescored_batches_are_over_the_whole_vocabulary():
    b = random_rollout(truncation=Truncation(top_p=0.9))
    n = len(b.target_ids)
    assert b.rescored(torch.zeros(n)).truncation is None
    from dataclasses import replace

    b = replace(b, sampler_logprobs=torch.full((n,), -1.0))
    assert b.rescored(torch.full((n,), -0.5)).sampler_logprobs.tolist() == [-1.5] * n
