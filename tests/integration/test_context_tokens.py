"""Completions with tokens in the middle that were not sampled, as a tool's answer: context, no loss."""

from dataclasses import replace
from math import inf, nan

import pytest
import torch
from models import tiny_llama
from peft import LoraConfig, get_peft_model
from tiny import tiny_tokenizer

from grpo_lightning.callbacks.rollout_state import batch_state, restore, restore_batch
from grpo_lightning.engines.base import Request
from grpo_lightning.engines.process_guard import random_state
from grpo_lightning.engines.replay import ReplayEngine, record
from grpo_lightning.errors import ConfigError
from grpo_lightning.kernels.config import KernelConfig
from grpo_lightning.losses import LossConfig, policy_loss
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.policy.forward import padded_hidden
from grpo_lightning.policy.policy import Policy
from grpo_lightning.rollout.checks import bad_logprobs
from grpo_lightning.types import Completion, SamplingParams

PROMPT = [5, 6, 7]
TURNS = Completion(
    token_ids=[11, 12, 30, 31, 32, 13, 14, 33],
    logprobs=[-1.0, -2.0, 0.0, 0.0, 0.0, -3.0, -4.0, 0.0],
    loss_mask=[True, True, False, False, False, True, True, False],
)
PLAIN = Completion(token_ids=[15, 16, 9], logprobs=[-1.5, -2.5, -3.5])


def pack(completions, prompts=(PROMPT,), groups=None, advantages=None, **changes):
    groups = [0] * len(completions) if groups is None else groups
    advantages = torch.arange(1.0, len(groups) + 1) if advantages is None else advantages
    return RolloutBatch.pack(
        prompt_ids=prompts,
        completions=completions,
        group_ids=groups,
        advantages=advantages,
        max_tokens=8,
        **changes,
    )


def policy_of(shared="auto"):
    torch.manual_seed(0)
    wrapped = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear"))
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    policy = Policy(wrapped, tiny_tokenizer())
    policy.prepare(KernelConfig(shared_prompts=shared), torch.device("cpu"))
    return policy


def gradient(policy, batch, padded):
    policy.zero_grad()
    if padded:
        policy._set_attention("sdpa")
        hidden = padded_hidden(policy.decoder, batch, policy.pad_id)
    else:
        hidden = policy.completion_hidden(batch)
    scores = policy.scores(hidden, batch, entropy_grad=False)
    (scores.logprobs * batch.advantages).sum().backward()
    return scores.logprobs.detach(), {n: p.grad.clone() for n, p in policy.trainable().items()}


def test_rows_and_targets():
    """What follows the last loss token does not go through the model."""
    b = pack([TURNS, PLAIN])
    assert b.input_ids.tolist() == [5, 6, 7, 11, 12, 30, 31, 32, 13, 15, 16]
    assert b.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 3, 4]
    assert b.target_ids.tolist() == [11, 12, 13, 14, 15, 16, 9]
    assert b.target_rows.tolist() == [2, 3, 7, 8, 2, 9, 10]
    assert b.sequence_ids.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert b.lengths == (4, 3)
    assert b.sampler_logprobs.tolist() == [-1, -2, -3, -4, -1.5, -2.5, -3.5]
    assert b.advantages.tolist() == [1, 1, 1, 1, 2, 2, 2]
    assert (b.normalizers.tokens, b.group_tokens.tolist()) == (7, [7])


@pytest.mark.parametrize(("shared", "padded"), [("on", False), ("off", False), ("auto", True)])
def test_the_gradient_is_that_of_the_same_tokens_trained_alone(shared, padded):
    """Each turn alone, after all that came before it as its prompt."""
    policy = policy_of(shared)
    turns = pack([TURNS, PLAIN])
    first, second = Completion(token_ids=[11, 12]), Completion(token_ids=[13, 14])
    alone = pack(
        [first, PLAIN, second],
        prompts=[PROMPT, [*PROMPT, *TURNS.token_ids[:5]]],
        groups=[0, 0, 1],
        advantages=torch.tensor([1.0, 2.0, 1.0]),
    )
    found, gradients = gradient(policy, turns, padded)
    want, expected = gradient(policy, alone, padded)
    order = [0, 1, 5, 6, 2, 3, 4]  # of the tokens of `alone`
    torch.testing.assert_close(found, want[order], atol=1e-5, rtol=0)
    for name, g in gradients.items():
        torch.testing.assert_close(g, expected[name], atol=1e-5, rtol=1e-4)
    assert any(g.norm() > 1e-3 for g in gradients.values())


