"""Reward functions that look at text and length. All take strings as well as message lists."""

import re
from collections.abc import Sequence
from typing import Any

from grpo_lightning.errors import ConfigError, hinted


def text_of(completion: Any) -> str:
    """Returns the text of a completion: the string itself, or the content of its last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def exact_match(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """Returns 1.0 where the completion equals the answer, outer blanks aside, else 0.0; None without answer.

    Args:
        completions: [S] texts or message lists.
        answer: [S], a column of the dataset; what is not a string is compared by its `str`.
    """
    return [
        None if gold is None else float(text_of(completion).strip() == str(gold).strip())
        for completion, gold in zip(completions, answer, strict=True)
    ]


@hinted
class FormatReward:
    r"""Returns 1.0 where the completion has the form of `pattern`, else 0.0.

    Args:
        pattern: a regular expression in which `.` matches line ends too. The default is one thought and one
            answer, `<think>…</think><answer>…</answer>`. Chat templates that open `<think>` in the prompt
            need another.
        full_match: the whole completion must match, blanks around it aside; else any part of it may.

    Raises:
        ConfigError: `pattern` is not a regular expression.
    """

    __name__ = "format_reward"

    # No tag closes twice, so that a second answer behind the first does not pass as part of it.
    THINK_ANSWER = r"<think>(?:(?!</think>).)*</think>\s*<answer>(?:(?!</answer>).)*</answer>"

    def __init__(self, pattern: str = THINK_ANSWER, full_match: bool = True) -> None:
        try:
            compiled = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ConfigError(
                f"format_reward pattern {pattern!r} is not a regular expression: {error}"
            ) from error
        self._match = compiled.fullmatch if full_match else compiled.search

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        return [float(self._match(text_of(completion).strip()) is not None) for completion in completions]


format_reward = FormatReward()


class LengthPenalty:
    """Returns DAPO's soft overlong punishment, in [-1, 0].

    With length L in tokens: 0 up to `max_tokens - buffer`, then `(max_tokens - buffer - L) / buffer`, which
    is -1 at `max_tokens`, and -1 beyond. Source: arXiv 2503.14476, equation 13.

    Args:
        max_tokens: L_max in tokens; usually `rollout.sampling.max_tokens`.
        buffer: L_c, the last tokens before `max_tokens`, over which the penalty grows.

    Raises:
        ConfigError: `buffer` is not in [1, max_tokens].
    """

    __name__ = "length_penalty"

    def __init__(self, max_tokens: int, buffer: int) -> None:
        if not 1 <= buffer <= max_tokens:
            raise ConfigError(
                f"length_penalty buffer is {buffer}; it must be in [1, max_tokens = {max_tokens}]"
            )
        self.max_tokens, self.buffer = max_tokens, buffer

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        free = self.max_tokens - self.buffer
        return [max(-1.0, min(0.0, (free - len(ids)) / self.buffer)) for ids in completion_ids]


length_penalty = LengthPenalty
