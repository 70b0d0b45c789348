"""Each alarm speaks in a run that is sick in its way, none in runs that learned."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from grpo_lightning.callbacks import Health
from grpo_lightning.callbacks.alarms import ALARMS, repetition
from grpo_lightning.errors import ConfigError, GRPOError
from grpo_lightning.types import PromptBatch

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
TEXT = "She counts the apples in the basket, adds three from the table, and writes the sum down."


def well(i, steps=120):
    """What step i of a run logs that learns: reward rises, entropy falls, lengths and norms move about."""
    wave = (i * 7919 % 13) / 13 - 0.5
    return {
        "reward": 0.2 + 0.6 * i / steps + 0.05 * wave,
        "reward_std": 0.3,
        "frac_reward_zero_std": 0.3,
        "rewards/unscorable_frac": 0.0,
        "completions/clipped_ratio": 0.1,
        "completions/mean_length": 80.0 + 30 * wave,
        "entropy": 1.2 - 0.9 * i / steps,
        "kl": 0.2 * i / steps,
        "ratio/first_pass_max_error": 0.05,
        "sampling/dropped_token_frac": 0.02,
        "grad_norm": 0.5 + wave / 2,
        "rollout/loss_tokens": 900.0,
        "advantage": [0.5, -0.5],
        "completion": [TEXT, TEXT],
    }


FLAT = {"reward": 0.2, "reward_std": 0.1}
SICK = {
    "no_signal": lambda i: {"reward": 0.0, "advantage": [0.0, 0.0], "frac_reward_zero_std": 1.0},
    "truncated": lambda i: {**FLAT, "completions/clipped_ratio": 1.0},
    "entropy_collapse": lambda i: {**FLAT, "entropy": 1.2 if i < 12 else 0.02},
    "kl_blow_up": lambda i: {"kl": 0.1 * 1.2**i},
    "first_ratio": lambda i: {"ratio/first_pass_max_error": 0.9},
    "dropped_tokens": lambda i: {"sampling/dropped_token_frac": 0.7},
    "dropped_prompts": lambda i: {},
    "length_drift": lambda i: {**FLAT, "completions/mean_length": 80.0 * 1.06**i},
    "repetition": lambda i: {"completion": ["and so on " * 20, TEXT, "no no no " * 20]},
    "gradient_spikes": lambda i: {"grad_norm": 30.0 if i in (30, 35, 40) else 0.5},
    "flat_reward": lambda i: {"reward": 0.2 + 0.05 * ((i * 7919 % 13) / 13), "reward_std": 0.2},
}
"""by alarm: what a sick run logs otherwise than a healthy one, at step i"""


def play(health, sick=lambda i: {}, steps=120, first=0, num_dropped=0):
    """Runs a callback over synthetic steps, as a Trainer would; returns what it said."""
    prompts = type("Prompts", (), {"num_dropped": num_dropped, "__len__": lambda self: 10})()
    trainer = SimpleNamespace(
        global_step=first, train_dataloader=SimpleNamespace(prompts=prompts), callback_metrics={}
    )
    module = SimpleNamespace(step_metrics={})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        health.on_train_start(trainer, module)
        for i in range(first, first + steps):
            row = well(i) | sick(i)
            batch = PromptBatch.join([])
            batch.micro_batch, batch.micro_batches = 0, 1
            batch.samples = {k: row.pop(k) for k in ("advantage", "completion")}
            trainer.global_step, module.step_metrics = i + 1, {"rollout/loss_tokens": 900.0}
            trainer.callback_metrics = {"grad_norm": torch.tensor(row.pop("grad_norm"))}
            health.note(i + 1, row)
            health.on_train_batch_end(trainer, module, None, batch, i)
    return [str(w.message) for w in said]


def names(said):
    return {line.split()[1] for line in said}


@pytest.mark.parametrize("name", ALARMS)
def test_each_alarm_speaks_once_in_one_line(name):
    said = play(Health(), SICK[name], num_dropped=5 * (name == "dropped_prompts"))
    own = [line for line in said if line.startswith(f"health: {name} at step ")]
    assert len(own) == 1
    assert ALARMS[name].remedy in own[0]
    assert "\n" not in own[0]
    assert "nan" not in own[0]
    # a run without a reward that rises may be flat too; nothing else is wrong with it
    assert names(said) <= {name, "flat_reward"}


def test_a_run_that_learns_is_left_alone():
    assert play(Health()) == []


@pytest.mark.parametrize("name", ALARMS)
def test_a_level_of_stop_ends_the_run_and_off_is_silent(name):
    dropped = 5 * (name == "dropped_prompts")
    with pytest.raises(GRPOError, match=rf"health: {name} .*health\.levels\.{name} is stop"):
        play(Health(levels={name: "stop"}), SICK[name], num_dropped=dropped)
    assert name not in names(play(Health(levels={name: "off"}), SICK[name], num_dropped=dropped))


def test_it_speaks_again_only_after_it_had_cleared():
    sick, health = SICK["no_signal"], Health(levels={"flat_reward": "off", "length_drift": "off"})
    said = play(health, lambda i: sick(i) if i < 20 or i > 60 else {})
    assert [line.split()[4] for line in said if "no_signal" in line] == ["5:", "66:"]


@pytest.mark.parametrize(
    ("logged", "why"),
    [
        ({"rewards/unscorable_frac": 1.0}, "every reward function returned None"),
        ({"completions/clipped_ratio": 1.0}, "every completion is cut at max_tokens"),
        ({}, "rewards are equal within every group, 0 on average"),
    ],
)
def test_no_signal_says_why(logged, why):
    said = play(Health(), lambda i: SICK["no_signal"](i) | logged, steps=6)
    assert why in next(line for line in said if "no_signal" in line)


def test_a_run_that_has_learned_has_tiny_norms_and_a_few_usual_ones():
    """As a tiny model did: 10 times the median was 3 of 50 norms, and no spike."""
    assert play(Health(), lambda i: {"grad_norm": 0.5 if i < 40 or i % 9 == 0 else 0.002}) == []


def test_limits_can_be_set():
    health = Health(limits={"no_signal": 30})
    assert "at step 30:" in next(s for s in play(health, SICK["no_signal"], steps=60) if "no_signal" in s)


def test_a_resume_goes_on_counting():
    whole, first, second = Health(), Health(), Health()
    said = play(whole, SICK["no_signal"], steps=8)
    assert play(first, SICK["no_signal"], steps=3) == []
    state = first.state_dict()
    assert json.loads(json.dumps(state)) == state
    second.load_state_dict(state)
    assert play(second, SICK["no_signal"], steps=5, first=3) == said
    third = Health()
    third.load_state_dict(second.state_dict())
    assert play(third, SICK["no_signal"], steps=5, first=8) == []


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"levels": {"no_signl": "stop"}}, r"health\.levels: 'no_signl' \(did you mean 'no_signal'"),
        ({"levels": {"no_signal": "error"}}, r"health\.levels\.no_signal is 'error'"),
        ({"limits": {"kl": 1.0}}, r"health\.limits: 'kl'"),
        ({"limits": {"kl_blow_up": "high"}}, r"health\.limits\.kl_blow_up is 'high'; it must be a number"),
    ],
)
def test_options_that_cannot_work(options, match):
    with pytest.raises(ConfigError, match=match):
        Health(**options)


def test_repetition_of_text():
    total, count = repetition(["short", TEXT, "la " * 100])
    assert count == 2
    assert 0.9 < total < 1.0
    assert repetition([]) == (0, 0)


def committed():
    """Yields (name, rows) of the runs under benchmarks/results that learned."""
    for path in sorted(RESULTS.glob("learning*.json")):
        found = json.loads(path.read_text())
        for name, side in {**found.get("sides", {}), "whole": found.get("whole", {})}.items():
            if side.get("reward"):
                yield f"{path.stem}: {name}", [{"reward": r} for r in side["reward"]]
    for path in sorted(RESULTS.glob("health-*.json")):
        for name, columns in json.loads(path.read_text())["runs"].items():
            rows = zip(*columns.values(), strict=True)
            yield name, [{k: v for k, v in zip(columns, row, strict=True) if v is not None} for row in rows]


def test_no_alarm_in_committed_runs():
    """17 of SmolLM2 on an H200 by reward; the quickstart by all that is watched."""
    runs = dict(committed())
    assert len(runs) >= 20
    for name, rows in runs.items():
        health = Health(levels=dict.fromkeys(ALARMS, "stop"))
        for i, row in enumerate(rows):
            health.history.add(row)
            try:
                health._speak(i)
            except GRPOError as error:
                pytest.fail(f"{name}: {error}")


def test_the_page_has_the_table():
    page = (Path(__file__).parents[2] / "docs" / "health.md").read_text()
    for name, a in ALARMS.items():
        assert f"| `{name}` | {a.measures} | {a.limit:g} | {a.means} | {a.remedy} |" in page
