"""`reasoning_gym_score`: the graders of reasoning-gym, each for the tasks it has generated."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from grpo_lightning.errors import ConfigError
from grpo_lightning.rewards.functions import text_of

# Graders of reasoning-gym 0.1.25 that hand the model's text to `eval`, or to sympy's parser, which does so.
_EVALUATING = frozenset(
    {
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)


class ReasoningGymScore:
    """Returns the score that the task's own grader in reasoning-gym gives, usually in [0, 1].

    The answer is what stands in the last `<answer>…</answer>`, else the whole completion; many graders give
    part of the reward to a text that merely holds the right answer. Needs the columns `question`, `answer`
    and `metadata` (a mapping with `source_dataset`). Source: https://github.com/open-thought/reasoning-gym.

    Args:
        allow_eval: also use the graders that evaluate what the model wrote as Python, in this process. Off,
            because a policy can write anything.

    Raises:
        ConfigError: reasoning-gym is not installed, or the grader needs `allow_eval`.
    """

    __name__ = "reasoning_gym_score"

    def __init__(self, allow_eval: bool = False) -> None:
        self.allow_eval = allow_eval

    def __call__(
        self,
        completions: Sequence[Any],
        question: Sequence[str],
        answer: Sequence[Any],
        metadata: Sequence[Mapping[str, Any]],
        **_: Any,
    ) -> list[float]:
        return [
            float(self._grader(m["source_dataset"])(answer=_answer(c), entry=_entry(q, a, m)))
            for c, q, a, m in zip(completions, question, answer, metadata, strict=True)
        ]

    def _grader(self, task: str) -> Callable[..., float]:
        if task in _EVALUATING and not self.allow_eval:
            raise ConfigError(
                f"the grader of the reasoning-gym task {task!r} evaluates what the model wrote as Python; "
                "take another task, or accept it with {class_path: grpo_lightning.rewards.ReasoningGymScore, "
                "init_args: {allow_eval: true}}"
            )
        return _load_grader(task)


reasoning_gym_score = ReasoningGymScore()


@cache
def _load_grader(task: str) -> Callable[..., float]:
    try:
        from reasoning_gym import get_score_answer_fn  # pyright: ignore[reportMissingImports]  (optional package)
    except ImportError as error:
        raise ConfigError(
            'reasoning_gym_score needs reasoning-gym; install it with: pip install "grpo-lightning[gym]"'
        ) from error
    return get_score_answer_fn(task)


def _answer(completion: Any) -> str:
    text = text_of(completion)
    before_end, _, _ = text.rpartition("</answer>")
    _, tag, tagged = before_end.rpartition("<answer>")
    return (tagged if tag else text).strip()


def _entry(question: str, answer: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {"question": question, "answer": answer, "metadata": metadata}
