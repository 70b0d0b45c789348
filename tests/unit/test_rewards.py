import asyncio
import functools
import math
import re
import sys
import warnings

import numpy as np
import pytest
import torch

from grpo_lightning.errors import ConfigError, RewardError
from grpo_lightning.rewards import Rewards, Scores, math_answer
from grpo_lightning.rewards.resolve import resolve
from grpo_lightning.utils.imports import import_object


def score(functions, completions=("one", "two"), weights=None, prompts=None, ids=None, state=None, **columns):
    n = len(completions)
    return Rewards(functions, weights).score(
        prompts=prompts or ["prompt"] * n,
        completions=list(completions),
        completion_ids=ids or [[1, 2]] * n,
        columns=columns,
        trainer_state=state,
    )


def constant(value):
    def reward(completions, **kwargs):
        return [value] * len(completions)

    return reward


# --- functions as people have written them for TRL and Unsloth; they run unchanged ---


def correctness_reward(completions, answer, **kwargs):
    return [
        1.0 if str(ans) in completion else 0.0 for completion, ans in zip(completions, answer, strict=True)
    ]


def boxed_reward(completions, **kwargs):
    return [0.5 if "\\boxed{" in c else 0.0 for c in completions]


def length_reward(completions, **kwargs):
    return [min(len(c) / 500, 1.0) for c in completions]


def length_without_kwargs(completions, prompts=None):
    return [1.0 if len(completion.split()) < 50 else 0.5 for completion in completions]


def judge_reward(completions, prompts):
    return [
        float(prompt[0] == completion[0]) for prompt, completion in zip(prompts, completions, strict=True)
    ]


def thinking_reward(completions, prompts=None, completion_ids=None, **kwargs):
    rewards = []
    for completion, ids in zip(completions, completion_ids, strict=True):
        if 151668 not in ids:
            rewards.append(-1.0)
        else:
            asked = "?" in completion.split("</think>")[0]
            rewards.append(0.3 if ids.index(151668) < 10 else 0.7 + (0.1 if asked else 0))
    return rewards


def conversational_reward(completions, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(r"^<think>.*?</think>", content) else 0.0 for content in contents]


def math_only(completions, task, **kwargs):
    return [1.0 if t == "math" else None for t in task]


