from dataclasses import replace

import pytest
import torch
from models import random_rollout

from grpo_lightning.errors import ConfigError
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.types import Completion, SamplingParams


def pack(prompts, completions, groups, **changes):
    return RolloutBatch.pack(
        prompt_ids=prompts,
        completions=[Completion(token_ids=c) for c in completions],
        group_ids=groups,
        advantages=torch.zeros(len(groups)),
        max_tokens=4,
        **changes,
    )


def test_pack_lays_a_prompt_once_and_drops_last_tokens():
    b = pack([[1, 2, 3], [4, 5]], [[10, 11, 9], [12, 9], [9], []], [0, 0, 1, 1])
    assert b.input_ids.tolist() == [1, 2, 3, 10, 11, 12, 4, 5]
    assert b.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 0, 1]
    assert b.segment_ids.tolist() == [0, 0, 0, 1, 1, 2, 0, 0]
    assert b.target_rows.tolist() == [2, 3, 4, 2, 5, 7]
    assert b.target_ids.tolist() == [10, 11, 9, 12, 9, 9]
    assert b.sequence_ids.tolist() == [0, 0, 0, 1, 1, 2]
    assert b.group_tokens.tolist() == [5, 1]
    assert (b.normalizers.tokens, b.normalizers.sequences, b.normalizers.groups) == (6, 4, 2)
    assert b.num_tokens == len(b.input_ids)


def test_truncated_completions_keep_their_place_but_no_token():
    kinds = ("stop", "length")
    b = RolloutBatch.pack(
        prompt_ids=[[1]],
        completions=[Completion(token_ids=[5, 6], logprobs=[-1, -2], finish_reason=k) for k in kinds],
        group_ids=[0, 0],
        advantages=torch.zeros(2),
        max_tokens=2,
        mask_truncated=True,
    )
    assert b.lengths == (2, 0)
    assert b.normalizers.sequences == 2
    assert b.normalizers.tokens == 2
    assert b.sampler_logprobs is not None
    assert b.sampler_logprobs.tolist() == [-1, -2]


def test_unsorted_groups_are_refused():
    with pytest.raises(ValueError, match="sorted"):
        pack([[1], [2]], [[3], [4]], [1, 0])


@pytest.mark.parametrize("m", [1, 2, 3, 5, 12, 20])
@pytest.mark.parametrize("whole_groups", [False, True])
def test_split_keeps_every_token_once(m, whole_groups):
    b = random_rollout(prompts=4, group=3)
    b = replace(b, sampler_logprobs=torch.zeros(len(b.target_ids)))
    parts = b.split(m, whole_groups=whole_groups)
    assert len(parts) == m
    assert torch.cat([p.target_ids for p in parts]).tolist() == b.target_ids.tolist()
    assert torch.cat([p.advantages for p in parts]).tolist() == b.advantages.tolist()
    assert torch.cat([p.sampler_logprobs for p in parts]).numel() == b.target_ids.numel()
    assert all(p.normalizers == b.normalizers for p in parts)
    for p in parts:
        assert p.num_tokens == len(p.input_ids)
        # what predicts a token is the token before it, in the part as in the whole
        whole = {
            (s, t) for s, t in zip(p.input_ids[p.target_rows].tolist(), p.target_ids.tolist(), strict=True)
        }
        everything = zip(b.input_ids[b.target_rows].tolist(), b.target_ids.tolist(), strict=True)
        assert whole <= set(everything)


def test_split_balances_tokens():
    b = pack([[1] * 10] * 4, [[5] * 20 for _ in range(16)], [g for g in range(4) for _ in range(4)])
    loads = [p.num_tokens for p in b.split(4)]
    assert max(loads) == min(loads) == 10 + 4 * 19


def test_a_split_group_takes_its_prompt_along():
    b = pack([[1, 2]], [[5, 6], [7, 8]], [0, 0])
    assert [p.input_ids.tolist() for p in b.split(2)] == [[1, 2, 5], [1, 2, 7]]


def test_windows_have_whole_groups_and_their_own_counts():
    b = random_rollout(prompts=5, group=3)
    windows = b.optimizer_steps(2)
    assert sum(w.normalizers.tokens for w in windows) == b.normalizers.tokens
    assert sum(w.normalizers.sequences for w in windows) == b.normalizers.sequences
    for w in windows:
        counts = torch.bincount(w.group_ids)
        assert counts.tolist() == [3] * len(counts)
        assert int(w.group_tokens.sum()) == w.normalizers.tokens


def test_dead_groups_leave_but_still_count():
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.0])
    b = RolloutBatch.pack(
        prompt_ids=[[1], [2]],
        completions=[Completion(token_ids=[3, 4])] * 4,
        group_ids=[0, 0, 1, 1],
        advantages=advantages,
        max_tokens=2,
    )
    alive = b.without_groups(b.zero_variance_groups())
    assert alive.lengths == (2, 2)
    assert alive.normalizers == b.normalizers


def test_unshared_copies_prompts_and_keeps_tokens():
    b = random_rollout(prompts=3, group=4, seed=1)
    alone = b.unshared()
    assert torch.equal(alone.target_ids, b.target_ids)
    assert torch.equal(alone.sequence_ids, b.sequence_ids)
    assert alone.num_tokens == len(alone.input_ids) == len(alone.position_ids)
    assert alone.num_tokens == pytest.approx(b.sharing * b.num_tokens)
    assert b.sharing > 1.2
    before = b.input_ids[b.target_rows]
    assert torch.equal(alone.input_ids[alone.target_rows], before)
    assert torch.equal(alone.position_ids[alone.target_rows], b.position_ids[b.target_rows])


def test_totals_add_over_ranks():
    b = random_rollout()
    both = b.all_reduce_normalizers(lambda x: x * 2, micro_batches=6)
    assert both.normalizers.tokens == 2 * b.normalizers.tokens
    assert both.normalizers.micro_batches == 6


def test_to_moves_every_tensor():
    b = random_rollout()
    moved = b.to("meta")
    tensors = [getattr(moved, n) for n in moved.__slots__ if isinstance(getattr(moved, n), torch.Tensor)]
    assert len(tensors) == 10
    assert all(t.device.type == "meta" for t in tensors)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1),
        ("top_p", 0),
        ("top_k", -1),
        ("min_p", 2),
        ("max_tokens", 0),
        ("repetition_penalty", 0),
    ],
)
def test_sampling_bounds_name_the_key(key, value):
    with pytest.raises(ConfigError, match=rf"sampling\.{key} is {value}"):
        SamplingParams(**{key: value})
