"""Into how many micro-batches an optimizer step is cut: as few as fit into the device's memory.

A GPU that waits for launches runs few large micro-batches faster than many small ones. How large they may be
is learned: the first optimizer step takes the most, and every micro-batch that trains shows what it needs.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import lightning.pytorch as pl
import torch

from grpo_lightning.errors import ConfigError
from grpo_lightning.metrics.logging import gather
from grpo_lightning.packing.batch import RolloutBatch
from grpo_lightning.packing.geometry import SequenceLayout
from grpo_lightning.rollout.trained_module import TrainsOnRollouts

FRACTION = 0.85
"""of the available memory that a prediction may fill; the rest is for fragments"""
KEPT = 32
"""micro-batches that an estimate remembers"""
SPREAD = 1.5
"""how many times larger one micro-batch must be than another to tell a constant from noise"""

Sizes = tuple[int, ...]
"""what memory grows with, of one micro-batch: see `Policy.sizes`"""


def check_micro_batches(wanted: int | str, most: int | None = None) -> None:
    """Raises ConfigError unless `wanted` is auto, all, or a number from 1 to `most`."""
    if wanted in ("auto", "all"):
        return
    if isinstance(wanted, int) and not isinstance(wanted, bool) and 1 <= wanted <= (most or wanted):
        return
    limit = "" if most is None else f"; trainer.accumulate_grad_batches is {most}"
    raise ConfigError(
        f"rollout.micro_batches is {wanted!r}{limit}; it must be auto, all, or a number from 1 to "
        "trainer.accumulate_grad_batches: take auto, or raise trainer.accumulate_grad_batches"
    )


class Estimate:
    """Bounds what a micro-batch needs by what others needed; knows sizes and bytes, and no device.

    A micro-batch of sizes x_f needs c + sum_f a_f x_f bytes, with unknown c, a_f >= 0. Hence one that was
    seen with P bytes bounds every other by
        P' <= c + r (P - c),  r = max(1, max_f x'_f / x_f),
    and two that were seen prove a constant, such as the logits of one chunk:
        c >= (q P1 - P2) / (q - 1),  q = min_f x2_f / x1_f.
    Until two of unequal sizes have been seen c counts as 0, which only raises the bound.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[Sizes, int]] = []
        self.constant = 0.0

    def predict(self, sizes: Sizes) -> float | None:
        """Returns the least bound in bytes, or None before anything was seen."""
        return min((self._bound(sizes, seen) for seen in self.seen), default=None)

    def observe(self, sizes: Sizes, needed: int) -> None:
        """Takes in what a micro-batch needed, in bytes, and forgets what has promised less."""
        honest = [seen for seen in self.seen if self._bound(sizes, seen) >= needed]
        self.seen = [*honest[1 - KEPT :], (sizes, needed)]
        proved = [
            (q * small - large) / (q - 1)
            for x1, small in self.seen
            for x2, large in self.seen
            if (q := min(_ratios(x2, x1))) >= SPREAD
        ]
        self.constant = min(max(0.0, *proved), *(float(n) for _, n in self.seen)) if proved else 0.0

    def _bound(self, sizes: Sizes, seen: tuple[Sizes, int]) -> float:
        return self.constant + max(1.0, *_ratios(sizes, seen[0])) * (seen[1] - self.constant)


def _ratios(sizes: Sizes, others: Sizes) -> list[float]:
    return [a / max(b, 1) for a, b in zip(sizes, others, strict=True)]


class Meter(Protocol):
    """Reads a device's memory, in bytes."""

    def begin(self) -> None:
        """Starts to watch a micro-batch."""
        ...

    def needed(self) -> int:
        """Returns the most that was held since `begin`, beyond what stays between optimizer steps."""
        ...

    def available(self) -> int:
        """Returns how much a micro-batch may take now."""
        ...