async def async_judge(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    return [float(len(c)) for c in completions]


def test_correctness_by_substring():
    assert score(correctness_reward, ["it is 4", "5"], answer=[4, 4]).totals == [1.0, 0.0]


def test_several_functions_with_weights():
    scores = score(
        [boxed_reward, length_reward, correctness_reward],
        ["\\boxed{4}" + "x" * 491, "5"],
        weights=[1.0, 0.5, 2],
        answer=["4", "4"],
    )
    assert scores.names == ["boxed_reward", "length_reward", "correctness_reward"]
    assert scores.values == [[0.5, 1.0, 1.0], [0.0, 0.002, 0.0]]
    assert scores.weights == [1.0, 0.5, 2.0]
    assert scores.totals == pytest.approx([3.0, 0.001])
    assert isinstance(scores, Scores)


def test_functions_without_kwargs_get_only_what_they_name():
    scores = score([length_without_kwargs, judge_reward], ["park", "two"], answer=["x", "y"])
    assert scores.values == [[1.0, 1.0], [1.0, 0.0]]


def test_thinking_tokens_by_completion_ids():
    ids = [[0] * 20 + [151668], [151668], [0]]
    completions = ["why? </think>", "</think>", "none"]
    assert score(thinking_reward, completions, ids=ids).totals == pytest.approx([0.8, 0.3, -1.0])


def test_message_prompts_make_message_completions():
    prompt = [{"role": "user", "content": "hi"}]
    seen = {}

    def reward(prompts, completions, **kwargs):
        seen.update(prompts=prompts, completions=completions)
        return [0.0, 0.0]

    scores = score([reward, conversational_reward], ["<think>a</think>b", "c"], prompts=[prompt, prompt])
    assert scores.totals == [1.0, 0.0]
    assert seen["prompts"] == [prompt, prompt]
    assert seen["completions"][1] == [{"role": "assistant", "content": "c"}]


def test_none_leaves_a_function_out_of_the_sum():
    scores = score([math_only, constant(0.25)], weights=[2.0, 1.0], task=["math", "code"])
    assert scores.totals == [2.25, 0.25]
    assert math.isnan(scores.values[1][0])


def test_a_completion_without_any_reward_is_nan_and_warns():
    with pytest.warns(UserWarning, match="no reward function applies"):
        scores = score(math_only, task=["math", "code"])
    assert scores.totals[0] == 1.0
    assert math.isnan(scores.totals[1])


def test_our_own_function_by_import_path():
    scores = score("grpo_lightning.rewards.math_answer", ["so 4", "so 5"], answer=["#### 4", "#### 4"])
    assert (scores.names, scores.totals) == (["math_answer"], [1.0, 0.0])


# --- what a function receives ---


def test_a_function_with_kwargs_receives_everything_by_keyword():
    seen = {}

    def reward(*args, **kwargs):
        seen.update(kwargs, args=args)
        return [0.0, 0.0]

    score(reward, state="the state", prompts=["p", "q"], ids=[[1], [2]], answer=["a", "b"])
    assert seen.pop("args") == ()
    assert callable(seen.pop("log_extra"))
    assert callable(seen.pop("log_metric"))
    assert seen == {
        "prompts": ["p", "q"],
        "completions": ["one", "two"],
        "completion_ids": [[1], [2]],
        "trainer_state": "the state",
        "answer": ["a", "b"],
    }


def test_columns_do_not_override_what_is_given():
    seen = {}

    def reward(**kwargs):
        seen.update(kwargs)
        return [0.0, 0.0]

    hidden = ["prompt", "completion", "completion_ids", "trainer_state", "log_metric"]
    score(reward, **{name: ["column"] * 2 for name in hidden}, state="state", ids=[[1], [2]])
    assert (seen["completion_ids"], seen["trainer_state"]) == ([[1], [2]], "state")
    assert seen.keys().isdisjoint({"prompt", "completion"})
    assert callable(seen["log_metric"])


def test_a_required_parameter_that_is_missing_is_named_with_the_columns():
    with pytest.raises(
        ConfigError, match=r"'correctness_reward' requires 'answer' .*columns \['answr'\]"
    ) as caught:
        score(correctness_reward, answr=["4", "4"])
    assert "did you mean 'answr'?" in str(caught.value)


def test_columns_can_be_checked_before_anything_is_generated():
    rewards = Rewards([boxed_reward, correctness_reward])
    rewards.check_columns(["prompt", "answer"])
    with pytest.raises(ConfigError, match="requires 'answer'"):
        rewards.check_columns(["prompt"])


def test_positional_only_parameters_are_refused():
    def reward(completions, /):
        return completions

    with pytest.raises(ConfigError, match="remove the '/'"):
        Rewards(reward)


def test_what_a_partial_binds_stays_bound():
    def reward(completions, scale, **kwargs):
        return [scale] * len(completions)

    bound = functools.partial(reward, scale=3.0)
    assert score(bound, scale=[1.0, 1.0]).totals == [3.0, 3.0]
    assert score(bound).names == ["reward"]


@pytest.mark.parametrize("make_async", [False, True])
def test_mutation_reaches_neither_other_functions_nor_the_caller(make_async):
    def vandal(prompts, completions, completion_ids, tags, **kwargs):
        prompts[0].append("more")
        prompts[0][0]["content"] = "changed"
        assert prompts[1] == [{"role": "user", "content": "hi"}]
        completions[0].clear()
        completion_ids[0].clear()
        tags[0]["nested"].append(1)
        for values in (prompts, completions, completion_ids, tags):
            values.clear()
        return [0.0, 0.0]

    async def async_vandal(**kwargs):
        return vandal(**kwargs)

    seen = {}

    def witness(prompts, completions, completion_ids, tags):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, tags=tags)
        return [1.0, 1.0]

    prompt, tag = [{"role": "user", "content": "hi"}], {"nested": []}
    given = {"prompts": [prompt, prompt], "completions": ["a", "b"], "completion_ids": [[1], [2]]}
    suite = Rewards([async_vandal if make_async else vandal, witness])
    scores = suite.score(**given, columns={"tags": [tag, tag]})
    assert scores.totals == [1.0, 1.0]
    assert seen["completions"][0] == [{"role": "assistant", "content": "a"}]
    assert (seen["prompts"], seen["ids"], seen["tags"]) == ([prompt, prompt], [[1], [2]], [tag, tag])
    assert given == {"prompts": [prompt, prompt], "completions": ["a", "b"], "completion_ids": [[1], [2]]}
    assert (prompt, tag) == ([{"role": "user", "content": "hi"}], {"nested": []})


