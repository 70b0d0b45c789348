"""What the options of a surrogate have in common; `LossConfig` inherits those of every row of ours."""

from dataclasses import dataclass
from typing import ClassVar

from grpo_lightning.utils.ranges import Bound, not_negative


@dataclass(frozen=True, kw_only=True)
class SurrogateOptions:
    """Options that belong to one surrogate, or to a few of one kind; each is a key of `model.loss`."""

    may_be_infinite: ClassVar[tuple[str, ...]] = ()
    """names of those that infinity switches off"""

    def bounds(self) -> list[Bound]:
        """Returns what each option has to be; a row is (name, whether it is, what it must be)."""
        return []


@dataclass(frozen=True, kw_only=True)
class ClipOptions(SurrogateOptions):
    """How a ratio is clipped.

    Args:
        clip_low: the ratio is clipped below at 1 - clip_low; 1 does not clip.
        clip_high: the ratio is clipped above at 1 + clip_high.
        dual_clip: cap on the ratio where the advantage is negative; must exceed 1 + clip_high.
    """

    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    may_be_infinite: ClassVar[tuple[str, ...]] = ("clip_high", "dual_clip")

    @property
    def clip_range(self) -> tuple[float, float]:
        """`clip_low` and `clip_high` of a resolved config."""
        assert self.clip_low is not None
        assert self.clip_high is not None
        return self.clip_low, self.clip_high

    def bounds(self) -> list[Bound]:
        """Returns what each option has to be."""
        low, high = self.clip_range
        above = f"null or above 1 + clip_high = {1 + high:g}, or it would also cut positive advantages"
        return [
            ("clip_low", 0 <= low <= 1, "in [0, 1]; 1 does not clip below"),
            *not_negative(self, "clip_high"),
            ("dual_clip", self.dual_clip is None or self.dual_clip > 1 + high, above),
        ]