class CudaMeter:
    """Reads torch's allocator. Gradients count as needed, not as held: every optimizer step frees them.

    `begin` resets the device's peak statistics, as `torch.cuda.reset_peak_memory_stats` does.
    """

    def __init__(self, device: torch.device, params: Iterable[torch.Tensor]) -> None:
        self.device, self.params = device, list(params)
        self._held = 0

    def _gradients(self) -> int:
        return sum(p.grad.nbytes for p in self.params if p.grad is not None)

    def begin(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)
        self._held = torch.cuda.memory_allocated(self.device) - self._gradients()

    def needed(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self._held

    def available(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + cached + self._gradients()


METERS: dict[str, Callable[[torch.device, Iterable[torch.Tensor]], Meter]] = {"cuda": CudaMeter}
"""by type of device; without one `auto` is `all`"""


class MicroBatchSizer:
    """Decides the number of micro-batches of an optimizer step, and checks the estimate as they run.

    What it learns is not saved: a resumed run learns again, and gradients do not depend on the number.

    Args:
        wanted: rollout.micro_batches.
        most: trainer.accumulate_grad_batches.
        policy: has `sizes`.
        meter: of its device; None cuts into `most` where `wanted` is auto.
    """

    def __init__(self, wanted: int | str, most: int, policy: Any = None, meter: Meter | None = None) -> None:
        self.wanted, self.most, self.policy, self.meter = wanted, most, policy, meter
        self.fixed = wanted if isinstance(wanted, int) else most
        self.estimate = Estimate()
        self._running: Sizes | None = None
        self._metrics: dict[str, float] = {}

    @classmethod
    def of(cls, wanted: int | str, trainer: pl.Trainer, module: TrainsOnRollouts) -> "MicroBatchSizer":
        """Returns the one for a fit; it meters where that can change something and the gradient stays."""
        most = trainer.accumulate_grad_batches
        make = METERS.get(module.device.type) if wanted == "auto" and most > 1 else None
        if make is None or not module.loss.split_invariant or module.policy.graphs is not None:
            return cls(wanted, most)
        return cls(wanted, most, module.policy, make(module.device, module.policy.trainable().values()))

    def count(self, shape: SequenceLayout, *, whole_groups: bool) -> int:
        """Returns how many micro-batches `shape` is cut into: the most that any rank needs."""
        if self.meter is None:
            return self.fixed
        room = FRACTION * self.meter.available()
        fitting = (n for n in range(1, self.most) if self._peak(shape, n, whole_groups) <= room)
        return max(gather(next(fitting, self.most)))

    def _peak(self, shape: SequenceLayout, n: int, whole_groups: bool) -> float:
        layouts = [shape.take(own) for own in shape.split(n, whole_groups=whole_groups) if own]
        bounds = [self.estimate.predict(self.policy.sizes(layout)) for layout in layouts]
        return max((float("inf") if b is None else b for b in bounds), default=0.0)

    def begin(self, micro_batch: RolloutBatch) -> None:
        """Says that `micro_batch` is about to train."""
        self._running = None
        if self.meter is None or not any(micro_batch.lengths):
            return
        self._running = sizes = self.policy.sizes(micro_batch.sequence_layout)
        self._note("predicted", self.estimate.predict(sizes))
        self.meter.begin()

    def end(self) -> None:
        """Says that the backward of the micro-batch is done."""
        if self.meter is None or self._running is None:
            return
        needed = self.meter.needed()
        self.estimate.observe(self._running, needed)
        self._note("peak", needed)
        self._running = None

    def _note(self, name: str, value: float | None) -> None:
        if value is not None:
            key = f"memory/{name}_gib"
            self._metrics[key] = max(self._metrics.get(key, 0.0), value / 2**30)

    def metrics(self) -> dict[str, float]:
        """Returns the largest need of the step's micro-batches, predicted and measured, and starts anew."""
        found, self._metrics = self._metrics, {}
        return found


def cut(step: RolloutBatch, n: int, most: int, *, whole_groups: bool) -> list[RolloutBatch]:
    """Returns `most` micro-batches of which at most `n` hold tokens.

    The others come first: gradients are there, and counted, when the first one runs, and reductions over
    ranks overlap with the backward of the last.
    """
    return [step.take([])] * (most - n) + step.split(n, whole_groups=whole_groups)
