"""How batches are filled up to few shapes."""

import math
import random
from itertools import pairwise

import pytest

from grpo_lightning.ops.attention.shape_buckets import ROWS, SEGMENTS, fill


def regions(groups):
    """The lengths of `fill`, of pairs of a prompt and the rows of its completions."""
    shared = [(p, own) for p, own in groups if len(own) > 1]
    whole = [p + sum(own) for p, own in groups if len(own) < 2]
    return (
        whole,
        [p for p, _ in shared],
        [n for _, own in shared for n in own],
        [sum(own) for _, own in shared],
    )


def sums(draw):
    """A rollout of 16 x 8 short completions; groups without signal are left out."""
    alive = draw.random()
    return [
        (draw.randint(54, 60), [draw.choice((1, 2, 2, 8, 10, 15)) for _ in range(8)])
        for _ in range(16)
        if draw.random() < 0.2 + 0.7 * alive
    ]


def gsm8k(draw):
    """The same with longer texts, of 1 to 12 groups."""

    def length():
        return max(1, min(255, round(150 * math.exp(draw.gauss(0, 0.5)))))

    return [(draw.randint(50, 208), [length() for _ in range(8)]) for _ in range(draw.randint(1, 12))]


def anything(draw):
    return [
        (draw.randint(1, 900), [draw.randint(1, 400) for _ in range(draw.choice((0, 1, 2, 9)))])
        for _ in range(draw.randint(1, 40))
    ]


@pytest.mark.parametrize("work", [sums, gsm8k, anything])
def test_a_batch_is_filled_exactly(work):
    for seed in range(200):
        lengths = regions(work(random.Random(seed)) or [(1, [])])
        shape, added = fill(*lengths)
        room = [*shape[:3], (shape.completions.rows, shape.prompts.segments)]
        for (rows, segments), own, more in zip(room, lengths, added, strict=True):
            filled = [*own, *more]
            assert (sum(filled), len(filled)) == (rows, segments)
            assert min(filled, default=1) > 0
        assert shape.longest >= max(n for region in (*lengths[:3], *added[:3]) for n in region)
        assert shape.longest_towards[0] >= max([*lengths[3], *added[3]], default=0)
        assert shape.longest_towards[1] >= max([*lengths[1], *added[1]], default=0)


@pytest.mark.parametrize("work", [sums, gsm8k, anything])
def test_filling_is_bounded(work):
    """Each region at most doubles, or has the least size; many rows grow by a quarter at most."""
    for seed in range(200):
        lengths = regions(work(random.Random(seed)) or [(1, [])])
        shape, _ = fill(*lengths)
        most = 2 * max(SEGMENTS)
        for (rows, segments), own in zip(shape[:3], lengths[:3], strict=True):
            assert rows <= max(ROWS, 2 * (sum(own) + most))
            assert sum(own) <= 8 * ROWS or rows <= 1.25 * (sum(own) + most)
            assert segments <= 9 / 8 * max(*SEGMENTS, 2 * len(own))
            assert bool(rows) == bool(segments) == bool(own)


@pytest.mark.parametrize(("work", "most"), [(sums, 2), (gsm8k, 16)])
@pytest.mark.parametrize("seed", range(5))
def test_shapes_of_a_run_are_few(work, most, seed):
    """Few of steps 5 to 60 meet one for the first time, without a graph, or the second, for its capture."""
    draw, times, late = random.Random(seed), {}, 0
    for step in range(1, 301):
        groups = work(draw)
        if groups:
            shape, _ = fill(*regions(groups))
            times[shape] = times.get(shape, 0) + 1
            late += 5 <= step <= 60 and times[shape] <= 2
    assert len(times) <= most
    assert late <= 1.25 * most


def test_sizes_are_geometric():
    sizes = sorted({fill([], [n], [n] * 2, [2 * n])[0].completions.rows for n in range(1, 20_000, 50)})
    assert sizes[:12] == [ROWS * n for n in (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24)]
    assert all(b <= 1.25 * a for a, b in pairwise(sizes[5:]))


def test_a_shape_follows_from_lengths_alone():
    """In any order; so a resumed run fills its batches as the run before would have."""
    groups = gsm8k(random.Random(3))
    shape, _ = fill(*regions(groups))
    turned = [(p, own[::-1]) for p, own in groups[::-1]]
    assert fill(*regions(turned))[0] == shape
