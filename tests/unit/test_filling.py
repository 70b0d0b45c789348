"""How batches are filled up to few shapes."""

import random

import pytest

from grpo_lightning.ops.filling import NEAR, Region, Shape


def lengths_of(draw, groups=16, members=8, mean=150):
    """Returns segments of whole, prompts and completions, and the queries of each group."""
    own = [[max(1, round(draw.lognormvariate(5, 0.5))) for _ in range(members)] for _ in range(groups)]
    prompts = [draw.randint(60, 200) for _ in own]
    return [], prompts, [n for group in own for n in group], [sum(group) for group in own]


@pytest.mark.parametrize("seed", range(20))
def test_a_region_is_filled_exactly_or_not_at_all(seed):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 300) for _ in range(draw.randint(1, 40))]
    region = Region.around(lengths)
    for own in (lengths, lengths[: len(lengths) // 2], [2 * n for n in lengths], []):
        added = region.filling(own)
        if added is not None:
            filled = [*own, *added]
            assert (sum(filled), len(filled)) == (region.rows, region.segments)
            assert 0 < min(filled) <= max(filled) <= region.longest
    assert region.filling(lengths) is not None
    assert region.filling([2 * n for n in lengths] * 2) is None


def test_a_segment_that_is_too_long_does_not_fit():
    region = Region.around([10] * 20)
    assert region.filling([10] * 16 + [region.longest + 1]) is None
    with pytest.raises(ValueError, match=r"rows do not fit Shape"):
        Shape(*[region] * 4).filling(*[[region.longest + 1]] * 4)


def test_shapes_of_a_run_are_few():
    """Groups without signal are left out, as in training; most steps find a graph that is there."""
    draw, known, new = random.Random(0), {}, 0
    for step in range(200):
        whole, prompts, completions, queries = lengths_of(draw, groups=draw.choice((14, 15, 16)))
        made = Shape.of(whole, prompts, completions, queries, known=known)
        assert made.rows <= NEAR * Shape(*map(Region.around, (whole, prompts, completions, queries))).rows
        for region, own, added in zip(
            made, (whole, prompts, completions, queries), made.filling(whole, prompts, completions, queries),
            strict=True,
        ):  # fmt: skip
            assert sum(own) + sum(added) == region.rows
        assert made.queries.rows == made.completions.rows
        new += step >= 20 and made not in known
        known[made] = step
    assert len(known) <= 16
    assert new <= 8


def test_the_least_shape_is_taken():
    lengths = [], [50], [30] * 8, [240]
    small, large = (Shape.of([], [50], [n] * 8, [8 * n], known=()) for n in (30, 38))
    assert small.rows < large.rows <= NEAR * small.rows
    assert Shape.of(*lengths, known=[large, small]) == small
    assert Shape.of(*lengths, known=[large]) == large
