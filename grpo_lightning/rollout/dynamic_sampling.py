"""Group by group: rewards beside decoding, and another prompt in the slot of a group without signal.

A slot holds the first of its candidates whose rewards differ, else the last. Candidates are a function of
seed and rollout, so a rollout does not depend on which group happens to end first.
"""

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import partial

from grpo_lightning.engines.base import Request
from grpo_lightning.engines.session import Session
from grpo_lightning.rewards.suite import Scores
from grpo_lightning.rollout.background import Background
from grpo_lightning.types import Completion, PromptBatch

Score = Callable[[PromptBatch, list[Completion]], tuple[list[str], Scores]]


@dataclass(slots=True)
class GroupSlot:
    """One of the P groups of a rollout."""

    candidates: list[PromptBatch]
    """one prompt each, in the order in which they are tried"""
    tried: int = 0
    request: Request | None = None
    completions: list[Completion] = field(default_factory=list[Completion])
    texts: list[str] = field(default_factory=list[str])
    scores: Scores | None = None

    @property
    def prompt(self) -> PromptBatch:
        """The candidate that is being tried, or was taken."""
        return self.candidates[self.tried]

    @property
    def has_another(self) -> bool:
        """Whether a further candidate is left."""
        return self.tried + 1 < len(self.candidates)


def run_dynamic_sampling(
    slots: list[GroupSlot],
    session: Session,
    ask: Callable[[PromptBatch], Request],
    score: Score,
    silent: Callable[[GroupSlot], bool],
) -> int:
    """Fills every slot; returns how many groups without signal were replaced.

    Args:
        slots: with their candidates.
        session: decodes.
        ask: makes the request of a prompt.
        score: texts and rewards of a group; runs beside decoding, one group at a time.
        silent: whether a scored group says nothing about its members.
    """
    of_request: dict[int, GroupSlot] = {}
    waiting: dict[Future[tuple[list[str], Scores]], GroupSlot] = {}
    replaced = 0

    def request(asked: list[GroupSlot]) -> None:
        for slot in asked:
            slot.request = ask(slot.prompt)
            of_request[id(slot.request)] = slot
        session.add([p.request for p in asked if p.request is not None])

    rewards = Background("rewards")
    try:
        request(slots)
        while session.busy or waiting:
            for asked, completions in session.step() if session.busy else ():
                slot = of_request.pop(id(asked))
                slot.completions = completions
                waiting[rewards.submit(partial(score, slot.prompt, completions))] = slot
            done, _ = wait(waiting, 0 if session.busy else None, FIRST_COMPLETED)
            again: list[GroupSlot] = []
            for future in done:
                slot = waiting.pop(future)
                slot.texts, slot.scores = future.result()
                if slot.has_another and silent(slot):
                    slot.tried += 1
                    again.append(slot)
            replaced += len(again)
            if again:
                request(again)
    except BaseException:
        session.abort()
        for future in waiting:
            future.cancel()
        raise
    finally:
        rewards.close()
    return replaced
