import pytest
import torch
from models import hf_engine, tiny_llama
from tiny import tiny_tokenizer

from grpo_lightning.engines import EngineContext, HFEngine, ReplayEngine, Request, RolloutEngine, VLLMEngine
from grpo_lightning.engines.base import sample_seeds
from grpo_lightning.engines.hf_sampling import choose, uniforms
from grpo_lightning.engines.replay import record
from grpo_lightning.errors import ConfigError, EngineError
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.policy.policy import Policy
from grpo_lightning.types import SamplingParams


def requests(group=4, rollout=0):
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [20]]
    return [
        Request(prompt_ids=p, seeds=sample_seeds(0, rollout, i, group), uid=i, rollout_index=rollout)
        for i, p in enumerate(prompts)
    ]


def engine(policy=None, **options):
    return hf_engine(policy or Policy(tiny_llama(), tiny_tokenizer()), **options)


def ids(completions):
    return [[c.token_ids for c in group] for group in completions]


def test_engines_fulfil_the_protocol():
    assert isinstance(HFEngine(), RolloutEngine)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_logprobs_are_the_policys(temperature):
    policy = Policy(tiny_llama(), tiny_tokenizer())
    rs = requests()
    out = engine(policy).generate(rs, SamplingParams(max_tokens=12, temperature=temperature))
    flat = [c for group in out for c in group]
    b = RolloutBatch.pack(
        prompt_ids=[r.prompt_ids for r in rs],
        completions=flat,
        group_ids=[i for i in range(3) for _ in range(4)],
        advantages=torch.zeros(12),
        max_tokens=12,
        temperature=temperature,
    )
    with torch.no_grad():
        logp = policy.logprobs(b).logprobs
    assert len(logp) == sum(len(c.token_ids) for c in flat)
    torch.testing.assert_close(logp, b.sampler_logprobs, atol=1e-5, rtol=0)


def test_completions_end_at_an_end_token_or_the_limit():
    out = engine().generate(requests(group=16), SamplingParams(max_tokens=20))
    flat = [c for group in out for c in group]
    assert {c.finish_reason for c in flat} == {"stop", "length"}
    for c in flat:
        assert len(c.token_ids) == len(c.logprobs) <= 20
        assert (c.token_ids[-1] == 1) == (c.finish_reason == "stop")
        assert 1 not in c.token_ids[:-1]
        assert c.finish_reason == "stop" or len(c.token_ids) == 20


def test_a_rollout_is_a_function_of_weights_and_seeds():
    sampling = SamplingParams(max_tokens=10)
    policy = Policy(tiny_llama(), tiny_tokenizer())
    torch.manual_seed(1)
    a = engine(policy).generate(requests(), sampling)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    b = engine(policy).generate(requests(), sampling)
    assert ids(a) == ids(b)
    assert torch.equal(state, torch.get_rng_state())
    backwards = engine(policy).generate(requests()[::-1], sampling)
    assert ids(backwards)[::-1] == ids(a)
    assert ids(engine(policy, batch_size=3).generate(requests(), sampling)) == ids(a)
    assert ids(engine(policy).generate(requests(rollout=1), sampling)) != ids(a)


def test_samples_of_a_prompt_differ_and_seeds_are_distinct():
    out = engine().generate(requests(group=8), SamplingParams(max_tokens=10))
    assert all(len({tuple(c.token_ids) for c in group}) > 4 for group in out)
    seeds = [s for i in range(50) for s in sample_seeds(0, i % 5, i, 8)]
    assert len(set(seeds)) == len(seeds)


