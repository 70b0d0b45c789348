import subprocess
import sys
from types import SimpleNamespace

import pytest

from grpo_lightning import rewards
from grpo_lightning.errors import ConfigError
from grpo_lightning.rewards import FormatReward, ReasoningGymScore, exact_match, format_reward, math_answer
from grpo_lightning.rewards import gym as gym_module
from grpo_lightning.rewards.suite import Rewards


def chat(text):
    return [{"role": "assistant", "content": text}]


def test_the_package_imports_without_torch_and_optional_packages():
    code = (
        "import sys, grpo_lightning.rewards\n"
        "heavy = {'torch', 'numpy', 'datasets', 'reasoning_gym', 'transformers'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_exact_match_ignores_outer_blanks_only():
    completions = ["42", " 42\n", "4 2", chat("42"), "yes", "42"]
    assert exact_match(completions, answer=["42", "42", "42", "42 ", "Yes", None]) == [1, 1, 0, 1, 0, None]
    assert exact_match(["42"], answer=[42], question=["?"]) == [1.0]


@pytest.mark.parametrize(
    ("completion", "gold", "score"),
    [
        (r"so \boxed{72}", "72", 1.0),
        (r"so \boxed{72}", "Natalia sold 48/2 = 24.\n#### 72", 1.0),
        (r"\boxed{1} no, \boxed{2}", "2", 1.0),
        (r"\boxed{1} no, \boxed{2}", "1", 0.0),
        (r"\boxed {7}", "7", 1.0),
        (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{-\dfrac{3}{4}}", "-0.75", 1.0),
        (r"\boxed{\text{Paris}}", "paris", 1.0),
        (r"\boxed{\{1, 2\}}", r"\{1,2\}", 1.0),
        (r"\boxed{x^{2} + 1}", "x^{2}+1", 1.0),
        (r"\boxed{x+1}", "x+2", 0.0),
        (r"\boxed{\boxed{5}}", "5", 1.0),
        (r"\boxed{3} and then \boxed{4", "3", 1.0),
        (r"\boxed{}", "3", 0.0),
        (r"the set {1, \boxed{6}", "6", 1.0),
        ("#### 1,234", "1234", 1.0),
        ("#### 72.\n\nI hope that helps with your 3 questions!", "72", 1.0),
        ("#### Step 1: add\n2 + 2 = 4", "4", 1.0),
        ("#### Paris", "paris", 1.0),
        ("The answer is $1,234.50.", "1234.5", 1.0),
        ("It costs \\$5.", "$5", 1.0),
        ("That is 50%", "50", 1.0),
        ("x = -3", "-3", 1.0),
        ("x = -3", "3", 0.0),
        ("10-5", "5", 1.0),
        ("half is 1/2.", "0.5", 1.0),
        ("it is .25", "1/4", 1.0),
        (r"it is \frac{3}{8}", "0.375", 1.0),
        ("0.333", "1/3", 0.0),
        ("72.000", 72, 1.0),
        ("72", 72.0, 1.0),
        ("100", "1,00", 0.0),
        ("no idea", "72", 0.0),
        ("", "72", 0.0),
        ("the H2O of 3x", "2", 0.0),
        (r"\boxed{1/0}", "0", 0.0),
        ("72", r"so it is \boxed{72}", 1.0),
        ("72", None, None),
        ("72", "  ", None),
    ],
)
def test_math_answer(completion, gold, score):
    assert math_answer([completion], answer=[gold]) == [score]
    assert math_answer([chat(completion)], solution=[gold]) == [score]


def test_math_answer_takes_the_solution_where_the_answer_is_missing():
    assert math_answer(["1", "2", "3"], answer=["1", None, None], solution=["9", "2", None]) == [
        1.0,
        1.0,
        None,
    ]


def test_math_answer_without_any_gold_column_names_both():
    with pytest.raises(ConfigError, match="'answer' or 'solution'"):
        math_answer(["1"], question=["?"])


@pytest.mark.parametrize(
    "text", ["9" * 20_000, r"\boxed{" * 20_000, "{" * 20_000, "1," * 20_000, "#" * 20_000]
)
def test_math_answer_survives_degenerate_text(text):
    assert math_answer([text], answer=["12"]) == [0.0]


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think>2 + 2\n</think>\n<answer>4</answer>", 1.0),
        (" <think></think><answer></answer>\n", 1.0),
        ("<answer>4</answer>", 0.0),
        ("<think>a</think><answer>4</answer> and more", 0.0),
        ("<think>a</think><answer>4</answer><answer>5</answer>", 0.0),
        ("<think>a</think> so <answer>4</answer>", 0.0),
    ],
)
def test_format_reward(completion, score):
    assert format_reward([completion, chat(completion)], prompts=["", ""]) == [score, score]


