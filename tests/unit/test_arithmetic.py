"""The embedded task: every problem once, with its right answer."""

import pytest

from grpo_lightning.data.arithmetic import sums
from grpo_lightning.errors import ConfigError

HEAD = "State the final answer to the following arithmetic problem: "


def expression(row):
    (message,) = row["prompt"]
    first, second = message["content"].split("\n")
    assert message["role"] == "user"
    assert second == "Answer with only the final number."
    return first.removeprefix(HEAD).removesuffix(" =")


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 100),
        ({"max_terms": 3}, 1100),
        ({"min_terms": 3, "max_terms": 3, "max_value": 3, "operators": "+-"}, 256),
        ({"min_terms": 1, "max_terms": 1}, 10),
    ],
)
def test_all_problems_are_distinct_and_right_and_one_more_is_refused(options, count):
    rows = sums(count, **options)
    assert len({expression(row) for row in rows}) == count
    for row in rows:
        assert str(eval(expression(row))) == row["answer"]
        assert row["question"] == row["prompt"][0]["content"]
        assert len(expression(row).split(" ")) == 2 * row["terms"] - 1
    with pytest.raises(ConfigError, match=rf"size is {count + 1}, but there are only {count} distinct"):
        sums(count + 1, **options)


def test_the_seed_decides_which_and_in_which_order():
    assert sums(20, seed=1) == sums(20, seed=1)
    assert [row["answer"] for row in sums(20, seed=1)] != [row["answer"] for row in sums(20, seed=2)]


def test_wide_problems_are_drawn_without_listing_them():
    assert len(sums(5, min_terms=4, max_terms=4, max_value=9999)) == 5


def test_subtraction_may_be_negative():
    assert any(row["answer"].startswith("-") for row in sums(200, operators="+-"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"operators": "*"}, r"operators is '\*' \(allowed: \+, \+-\)"),
        ({"size": 0}, "size=0"),
        ({"min_terms": 3}, "min_terms=3, max_terms=2"),
        ({"max_value": -1}, "max_value=-1"),
    ],
)
def test_arguments_out_of_range_are_named(options, says):
    with pytest.raises(ConfigError, match=says):
        sums(**{"size": 5, **options})