def test_greedy_is_the_most_likely_token_each_time():
    policy = Policy(tiny_llama(), tiny_tokenizer())
    (c,) = engine(policy).generate(requests()[:1], SamplingParams(max_tokens=6, temperature=0.0))[0][:1]
    tokens = [5, 6, 7]
    with policy.generating() as causal:
        for token, logprob in zip(c.token_ids, c.logprobs, strict=True):
            z = causal(input_ids=torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            assert int(z.argmax()) == token
            assert logprob == pytest.approx(z[token].item(), abs=1e-5)
            tokens.append(token)


def test_choose_follows_the_distribution():
    z = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    n = 20_000
    u = torch.tensor([uniforms([i * 7919], 3)[0] for i in range(n)], dtype=torch.float64)
    ids, logp = choose(z.expand(n, 4), SamplingParams(), u)
    shares = torch.bincount(ids, minlength=4) / n
    torch.testing.assert_close(shares, z.exp(), atol=0.015, rtol=0)
    torch.testing.assert_close(logp, z[ids])


@pytest.mark.parametrize(
    ("options", "kept"),
    [({"top_k": 2}, {2, 3}), ({"top_p": 0.65}, {2, 3}), ({"min_p": 0.6}, {2, 3}), ({"top_p": 0.3}, {3})],
)
def test_choose_keeps_only_the_kept_set_and_renormalises(options, kept):
    z = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    u = torch.linspace(0.001, 0.999, 200, dtype=torch.float64)
    ids, logp = choose(z.expand(200, 4), SamplingParams(**options), u)
    assert set(ids.tolist()) == kept
    total = sum(0.1 * (i + 1) for i in kept)
    torch.testing.assert_close(logp.exp(), (ids + 1) * 0.1 / total)


def test_repetition_penalty_lowers_what_was_seen():
    z = torch.tensor([[2.0, 2.0, -1.0]])
    seen = torch.tensor([[True, False, True]])
    ids, logp = choose(z, SamplingParams(temperature=0.0, repetition_penalty=2.0), torch.zeros(1), seen)
    assert ids.tolist() == [1]
    torch.testing.assert_close(logp, torch.tensor([[1.0, 2.0, -2.0]]).log_softmax(-1)[:, 1])
    policy = Policy(tiny_llama(), tiny_tokenizer())
    (c,) = engine(policy).generate(
        [Request(prompt_ids=[5, 6], seeds=[1])], SamplingParams(max_tokens=8, repetition_penalty=50.0)
    )[0]
    assert len(set(c.token_ids)) == len(c.token_ids)


def test_generate_before_sync_and_after_close_raises():
    e = HFEngine()
    with pytest.raises(EngineError, match="sync"):
        e.generate(requests(), SamplingParams())
    with pytest.raises(EngineError, match="sync"):
        engine(version=-1).generate(requests(), SamplingParams())
    e = engine(version=3)
    assert e.policy_version == 3
    e.close()
    assert e.policy_version == -1
    with pytest.raises(EngineError, match="sync"):
        e.generate(requests(), SamplingParams())


def test_what_hf_cannot_do_is_refused_at_start():
    policy = Policy(tiny_llama(), tiny_tokenizer())
    context = EngineContext(policy=policy, model_path="", max_model_len=8, sampling=SamplingParams(regex="a"))
    with pytest.raises(ConfigError, match="structured outputs"):
        HFEngine().start(context)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        HFEngine(batch_size=0)


def test_replay_gives_back_what_was_recorded(tmp_path):
    rs = requests()
    out = engine().generate(rs, SamplingParams(max_tokens=6))
    record(tmp_path, 0, rs, out)
    replay = ReplayEngine(str(tmp_path))
    replay.sync(None, 4)
    assert replay.policy_version == 4
    assert replay.generate(rs, SamplingParams()) == out
    with pytest.raises(EngineError, match="no sample 0 of prompt 0 in rollout 1"):
        replay.generate(requests(rollout=1), SamplingParams())
    other = Request(prompt_ids=[1], seeds=rs[0].seeds, uid=0, rollout_index=0)
    with pytest.raises(EngineError, match="another prompt"):
        replay.generate([other], SamplingParams())


def test_replay_of_nothing_names_the_folder(tmp_path):
    with pytest.raises(ConfigError, match="no rollout-"):
        ReplayEngine(str(tmp_path))


def test_vllm_engine_without_vllm_names_the_extra(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"grpo-lightning\[vllm\]"):
        VLLMEngine()
