"""Few sizes for many batches: how far a layout is filled up, so that it has the shape of a CUDA graph.

A shape follows from the lengths of its batch alone and not from earlier batches, so a resumed run fills its
batches as the run before would have.
"""

from collections.abc import Sequence
from typing import NamedTuple

ROWS = 1024
"""the fewest rows of a region; smaller ones take a GPU as long"""
SEGMENTS = (128, 16, 128)
"""the fewest segments of each region, to which comes an eighth for filling: 16 groups of 8 completions"""
LONGEST = 512
"""the least bound on the length of a segment"""


class Region(NamedTuple):
    """Room for segments of rows."""

    rows: int
    segments: int


class Shape(NamedTuple):
    """The regions of a layout: sequences that share no prompt, shared prompts, and their completions."""

    whole: Region
    prompts: Region
    completions: Region
    longest: int
    """bounds the segments of all regions"""

    @property
    def rows(self) -> int:
        """T'."""
        return self.whole.rows + self.prompts.rows + self.completions.rows

    @property
    def longest_towards(self) -> tuple[int, int]:
        """Bounds the rows of completions that look at one prompt, and the length of such a prompt."""
        return self.completions.rows, self.longest


def fill(
    whole: Sequence[int], prompts: Sequence[int], completions: Sequence[int], queries: Sequence[int]
) -> tuple[Shape, list[list[int]]]:
    """Returns the shape of a layout and the lengths of the segments, none 0, that are missing to it.

    Args:
        whole: lengths of sequences that share no prompt, at least 1 each.
        prompts: lengths of P prompts that several completions share.
        completions: rows of their completions.
        queries: the same, summed over each of the P groups.

    Returns:
        The shape, and four lists of lengths to append to the four arguments.
    """
    own = (whole, prompts, completions)
    segments = [_grown(len(x), n, 2) * 9 // 8 if x else 0 for x, n in zip(own, SEGMENTS, strict=True)]
    extra = [n - len(x) for n, x in zip(segments, own, strict=True)]
    # a prompt that is filling needs a row of completions that looks at it
    needed = extra[0], extra[1], max(extra[1:])
    rows = [_rows(sum(x) + n) if x else 0 for x, n in zip(own, needed, strict=True)]
    added = [_even(r - sum(x), n) for r, x, n in zip(rows, own, extra, strict=True)]
    longest = max((n for lengths in (*own, *added) for n in lengths), default=0)
    regions = (Region(r, n) for r, n in zip(rows, segments, strict=True))
    shape = Shape(*regions, longest=_grown(longest, LONGEST, 4))
    return shape, [*added, _even(rows[2] - sum(queries), extra[1])]


def _rows(least: int) -> int:
    """Returns 1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, ... times `ROWS`.

    From 8 on there are four sizes to a power of 2. Below they are coarser: rows cost little there, in a model
    so small that it runs as graphs.
    """
    if least <= ROWS:
        return ROWS
    below = 1 << ((least - 1).bit_length() - 1)  # the power of 2 below
    step = max(ROWS, min(below // 2, 2 * ROWS), below // 4)
    return -(-least // step) * step


def _grown(least: int, size: int, factor: int) -> int:
    while size < least:
        size *= factor
    return size


def _even(rows: int, segments: int) -> list[int]:
    return [rows // segments + (i < rows % segments) for i in range(segments)]
