"""Few shapes for many batches: how far the regions of a layout are filled up, so that a graph fits them."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

NEAR = 1.25
"""a known shape may have so many times the rows that a new one would have: a capture costs many steps"""


class Region(NamedTuple):
    """Room for segments of rows."""

    rows: int
    segments: int
    longest: int
    """segment, a power of 2"""

    @classmethod
    def around(cls, lengths: Sequence[int]) -> "Region":
        """Returns room for `lengths` and somewhat more; how many rows follows from their sum alone."""
        if not lengths:
            return cls(0, 0, 0)
        segments = -(-(len(lengths) + 4) // 8) * 8  # 4 to 11 more
        least = sum(lengths) * 33 // 32 + 11
        step = 1 << max(least.bit_length() - 5, 6)  # 16 sizes between a power of 2 and the next
        rows = -(-least // step) * step
        longest = max(*lengths, *_even(rows - sum(lengths), segments - len(lengths)))
        return cls(rows, segments, 1 << (longest * 3 // 2).bit_length())

    def filling(self, lengths: Sequence[int]) -> list[int] | None:
        """Returns the lengths of segments, none of them 0, that make it full; None if that cannot be."""
        rows, segments = self.rows - sum(lengths), self.segments - len(lengths)
        if rows == segments == 0:
            return []
        if not 0 < segments <= rows:
            return None
        added = _even(rows, segments)
        return None if max(added[0], *lengths, 0) > self.longest else added


class Shape(NamedTuple):
    """The regions of a layout, and its queries group by group, which are the rows of the completions."""

    whole: Region
    prompts: Region
    completions: Region
    queries: Region

    @classmethod
    def of(cls, *lengths: Sequence[int], known: Collection["Shape"]) -> "Shape":
        """Returns the least of the `known` shapes that hold segments of these `lengths`, or a new one."""
        new = cls(*map(Region.around, lengths))
        fit = [s for s in known if s.rows <= NEAR * new.rows and None not in s._fillings(lengths)]
        return min(fit, key=lambda s: s.rows, default=new)

    @property
    def rows(self) -> int:
        """T'."""
        return self.whole.rows + self.prompts.rows + self.completions.rows

    @property
    def longest_alone(self) -> tuple[int, int]:
        """The longest segment that looks at itself: queries, keys."""
        longest = max(self.whole.longest, self.prompts.longest, self.completions.longest)
        return longest, longest

    @property
    def longest_towards(self) -> tuple[int, int]:
        """The most rows of completions that look at one prompt, and the longest such prompt."""
        return self.queries.longest, self.prompts.longest

    def filling(self, *lengths: Sequence[int]) -> list[list[int]]:
        """Returns for each region the lengths of segments that make it full.

        Raises:
            ValueError: these segments do not fit.
        """
        found = [added for added in self._fillings(lengths) if added is not None]
        if len(found) < len(lengths):
            raise ValueError(f"segments of {[sum(own) for own in lengths]} rows do not fit {self}")
        return found

    def _fillings(self, lengths: Sequence[Sequence[int]]) -> list[list[int] | None]:
        return [region.filling(own) for region, own in zip(self, lengths, strict=True)]


def _even(rows: int, segments: int) -> list[int]:
    return [rows // segments + (i < rows % segments) for i in range(segments)]
