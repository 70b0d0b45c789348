from dataclasses import replace

import pytest
import torch

from grpo_lightning.advantages import ADVANTAGES, RewardTable, compute_advantages
from grpo_lightning.errors import ConfigError

NAN = float("nan")
R = [1, 0, 0, 0, 1, 1, 1, 1, 2, 0, 1, NAN]
GROUPS = torch.tensor([0] * 4 + [1] * 4 + [2] * 4)


def table(rewards=R, groups=GROUPS, weights=(1.0,), **changes):
    x = torch.tensor(rewards, dtype=torch.float64)
    by_function = x[:, None] if x.ndim == 1 else x
    return RewardTable(
        by_function=by_function,
        weights=torch.tensor(weights, dtype=torch.float64),
        group_ids=groups,
        num_groups=int(groups.max()) + 1,
        lengths=torch.tensor(([3, 2, 4, 1, 2, 2, 2, 2, 5, 1, 3, 2] * 2)[: len(groups)]),
        **changes,
    )


GOLDEN = {  # losses.md G8
    "group_norm": [1.49970006, *[-0.49990002] * 3, *[0] * 4, 0.99990001, -0.99990001, 0, 0],
    "batch_norm": [1.15960889, *[-0.38653630] * 3, *[0] * 4, 1.54614519, -1.54614519, 0, 0],
    "group_mean": [0.75, *[-0.25] * 3, *[0] * 4, 1, -1, 0, 0],
    "leave_one_out": [1, *[-1 / 3] * 3, *[0] * 4, 1.5, -1.5, 0, 0],
    "maxrl": [3, *[-1] * 3, *[0] * 4, 1, -1, 0, 0],
    "pass_at_k": [1.99960008, *[0] * 3, *[0] * 4, 0.99990001, 0, 0, 0],
    "opo": [0.7, *[-0.3] * 3, *[0] * 4, 0.55555556, -1.44444444, -0.44444444, 0],
    "gpg": [1.17857143, *[-0.39285714] * 3, *[0] * 4, 1.57142857, -1.57142857, 0, 0],
    "reinforce_pp": [
        1.09527317,
        *[-0.78233798] * 3,
        *[-0.31293519] * 4,
        1.56467595,
        -2.19054633,
        -0.31293519,
        0,
    ],
}
STILL = [name for name, row in ADVANTAGES.items() if row.zero_variance_is_zero]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    got = ADVANTAGES[name].compute(table()).nan_to_num()
    want = torch.tensor(GOLDEN[name], dtype=torch.float64)
    torch.testing.assert_close(got, want, atol=1e-8, rtol=0)
    torch.testing.assert_close(compute_advantages(name, table()), want.float(), atol=1e-7, rtol=1e-6)


def test_golden_gdpo():
    rewards = [[1, 0], [0, 1], [0, 0], [1, 2], [1, 2], [0, 2]]
    t = table(rewards, torch.tensor([0, 0, 0, 1, 1, 1]), weights=(1.0, 0.5))
    want = [1.03497461, 0, -1.03497461, 0.68998308, 0.68998308, -1.37996615]
    got = ADVANTAGES["gdpo"].compute(t)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-8, rtol=0)


def test_gdpo_of_constant_rewards_is_exactly_zero():
    t = table(
        [[1, 3], [1, 3], [1, 3], [0, 1], [1, 1], [0, 1]], torch.tensor([0, 0, 0, 1, 1, 1]), weights=(1.0, 1.0)
    )
    got = compute_advantages("gdpo", t)
    assert got[:3].tolist() == [0.0] * 3
    assert got[3:].abs().min() > 0


def test_pass_at_k_gives_nothing_for_a_tie():
    assert compute_advantages("pass_at_k", table([1, 1, 0, 0] * 3)).tolist() == [0.0] * 12


def test_opo_without_tokens_falls_back_to_the_mean():
    t = table(lengths_of_nothing := [1, 0, 0, 0] * 3)
    t = replace(t, lengths=torch.zeros(12, dtype=torch.int64))
    got = compute_advantages("opo", t)
    torch.testing.assert_close(got, compute_advantages("group_mean", table(lengths_of_nothing)))
    assert compute_advantages("reinforce_pp", t).tolist() == [0.0] * 12


@pytest.mark.parametrize("name", STILL)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6])
def test_equal_rewards_give_exactly_zero(name, value):
    got = compute_advantages(name, table([value] * 12))
    assert got.tolist() == [0.0] * 12


@pytest.mark.parametrize("name", ADVANTAGES)
def test_nothing_scorable_is_finite_and_zero(name):
    assert compute_advantages(name, table([NAN] * 12)).tolist() == [0.0] * 12


@pytest.mark.parametrize("name", STILL)
def test_one_scorable_member_is_zero(name):
    assert compute_advantages(name, table([5.0, NAN, NAN, NAN] * 3)).tolist() == [0.0] * 12


@pytest.mark.parametrize("name", [n for n in ADVANTAGES if n != "maxrl"])
def test_shift_of_the_rewards_changes_nothing(name):
    a = compute_advantages(name, table())
    b = compute_advantages(name, table([x + 10 for x in R]))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_weights_and_functions_that_do_not_apply():
    rewards = [[1.0, NAN], [0.0, 2.0], [NAN, NAN], [1.0, 1.0]]
    t = table(rewards, torch.zeros(4, dtype=torch.int64), weights=(1.0, 0.5))
    assert t.total[:2].tolist() == [1.0, 1.0]
    assert t.total[2].isnan()
    assert t.total[3] == 1.5
    got = compute_advantages("group_mean", t)
    torch.testing.assert_close(got, torch.tensor([-1 / 6, -1 / 6, 0, 1 / 3]))


def test_batch_norm_adds_its_moments_over_ranks():
    first, second = table(R[:4], GROUPS[:4]), table(R[8:], GROUPS[:4])
    both = table(R[:4] + R[8:], torch.tensor([0] * 4 + [1] * 4))
    seen = []

    def as_if_two_ranks(x, other):
        seen.append(x)
        return x + other[len(seen) - 1]

    calls = []
    second_alone = table(R[8:], GROUPS[:4], all_sum=lambda x: calls.append(x) or x)
    ADVANTAGES["batch_norm"].compute(second_alone)
    total = [calls[0]]
    mean = (calls[0][0] + first.total.nansum()) / (calls[0][1] + 4)
    total.append(((second.total[~second.total.isnan()] - mean) ** 2).sum().reshape(1))
    rank0 = table(R[:4], GROUPS[:4], all_sum=lambda x: as_if_two_ranks(x, total))
    want = ADVANTAGES["batch_norm"].compute(both)[:4]
    torch.testing.assert_close(ADVANTAGES["batch_norm"].compute(rank0), want)


def test_clip_is_last():
    got = compute_advantages("group_norm", table(), clip=(-0.4, 1.0))
    assert got.max() == 1.0
    assert got.min() == pytest.approx(-0.4)


def test_unknown_name_suggests():
    with pytest.raises(ConfigError, match="did you mean 'group_norm'"):
        compute_advantages("group_nrm", table())