def test_format_reward_takes_another_pattern():
    boxed = FormatReward(r"\\boxed\{.+\}", full_match=False)
    assert boxed([r"so \boxed{5}", "so 5"]) == [1.0, 0.0]
    assert FormatReward(r"\\boxed\{.+\}")([r"so \boxed{5}", r"\boxed{5}"]) == [0.0, 1.0]
    with pytest.raises(ConfigError, match="not a regular expression"):
        FormatReward("(")


def test_length_penalty_is_dapos_ramp():
    suite = Rewards(
        {
            "class_path": "grpo_lightning.rewards.length_penalty",
            "init_args": {"max_tokens": 10, "buffer": 4},
        }
    )
    assert suite.names == ["length_penalty"]
    lengths = [0, 6, 7, 8, 10, 11, 50]
    scores = suite.score(
        prompts=["p"] * 7,
        completions=["c"] * 7,
        completion_ids=[[1] * n for n in lengths],
        columns={},
    )
    assert scores.totals == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0, -1.0]


@pytest.mark.parametrize("buffer", [0, -1, 11])
def test_length_penalty_refuses_a_buffer_out_of_range(buffer):
    with pytest.raises(ConfigError, match=r"\[1, max_tokens = 10\]"):
        rewards.length_penalty(max_tokens=10, buffer=buffer)


@pytest.fixture
def fake_gym(monkeypatch):
    """A stand-in with the call of reasoning-gym 0.1.25 and its usual grader."""

    def get_score_answer_fn(name):
        assert name in ("leg_counting", "countdown")
        return lambda answer, entry: len(entry["answer"]) / len(answer) if entry["answer"] in answer else 0.0

    monkeypatch.setitem(
        sys.modules, "reasoning_gym", SimpleNamespace(get_score_answer_fn=get_score_answer_fn)
    )
    gym_module._load_grader.cache_clear()
    yield
    gym_module._load_grader.cache_clear()


def gym_columns(n, task="leg_counting"):
    return {"question": ["?"] * n, "answer": ["42"] * n, "metadata": [{"source_dataset": task}] * n}


@pytest.mark.usefixtures("fake_gym")
def test_reasoning_gym_score_grades_the_tagged_answer_or_the_whole_text():
    texts = ["<answer>1</answer> or <answer> 42 </answer>", chat("42"), "x 42", "42 <answer>", "41"]
    scores = rewards.reasoning_gym_score(texts, **gym_columns(5))
    assert scores == [1.0, 1.0, 0.5, pytest.approx(2 / 11), 0.0]


@pytest.mark.usefixtures("fake_gym")
def test_reasoning_gym_score_refuses_graders_that_evaluate_the_models_text():
    with pytest.raises(ConfigError, match="allow_eval: true"):
        rewards.reasoning_gym_score(["42"], **gym_columns(1, "countdown"))
    assert ReasoningGymScore(allow_eval=True)(["42"], **gym_columns(1, "countdown")) == [1.0]


def test_reasoning_gym_score_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    gym_module._load_grader.cache_clear()
    suite = Rewards("grpo_lightning.rewards.reasoning_gym_score")
    with pytest.raises(ConfigError, match=r'pip install "grpo-lightning\[gym\]"'):
        suite.score(prompts=["?"], completions=["42"], completion_ids=[[1]], columns=gym_columns(1))


@pytest.mark.gym
def test_reasoning_gym_score_fits_the_installed_package():
    import reasoning_gym

    rows = list(reasoning_gym.create_dataset("leg_counting", size=2, seed=1))
    columns = {name: [row[name] for row in rows] for name in ("question", "answer", "metadata")}
    scores = rewards.reasoning_gym_score([rows[0]["answer"], "no idea"], **columns)
    assert scores == [1.0, 0.0]