def test_micro_batches_and_checkpoints_keep_the_mask():
    b = pack([TURNS, PLAIN], policy_versions=[3, 4])
    for part, whole in zip(b.split(2), ([TURNS], [PLAIN]), strict=True):
        alone = pack(whole, advantages=part.advantages[:1])
        for name in ("input_ids", "position_ids", "segment_ids", "target_rows", "target_ids"):
            assert getattr(part, name).tolist() == getattr(alone, name).tolist(), name
    assert [p.policy_versions for p in b.split(2)] == [(3,), (4,)]
    assert b.newest_version == 4
    again = restore_batch(batch_state(b))
    assert again.sequence_layout == b.sequence_layout
    assert again.take([0]).target_rows.tolist() == b.take([0]).target_rows.tolist() == [2, 3, 7, 8]


def test_the_rest_of_a_rollout_that_was_packed_otherwise_is_refused():
    """Weights and optimizer of such a checkpoint are as good as any; its half-used rollout is not read."""
    old = {k: v for k, v in batch_state(pack([TURNS, PLAIN])).items() if k != "sequence_layout"}
    with pytest.raises(ConfigError, match=r"middle of a rollout by an older .* of the end of a rollout"):
        restore({"random": [random_state()], "parts": [[old]]}, rank=0, world_size=1)


def test_a_recording_keeps_the_mask(tmp_path):
    request = Request(prompt_ids=PROMPT, uid=0, rollout_index=0, seeds=[1, 2])
    record(tmp_path, 0, [request], [[TURNS, PLAIN]])
    engine = ReplayEngine(str(tmp_path))
    assert engine.generate([request], SamplingParams()) == [[TURNS, PLAIN]]


def test_a_completion_of_context_alone_has_no_loss_token():
    b = pack([Completion(token_ids=[4, 5], loss_mask=[False, False]), PLAIN])
    assert b.lengths == (0, 3)
    assert b.input_ids.tolist() == [*PROMPT, 15, 16]


def test_log_probabilities_of_context_tokens_are_not_looked_at():
    """Those of loss tokens have to be finite, and there has to be one for each token."""
    unknown = replace(TURNS, logprobs=[-1.0, -2.0, nan, nan, nan, -3.0, -4.0, -inf])
    request = Request(prompt_ids=PROMPT, uid=4, rollout_index=0, seeds=[1])
    assert bad_logprobs(ReplayEngine, [request], [[unknown]]) is None
    assert pack([unknown]).sampler_logprobs.tolist() == [-1, -2, -3, -4]
    ruined = replace(TURNS, logprobs=[nan, *TURNS.logprobs[1:]])
    assert "nan as the log-probability of token 0" in str(bad_logprobs(ReplayEngine, [request], [[ruined]]))
    short = replace(PLAIN, logprobs=[-1.0])
    said = str(bad_logprobs(ReplayEngine, [request], [[short]]))
    assert "reports 1 log-probabilities of the 3 tokens of completion 0 of prompt 4" in said


@pytest.mark.parametrize(
    ("completion", "advantages", "said"),
    [
        (Completion(token_ids=[4, 5], loss_mask=[True]), torch.ones(1), "2 tokens and a loss_mask of 1"),
        (Completion(token_ids=[4, 5]), [torch.ones(3)], r"2 tokens has advantages of shape \(3,\)"),
    ],
)
def test_masks_and_advantages_of_another_length_are_refused(completion, advantages, said):
    with pytest.raises(ValueError, match=said):
        pack([completion], advantages=advantages)


def test_advantages_of_tokens():
    """One for each token of the completion; those of context tokens count for nothing."""
    own = [torch.tensor([1.0, 2.0, 9.0, 9.0, 9.0, 3.0, 4.0, 9.0]), torch.tensor([-1.0, 0.0, 1.0])]
    b = replace(pack([TURNS, PLAIN], advantages=own), sampler_logprobs=None)
    assert b.advantages.tolist() == [1, 2, 3, 4, -1, 0, 1]
    logprobs = torch.full((7,), -1.0, requires_grad=True)
    policy_loss(logprobs, b, LossConfig("dapo")).loss.backward()
    torch.testing.assert_close(logprobs.grad, -b.advantages / 7)
