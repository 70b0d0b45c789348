"""Where the seconds of an optimizer step go."""

from collections.abc import Mapping
from time import perf_counter

import torch


class Clock:
    """Times optimizer steps by phase, and the rollout that feeds them.

    A step lasts from the start of its first micro-batch, the rollout included, to the end of its last.
    Validation, checkpoints and data loading between two steps belong to neither. What began in another
    process, before a resume, is not timed.
    """

    def __init__(self) -> None:
        self._phases: dict[str, float] = {}
        self._step_began: float | None = None
        self._training_since = 0.0
        self._tokens: float | None = None
        self._rollout_seconds = 0.0

    def begin_step(self) -> None:
        """Starts a step."""
        self._phases = {}
        self._step_began = perf_counter()

    def add_rollout(self, metrics: Mapping[str, float], tokens: float) -> None:
        """Takes the phases `time/*` of the rollout that this step has made, and its tokens."""
        self._phases = {k: s for k, s in metrics.items() if k.startswith("time/") and k != "time/rollout"}
        self._tokens, self._rollout_seconds = tokens, 0.0

    def begin_training(self) -> None:
        """Says that a micro-batch is about to train."""
        self._training_since = perf_counter()

    def end_training(self, device: torch.device | None) -> None:
        """Says that a micro-batch has been trained on; a device is waited for, since kernels run on."""
        if device is not None and device.type != "cpu":
            torch.accelerator.synchronize(device)
        spent = perf_counter() - self._training_since
        self._phases["time/train"] = self._phases.get("time/train", 0.0) + spent

    def end_step(self) -> dict[str, float]:
        """Returns the seconds of the step, and those of its phases that only now are known."""
        if self._step_began is None:
            return {}
        seconds = perf_counter() - self._step_began
        self._step_began = None
        self._rollout_seconds += seconds
        rest = seconds - sum(self._phases.values())
        return {"step_time": seconds, "time/train": self._phases["time/train"], "time/other": rest}

    def end_rollout(self) -> dict[str, float]:
        """Returns tokens per second over all steps of the rollout."""
        if self._tokens is None:
            return {}
        rate, self._tokens = self._tokens / self._rollout_seconds, None
        return {"tokens_per_second": rate}
