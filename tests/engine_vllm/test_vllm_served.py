"""One engine of the real vLLM on a CPU: what it says of prompts, how groups end, and pushes gone wrong."""

import pytest
from models import hf_engine
from serving import ask, distance, make_policy, start

from grpo_lightning.engines import Request
from grpo_lightning.engines.weight_sync import PolicyWeights
from grpo_lightning.errors import EngineError
from grpo_lightning.types import SamplingParams

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def served(folder):
    """A policy and an engine that serves it; tests leave both as they are.

    Once another engine of the process has been closed it no longer decodes: no test here has its own.
    """
    policy = make_policy(folder)
    engine = start(policy, folder, sync="adapter")
    engine.sync(PolicyWeights(policy), 0)
    yield policy, engine
    engine.close()


def test_hf_and_vllm_agree(served):
    policy, engine = served
    hf = hf_engine(policy)
    sampling = SamplingParams(max_tokens=10, temperature=0.0)
    theirs, ours = engine.generate(ask(1), sampling), hf.generate(ask(1), sampling)
    for a, b in zip(theirs, ours, strict=True):
        assert a[0].token_ids == b[0].token_ids
        assert a[0].finish_reason == b[0].finish_reason
        assert a[0].logprobs == pytest.approx(b[0].logprobs, abs=1e-4)


def test_a_rollout_is_a_function_of_weights_and_seeds(served):
    _, engine = served
    sampling = SamplingParams(max_tokens=10)

    def ids(requests):
        return [[c.token_ids for c in group] for group in engine.generate(requests, sampling)]

    first = ids(ask())
    assert ids(ask()) == first
    assert ids(ask()[::-1])[::-1] == first
    assert ids(ask(rollout=1)) != first
    many = ids(ask(group=8))
    assert all(len({tuple(c) for c in group}) > 4 for group in many)


def test_completions_end_at_an_end_token_or_the_limit(served):
    policy, engine = served
    out = engine.generate(ask(16), SamplingParams(max_tokens=12))
    flat = [c for group in out for c in group]
    assert {c.finish_reason for c in flat} == {"stop", "length"}
    ends = set(policy.eos_ids)
    for c in flat:
        assert len(c.token_ids) == len(c.logprobs) <= 12
        assert (c.token_ids[-1] in ends) == (c.finish_reason == "stop")
        assert not ends & set(c.token_ids[:-1])
        assert c.finish_reason == "stop" or len(c.token_ids) == 12


@pytest.mark.parametrize("options", [{"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.1}])
def test_truncated_sampling_is_rescored_to_the_whole_vocabulary(served, options):
    policy, engine = served
    sampling = SamplingParams(max_tokens=10, **options)
    gap, _ = distance(policy, ask(8), engine.generate(ask(8), sampling), sampling)
    assert gap.mean() < 1e-4


BAD = {
    "no tokens": ([], "prompt 3 of rollout 7 has no tokens"),
    "too long": ([5] * 60, "prompt 3 of rollout 7 has 60 tokens"),
    "outside of the vocabulary": ([5, 131], "prompt 3 of rollout 7 has token ids outside"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_prompt_that_cannot_run_is_named(served, case):
    _, engine = served
    ids, message = BAD[case]
    with pytest.raises(EngineError, match=message):
        engine.generate(
            [Request(prompt_ids=ids, seeds=[1], uid=3, rollout_index=7)], SamplingParams(max_tokens=8)
        )
    engine.generate(ask(), SamplingParams(max_tokens=2))  # and nothing of it is left behind


def test_a_dead_engine_is_an_engine_error(served, monkeypatch):
    _, engine = served

    def die(*args, **kwargs):
        raise RuntimeError("EngineCore encountered an issue")

    monkeypatch.setattr(engine._llm.llm_engine, "step", die)
    with pytest.raises(EngineError, match=r"could not generate: RuntimeError: EngineCore.*--ckpt_path last"):
        engine.generate(ask(), SamplingParams(max_tokens=2))
    monkeypatch.undo()


def test_groups_come_as_they_end_and_others_may_join(served):
    policy, engine = served
    sampling = SamplingParams(max_tokens=20)
    first, later = ask(4), ask(4, rollout=1)
    session = engine.session(sampling)
    session.add(first)
    ended, joined = [], False
    while session.busy:
        ended += session.step()
        if not joined:
            session.add(later)
            joined = True
    assert {id(r) for r, _ in ended} == {id(r) for r in (*first, *later)}
    alone = {id(r): group for r, group in zip(first, engine.generate(first, sampling), strict=True)}
    for request, completions in ended:
        if id(request) in alone:
            assert [c.token_ids for c in completions] == [c.token_ids for c in alone[id(request)]]
    session = engine.session(sampling)
    session.add(first)
    session.abort()
    assert not session.busy
    engine.sync(PolicyWeights(policy), 0)  # needs an engine in which nothing runs