def test_logging():
    def reward(completions, log_extra, log_metric, **kwargs):
        log_extra("upper", (c.upper() for c in completions))
        log_metric("hits", 1)
        log_metric("hits", torch.tensor(2.0))
        return [0.0] * len(completions)

    scores = score(reward)
    assert scores.metrics == {"hits": 1.5}
    assert scores.extra == {"upper": ["ONE", "TWO"]}


def test_log_extra_of_the_wrong_length_is_an_error():
    def reward(completions, log_extra):
        log_extra("upper", ["only one"])

    with pytest.raises(RewardError, match=r"log_extra\('upper', …\) got 1 values for 2 completions"):
        score(reward)


# --- async ---


class AsyncReward:
    async def __call__(self, completions, **kwargs):
        await asyncio.sleep(0)
        return [2.0] * len(completions)


def test_async_functions_and_objects():
    scores = score([async_judge, AsyncReward(), constant(1.0)])
    assert scores.names == ["async_judge", "AsyncReward", "reward"]
    assert scores.values == [[3.0, 2.0, 1.0]] * 2


def test_async_functions_run_at_the_same_time():
    second_is_here = asyncio.Event()

    async def first(completions, **kwargs):
        await asyncio.wait_for(second_is_here.wait(), timeout=5)
        return [1.0] * len(completions)

    async def second(completions, **kwargs):
        second_is_here.set()
        return [1.0] * len(completions)

    assert score([first, second]).totals == [2.0, 2.0]


def test_async_functions_work_inside_a_running_loop():
    async def notebook_cell():
        return score([async_judge, constant(1.0)])

    assert asyncio.run(notebook_cell()).totals == [4.0, 4.0]


def test_an_async_failure_names_the_function_and_leaves_nothing_behind():
    async def broken(completions, **kwargs):
        await asyncio.sleep(0)
        raise KeyError("judge")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RewardError, match="'broken' raised KeyError: 'judge'") as caught:
            score([async_judge, broken])
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.filterwarnings("error")
def test_a_sync_failure_closes_the_coroutines_that_wait():
    def broken(completions):
        raise ValueError("no")

    with pytest.raises(RewardError, match="'broken' raised ValueError: no"):
        score([async_judge, broken])


# --- what a function returns ---


@pytest.mark.parametrize(
    "value",
    [1.0, 1, True, np.float32(1), np.float64(1), np.int64(1), np.bool_(True), np.array(1.0), torch.tensor(1)],
    ids=lambda value: type(value).__name__,
)
def test_numbers_of_every_kind(value):
    totals = score(constant(value)).totals
    assert totals == [1.0, 1.0]
    assert {type(total) for total in totals} == {float}


@pytest.mark.parametrize(
    "returned",
    [
        (1.0, 2.0),
        np.array([1.0, 2.0]),
        np.array([1, 2]),
        torch.tensor([1.0, 2.0], requires_grad=True),
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    ],
    ids=lambda returned: type(returned).__name__,
)
def test_whole_arrays(returned):
    assert score(lambda completions: returned).totals == [1.0, 2.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned None (NoneType)"),
        ("high", "returned 'high' (str)"),
        (1.0, "returned 1.0 (float)"),
        ({"score": 1.0}, "returned {'score': 1.0} (dict)"),
        (np.ones((2, 1)), "(ndarray of shape (2, 1))"),
        (torch.tensor(1.0), "(Tensor of shape ())"),
        ([1.0], "returned 1 values, expected 2"),
        ([1.0] * 3, "returned 3 values, expected 2"),
        (np.ones(3), "returned 3 values, expected 2"),
        ([], "returned 0 values, expected 2"),
        ([1.0, "1.0"], "returned '1.0' (str) for completion 1"),
        ([[1.0], 1.0], "returned [1.0] (list) for completion 0"),
        ([1.0, 1j], "returned 1j (complex) for completion 1"),
        ([1.0, math.nan], "returned nan for completion 1"),
        ([math.inf, 1.0], "returned inf for completion 0"),
        ([1.0, -math.inf], "returned -inf for completion 1"),
        ([1.0, np.float32("nan")], "returned nan for completion 1"),
        (torch.tensor([1.0, math.nan]), "returned nan for completion 1"),
        ([1.0, 10**400], "returned inf for completion 1"),
    ],
)
def test_what_is_not_a_list_of_rewards_is_refused_with_the_sample(returned, message):
    def bad(completions, **kwargs):
        return returned

    with pytest.raises(RewardError, match=re.escape(message)) as caught:
        score(
            [constant(0.0), bad], ["first text", "second text"], prompts=["P one", "P two"], answer=["A", "B"]
        )
    shown = str(caught.value)
    assert "'bad'" in shown
    second = "for completion 1" in message
    assert ("second text" if second else "first text") in shown
    assert ("P two" if second else "P one") in shown
    assert ("{'answer': 'B'}" if second else "{'answer': 'A'}") in shown


