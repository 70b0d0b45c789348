r"""`math_answer`: finds the final answer in a text and compares it with the right one."""

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from grpo_lightning.errors import ConfigError
from grpo_lightning.rewards.functions import text_of

_BRACES = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
# Blanks of every kind, signs of money and percent, and how LaTeX says them and sizes brackets.
_NOISE = re.compile(r"\s|\\[!,;: ]|\\?[$%]|\\left(?![a-z])|\\right(?![a-z])")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_DECIMAL = r"(?:\d+\.?\d*|\.\d+)"
_NUMBER = re.compile(rf"[-+]?{_DECIMAL}(?:/{_DECIMAL})?")
# As it stands in running text: not inside a word or another number, thousands with commas.
_NUMBER_IN_TEXT = re.compile(
    r"(?<![\w.])-?(?:\\?\$)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:(?<=\d)|(?=\.\d))(?:\.\d+)?(?:/\d+(?:\.\d+)?)?"
)


def math_answer(
    completions: Sequence[Any],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    **_: Any,
) -> list[float | None]:
    r"""Returns 1.0 where the final answer is right, 0.0 where wrong or absent, None where none is known.

    The final answer of a completion is its last `\boxed{…}`, else what follows its last `####`, else its last
    number. Both sides are compared as exact numbers (`1,000` = `1000.0`, `$5` = `5`, `50%` = `50`,
    `\frac{1}{2}` = `1/2` = `0.5`), or as text without blanks and case if one is not a number. Algebra is not
    simplified: `x+1` is not `1+x`.

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
        found = _last_number(text)
    if found is None:
        return 0.0
    expected = _marked(str(gold))
    return float(_same(found, str(gold) if expected is None else expected))


def _marked(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{…}` that closes, else what follows `####`, else None."""
    boxed = max(_boxed(text), default=None)
    if boxed is not None:
        return text[boxed[0] : boxed[1]]
    if "####" not in text:
        return None
    line, _, rest = text.rpartition("####")[2].strip().partition("\n")
    # `####` is a heading of Markdown too: with text below it, only a number is an answer.
    return line if line and (not rest or _number(line) is not None) else None


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


def _last_number(text: str) -> str | None:
    numbers = _NUMBER_IN_TEXT.findall(_LATEX_FRACTION.sub(r"\1/\2", text))
    return numbers[-1] if numbers else None


def _same(a: str, b: str) -> bool:
    x, y = _number(a), _number(b)
    return _plain(a) == _plain(b) if x is None or y is None else x == y


def _plain(text: str) -> str:
    text = _LATEX_TEXT.sub(r"\1", _LATEX_FRACTION.sub(r"\1/\2", text))
    return _THOUSANDS.sub("", _NOISE.sub("", text)).rstrip(".").casefold()


def _number(text: str) -> Fraction | None:
    plain = _plain(text)
    if not _NUMBER.fullmatch(plain):
        return None
    above, _, below = plain.partition("/")
    try:
        return Fraction(above) / Fraction(below or 1)
    except (ValueError, ZeroDivisionError):  # more digits than Python converts; division by zero
        return None
