"""An embedded task that needs no download: sums of small numbers, with the answer as a column.

The wording is that of reasoning-gym's `chain_sum`.
"""

import random
from typing import Any

from grpo_lightning.errors import ConfigError, choices

OPERATORS = ("+", "+-")


def sums(
    size: int,
    min_terms: int = 2,
    max_terms: int = 2,
    max_value: int = 9,
    operators: str = "+",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Returns `size` distinct problems as rows `{prompt, question, answer, terms}`.

    Single-digit sums of two terms are only 100 (4 + 3 and 3 + 4 count as two), of two or three terms 1,100.

    Args:
        size: number of rows.
        min_terms: fewest numbers in one problem.
        max_terms: most numbers in one problem.
        max_value: largest number; the smallest is 0.
        operators: `+`, or `+-` for subtractions as well, whose results may be negative.
        seed: decides which problems come, and in which order.

    Raises:
        ConfigError: there are fewer than `size` distinct problems, or an argument is out of its range.
    """
    if operators not in OPERATORS:
        raise ConfigError(f"data.dataset_kwargs.operators is {choices(operators, OPERATORS)}")
    if not (1 <= min_terms <= max_terms) or max_value < 0 or size < 1:
        raise ConfigError(
            f"data.dataset_kwargs has size={size}, min_terms={min_terms}, max_terms={max_terms}, "
            f"max_value={max_value}; "
            "it must be size >= 1, 1 <= min_terms <= max_terms, max_value >= 0"
        )
    counts = {
        terms: (max_value + 1) ** terms * len(operators) ** (terms - 1)
        for terms in range(min_terms, max_terms + 1)
    }
    total = sum(counts.values())
    if size > total:
        raise ConfigError(
            f"data.dataset_kwargs.size is {size}, but there are only {total} distinct problems; "
            "lower it, or raise max_terms or max_value"
        )
    return [
        _row(number, counts, max_value, operators)
        for number in random.Random(seed).sample(range(total), size)
    ]


def _row(number: int, counts: dict[int, int], max_value: int, operators: str) -> dict[str, Any]:
    """Returns problem `number`, read as digits of base max_value + 1, then signs of base len(operators)."""
    terms = 0
    for terms, count in counts.items():  # noqa: B007  # the one at which the loop stops
        if number < count:
            break
        number -= count
    values, signs = [], ["+"]
    for _ in range(terms):
        number, value = divmod(number, max_value + 1)
        values.append(value)
    for _ in range(terms - 1):
        number, sign = divmod(number, len(operators))
        signs.append(operators[sign])
    expression = str(values[0]) + "".join(f" {s} {v}" for s, v in zip(signs[1:], values[1:], strict=True))
    answer = sum(v if s == "+" else -v for s, v in zip(signs, values, strict=True))
    question = (
        f"State the final answer to the following arithmetic problem: {expression} =\n"
        "Answer with only the final number."
    )
    return {
        "prompt": [{"role": "user", "content": question}],
        "question": question,
        "answer": str(answer),
        "terms": terms,
    }
