r"""`math_answer`: finds the final answer in a text and compares it with the right one."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from grpo_lightning.errors import ConfigError
from grpo_lightning.rewards.functions import text_of
from grpo_lightning.rewards.math_text import last_number, number, same
from grpo_lightning.rewards.math_verifier import equivalent

_BRACES = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")


def math_answer(
    completions: Sequence[Any],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    **_: Any,
) -> list[float | None]:
    r"""Returns 1.0 where the final answer is right, 0.0 where wrong or absent, None where none is known.

    The final answer of a completion is its last `\boxed{…}`, else what follows its last `####`, else its last
    number. Two numbers are compared exactly, however they are written: `1,000` = `1{,}000` = `1e3` = `10^3`,
    `0.5` = `1/2` = `\frac12`, `1\frac12` = `1.5`, `−5` (U+2212) = `-5`; 0.333 is not 1/3. A unit, a currency
    or a percent sign that only one side has is ignored, two different ones are not: `5\text{ cm}` = `5`,
    `50%` = `50`, `5 cm` is not `5 m`. `x = 5` = `5`. Members of lists, tuples and intervals are compared one
    by one, everything else as text without blanks and case.

    Where the package math-verify is installed, it is asked about answers that are neither equal by these
    rules nor both numbers: then `x+1` = `1+x`, `2\sqrt2` = `\sqrt8`, `\{1, 2\}` = `\{2, 1\}`.

    Args:
        completions: [S] texts or message lists.
        answer: [S], a column: the bare answer, or a text with `\boxed{…}` or `####` (as in GSM8K).
        solution: [S], a column of the same kind; used where `answer` is missing.

    Raises:
        ConfigError: the dataset has neither column.
    """
    if answer is None and solution is None:
        raise ConfigError(
            "math_answer needs a column 'answer' or 'solution' in the dataset; rename the one that has it"
        )
    nothing = [None] * len(completions)
    golds = zip(answer or nothing, solution or nothing, strict=True)
    return [
        _score(text_of(completion), first if _given(first) else second)
        for completion, (first, second) in zip(completions, golds, strict=True)
    ]


def _given(gold: Any) -> bool:
    return gold is not None and bool(str(gold).strip())


def _score(text: str, gold: Any) -> float | None:
    if not _given(gold):
        return None
    found = _marked(text)
    if found is None:
        found = last_number(text)
    if found is None:
        return 0.0
    expected = _marked(str(gold))
    expected = str(gold) if expected is None else expected
    if same(found, expected):
        return 1.0
    numbers = number(found) is not None and number(expected) is not None
    return float(not numbers and equivalent(found, expected))


def _marked(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{…}` that closes, else what follows `####`, else None."""
    boxed = max(_boxed(text), default=None)
    if boxed is not None:
        return text[boxed[0] : boxed[1]]
    if "####" not in text:
        return None
    line, _, rest = text.rpartition("####")[2].strip().partition("\n")
    # `####` is a heading of Markdown too: with text below it, only a number is an answer.
    return line if line and (not rest or number(line) is not None) else None


def _boxed(text: str) -> Iterator[tuple[int, int]]:
    """Yields start and end of the content of every box, in one pass over the braces."""
    open_braces: list[tuple[bool, int]] = []
    for token in _BRACES.finditer(text):
        if token[0] == "}" and open_braces:
            is_box, start = open_braces.pop()
            if is_box:
                yield start, token.start()
        elif token[0].endswith("{") and token[0] != r"\{":
            open_braces.append((token[0] != "{", token.end()))