def test_an_exception_is_chained_and_its_sample_is_clipped():
    def broken(completions, **kwargs):
        raise ZeroDivisionError("row 3")

    with pytest.raises(RewardError, match="'broken' raised ZeroDivisionError: row 3") as caught:
        score(broken, ["c" * 5000], prompts=["head" + "p" * 5000 + "tail"], answer=["a" * 5000])
    text = str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "this is the first" in text
    assert "tail" in text
    assert "head" not in text
    assert len(text) < 1300


def test_uneven_inputs_are_the_callers_mistake():
    with pytest.raises(ValueError, match="answer has 1 entries for 2 completions"):
        score(constant(0.0), answer=["a"])


# --- names and weights ---


class Judge:
    def __call__(self, completions, **kwargs):
        return [0.0] * len(completions)

    def strict(self, completions):
        return [0.0] * len(completions)


def test_names():
    rewards = Rewards(
        [
            length_reward,
            Judge(),
            Judge().strict,
            functools.partial(math_answer, x=1),
            Judge(),
            length_reward,
            Judge(),
        ]
    )
    assert rewards.names == [
        "length_reward",
        "Judge",
        "strict",
        "math_answer",
        "Judge_2",
        "length_reward_2",
        "Judge_3",
    ]


@pytest.mark.parametrize(
    ("functions", "weights", "message"),
    [
        ([length_reward], [1.0, 2.0], "2 entries for 1 reward functions (length_reward)"),
        ([length_reward], [], "0 entries for 1"),
        ([length_reward], [math.nan], "finite"),
        ([], None, "reward_funcs is empty"),
    ],
)
def test_functions_and_weights_that_do_not_fit(functions, weights, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Rewards(functions, weights)


# --- resolving ---

USER_FILE = """
import os, subprocess
from dataclasses import dataclass

LEVEL = 0.5

def half(completions, **kwargs):
    return [LEVEL] * len(completions)

@dataclass
class Scaled:
    scale: float = 1.0

    def __call__(self, completions, **kwargs):
        return [self.scale] * len(completions)

scaled = Scaled(3.0)
run = subprocess.run
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder of a user, with `my_rewards.py` and a package `my_package`."""
    (tmp_path / "my_rewards.py").write_text(USER_FILE)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("def inner(completions): return [0.0]")
    (tmp_path / "my_package" / "inner.py").write_text("")
    (tmp_path / "my_package" / "other.py").write_text("import no_such_dependency")
    (tmp_path / "my_package" / "broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("spec", "value"),
    [
        ("my_rewards.half", 0.5),
        ("my_rewards:half", 0.5),
        ("my_rewards.py:half", 0.5),
        ("./my_rewards.py:half", 0.5),
        ("{folder}/my_rewards.py:half", 0.5),
        ("my_rewards.scaled", 3.0),
        ({"class_path": "my_rewards.Scaled"}, 1.0),
        ({"class_path": "my_rewards:Scaled", "init_args": {"scale": 2.0}}, 2.0),
        ({"class_path": "my_rewards.py:Scaled", "init_args": {"scale": 2.0}}, 2.0),
    ],
    ids=str,
)
def test_every_form_resolves(folder, spec, value):
    if isinstance(spec, str):
        spec = spec.replace("{folder}", str(folder))
    assert resolve(spec)(completions=["a", "b"]) == [value, value]


@pytest.mark.usefixtures("folder")
def test_two_names_of_one_file_share_its_state():
    assert import_object("my_rewards.py:half", "x").__globals__["scaled"] is import_object(
        "my_rewards.py:scaled", "x"
    )


@pytest.mark.usefixtures("folder")
def test_a_function_wins_over_a_submodule_of_the_same_name():
    assert callable(import_object("my_package.inner", "x"))
    assert import_object("my_rewards.Scaled.__call__", "x").__name__ == "__call__"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("spec", "messages"),
    [
        ("my_rewards.haf", ["'my_rewards.haf'", "my_rewards has no 'haf'", "did you mean 'half'?"]),
        ("my_rewards.py:haf", ["my_rewards.py has no 'haf'", "did you mean 'half'?"]),
        ("my_rewards.py", ["names a file", "add ':name'", "half"]),
        ("nowhere.py:half", ["there is no file", "nowhere.py"]),
        ("my_reward.half", ["there is no module 'my_reward'"]),
        ("my_reward:half", ["there is no module 'my_reward'"]),
        ("grpo_lightning.reward.math_answer", ["grpo_lightning has no 'reward'", "did you mean 'rewards'?"]),
        ("my_package.other", ["names a module", "'my_package.other:name'"]),
        ("my_package:inner.missing", ["my_package.inner has no 'missing'"]),
        ("my_package.other.f", ["'no_such_dependency', which is not installed"]),
        ("my_package.broken.f", ["importing my_package.broken failed with ZeroDivisionError"]),
        ("half", ["is not an import path", "path/file.py:name"]),
        ("", ["is not an import path"]),
        ("my rewards.half", ["is not an import path"]),
        ("math_answer", ["is written 'grpo_lightning.rewards.math_answer'"]),
        ("Qwen/Reward-7B", ["reward models are not offered yet", "function of your own"]),
        ("my_rewards.LEVEL", ["is a float and cannot be called"]),
        ("my_rewards.Scaled", ["is a class", "class_path: my_rewards.Scaled"]),
        ({"class_path": "my_rewards.Scaled", "init_arg": {}}, ["'init_arg'", "did you mean 'init_args'?"]),
        ({"init_args": {}}, ["must be {class_path"]),
        ({"class_path": "my_rewards.LEVEL"}, ["is a float, not a class or function"]),
        ({"class_path": "my_rewards.Scaled", "init_args": {"sale": 1}}, ["failed with init_args", "'sale'"]),
        (
            {"class_path": "torch.nn.Linear", "init_args": {"in_features": 1, "out_features": 1}},
            ["nn.Module"],
        ),
        (torch.nn.Linear(1, 1), ["is an nn.Module", "reward models are not offered yet"]),
        (Judge, ["is a class", "class_path"]),
        (3, ["is a int and cannot be called"]),
        ("os.system", ["'os'", "a config may not call"]),
        ("os:system", ["'os'", "a config may not call"]),
        ("subprocess.run", ["'subprocess'"]),
        ("pickle.loads", ["'pickle'"]),
        ("importlib.import_module", ["'importlib'"]),
        ("builtins.eval", ["'builtins'"]),
        ("my_rewards:os.system", ["a config may not call"]),
        ("my_rewards.py:run", ["comes from 'subprocess'"]),
        ({"class_path": "subprocess.Popen", "init_args": {"args": "false"}}, ["'subprocess'"]),
    ],
    ids=str,
)
def test_what_cannot_be_resolved_says_why_and_what_to_do(spec, messages):
    with pytest.raises(ConfigError) as caught:
        resolve(spec)
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.usefixtures("folder")
def test_a_file_that_failed_runs_again_when_it_is_mended(folder):
    file = folder / "my_late.py"
    file.write_text("1 / 0")
    with pytest.raises(ConfigError, match=r"running .*my_late.py failed with ZeroDivisionError"):
        import_object("my_late.py:f", "reward function")
    file.write_text("def f(completions): return [7.0]")
    assert import_object("my_late.py:f", "reward function")(["a"]) == [7.0]


def test_no_completion_calls_no_function_and_needs_no_column():
    """A rank without a prompt in a batch knows no columns."""

    def mean_of_answers(completions, answer, **_):
        raise AssertionError("called without a completion")

    scores = Rewards(mean_of_answers).score(prompts=[], completions=[], completion_ids=[], columns={})
    assert (scores.names, scores.values, scores.totals) == (["mean_of_answers"], [], [])
