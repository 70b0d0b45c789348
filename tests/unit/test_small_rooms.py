"""Metrics, statistics, schedules and tables."""

from types import SimpleNamespace

import pytest
import torch

from grpo_lightning.errors import ConfigError, choices
from grpo_lightning.metrics.logging import (
    gradient_norm,
    length_stats,
    log_numbers,
    on_host,
    over_ranks,
    reward_stats,
)
from grpo_lightning.metrics.reduce import combine, mean, mean_of, reduced, std_stat, values
from grpo_lightning.schedulers import WarmupCosine
from grpo_lightning.types import Completion


def test_stats_add_up_before_they_divide():
    parts = [
        {"m": mean_of([1.0]), "s": reduced("sum", 2.0), "lo": reduced("min", 3.0), "hi": reduced("max", 3.0)},
        {
            "m": mean_of([3.0, 5.0]),
            "s": reduced("sum", 4.0),
            "lo": reduced("min", 1.0),
            "hi": reduced("max", 9.0),
        },
    ]
    assert values(combine(parts)) == {"m": 3.0, "s": 6.0, "lo": 1.0, "hi": 9.0}


def test_spread_of_parts_is_that_of_the_whole():
    x = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert values(combine([{"s": std_stat(x[:1])}, {"s": std_stat(x[1:])}]))["s"] == pytest.approx(
        x.std().item()
    )


def test_means_of_nothing_are_not_logged():
    assert values({"m": mean(0.0, 0), "s": std_stat(torch.zeros(1)), "n": reduced("max", float("nan"))}) == {}


def test_numbers_come_to_the_host_as_they_are():
    given = [torch.tensor(2**40 + 1), torch.tensor([0.5, 0.25]), torch.zeros(()).bfloat16(), torch.ones(0, 2)]
    found = on_host(given)
    assert all(x.dtype == torch.float64 and x.is_cpu for x in found)
    for x, y in zip(found, given, strict=True):
        assert torch.equal(x, y.double())
    assert on_host([]) == []


def test_what_is_logged_stays_on_the_host():
    seen = {}
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=0))
    module = SimpleNamespace(
        log=lambda name, value, **how: seen.update({name: (value, how)}),
        trainer=SimpleNamespace(_results={}, log_every_n_steps=1, fit_loop=loop),
        _current_fx_name="training_step",
    )
    log_numbers(module, {"a": 2**24 + 1.0, "b": 3.0}, shown=("b",))
    assert seen["a"][0].dtype == torch.float64
    assert seen["a"][0].item() == 2**24 + 1
    assert seen["a"][0].is_cpu
    assert [how["prog_bar"] for _, how in seen.values()] == [False, True]


def test_length_stats_have_trls_names():
    groups = [[Completion(token_ids=[1] * n, finish_reason=r) for n, r in ((2, "stop"), (4, "length"))]]
    assert over_ranks(length_stats(groups, prompt_tokens=10)) == {
        "completions/mean_length": 3.0,
        "completions/min_length": 2.0,
        "completions/max_length": 4.0,
        "completions/clipped_ratio": 0.5,
        "completions/mean_terminated_length": 2.0,
        "completions/min_terminated_length": 2.0,
        "completions/max_terminated_length": 2.0,
        "num_tokens": 16.0,
    }


def test_reward_stats_leave_out_what_does_not_apply():
    nan = float("nan")
    by_function = torch.tensor([[1.0, nan], [0.0, nan], [1.0, 2.0], [nan, nan]], dtype=torch.float64)
    total = torch.tensor([1.0, 0.0, 3.0, nan], dtype=torch.float64)
    got = over_ranks(reward_stats(["a", "b"], by_function, total, torch.tensor([0, 0, 1, 1]), 2))
    assert got["rewards/a/mean"] == pytest.approx(2 / 3)
    assert got["rewards/b/mean"] == 2.0
    assert got["reward"] == pytest.approx(4 / 3)
    assert got["reward_std"] == pytest.approx(0.5**0.5)  # the second group has one score: no spread
    assert got["frac_reward_zero_std"] == 0.5
    assert got["rewards/unscorable_frac"] == 0.25
    assert "rewards/b/std" not in got


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_norm_of_a_gradient_is_one_of_fp32(dtype):
    """Squares of 300 do not fit into fp16, and 4,097 summands of a square not into the 8 bits of bf16."""
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((64, 64), (1,), (3,))]
    for p, g in zip(params[:2], (300.0, 2.0), strict=True):
        p.grad = torch.full_like(p, g)
    found = gradient_norm(params)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert found.item() == pytest.approx((300**2 * 64**2 + 4) ** 0.5, rel=1e-6)
    assert gradient_norm(params[2:]) == 0


def test_warmup_cosine():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = WarmupCosine(optimizer, total_steps=10, warmup_steps=2, final_ratio=0.1)
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[10] == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="warmup_steps is 10"):
        WarmupCosine(optimizer, total_steps=10, warmup_steps=10)


def test_choices_suggests_the_nearest():
    assert choices("dapoo", ["dapo", "grpo"]) == "'dapoo' (did you mean 'dapo'? allowed: dapo, grpo)"
    assert "did you mean" not in choices("zzz", ["dapo", "grpo"])


def test_sample_table_shows_brackets_and_cuts_long_texts(capsys):
    from grpo_lightning.callbacks.sample_table import show

    samples = {
        "prompt": ["a" * 200, "b"],
        "completion": ["[bold]x[/bold]", "y\nz"],
        "reward": [0.123456, 1.0],
    }
    show("step 1", samples, rows=2, width=20)
    out = capsys.readouterr().out
    assert "[bold]" in out
    assert "0.123" in out
    assert "a" * 21 not in out
    show("step 1", {**samples, "prompt": ["same", "same"]}, rows=2, width=20, unique=True)
    assert capsys.readouterr().out.count("same") == 1


def test_sample_table_shows_best_and_worst_of_each_prompt_first(capsys):
    from grpo_lightning.callbacks.sample_table import show

    nan = float("nan")
    samples = {
        "prompt": ["p"] * 4 + ["q"] * 4,
        "completion": [f"<{i}>" for i in range(8)],
        "reward": [0.5, 0.1, 0.9, 0.5, nan, 2.0, 2.0, nan],
    }

    def shown(rows, **how):
        show("step 1", samples, rows=rows, width=20, **how)
        return [
            int(line.partition("<")[2][0]) for line in capsys.readouterr().out.splitlines() if "<" in line
        ]

    assert shown(4) == [2, 1, 5, 6]
    assert shown(3) == [2, 1, 5]
    assert shown(7) == [2, 1, 5, 6, 0, 3, 4]
    assert shown(4, unique=True) == [2, 5]
