"""Groups of completions as they end: requests may join while others are still decoded."""

from collections.abc import Sequence
from typing import Protocol

from grpo_lightning.engines.base import Request, RolloutEngine
from grpo_lightning.types import Completion, SamplingParams

Ended = tuple[Request, list[Completion]]


class Session(Protocol):
    """One rollout's decoding. Engines that decode in one call need none: `BatchedSession` stands in."""

    @property
    def busy(self) -> bool:
        """Whether anything is still to be decoded."""
        ...

    def add(self, requests: Sequence[Request]) -> None:
        """Lets `requests` join."""
        ...

    def step(self) -> list[Ended]:
        """Decodes on; returns the groups that have ended meanwhile, in no particular order."""
        ...

    def abort(self) -> None:
        """Gives up what is still to be decoded."""
        ...


class BatchedSession:
    """A session over any engine: each step decodes, in one call, what has been added since the last."""

    def __init__(self, engine: RolloutEngine, sampling: SamplingParams) -> None:
        self._engine, self._sampling = engine, sampling
        self._waiting: list[Request] = []

    @property
    def busy(self) -> bool:
        """Whether anything waits for the next round."""
        return bool(self._waiting)

    def add(self, requests: Sequence[Request]) -> None:
        """Lets `requests` wait for the next round."""
        self._waiting += requests

    def step(self) -> list[Ended]:
        """Decodes all that wait."""
        todo, self._waiting = self._waiting, []
        return list(zip(todo, self._engine.generate(todo, self._sampling), strict=True))

    def abort(self) -> None:
        """Forgets what waits."""
        self._waiting.clear()


def open_session(engine: RolloutEngine, sampling: SamplingParams) -> Session:
    """Returns the engine's own session where it has one (a method `session`), else rounds."""
    own = getattr(engine, "session", None)
    return BatchedSession(engine, sampling) if own is None else own(sampling)
