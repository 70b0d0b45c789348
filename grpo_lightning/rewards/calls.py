"""Calls reward functions one after the other, the async ones together, each within its time."""

import asyncio
import inspect
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from grpo_lightning.rewards.arguments import NamedReward
from grpo_lightning.rewards.scores import RewardLog
from grpo_lightning.rewards.state_guard import state_kept
from grpo_lightning.rewards.time_limit import TimeLimitError, limited
from grpo_lightning.rewards.validation import Samples, failures_named

ASYNC_AT_ONCE = 32
"""async functions that run at the same time"""
_SLACK_S = 5.0
"""seconds by which an event loop may outlast the limit before it is taken to be blocked"""


def call_all(
    rewards: Sequence[NamedReward],
    copies: Mapping[str, Callable[[], Any]],
    log: RewardLog,
    samples: Samples,
    seconds: float | None,
    starting: Callable[[Sequence[str]], None],
) -> list[Any]:
    """Returns what each function returned.

    Args:
        rewards: [K] functions.
        copies: makes the arguments.
        log: takes what they log.
        samples: for error messages.
        seconds: each may take; None is no limit.
        starting: told the names of the functions that run next.

    Raises:
        ConfigError: raised by a function.
        RewardError: a function raises, or does not return in time.
    """
    seed = zlib.crc32("\0".join(samples.completions).encode(errors="replace"))
    results: list[Any] = []
    try:
        for reward in rewards:
            arguments = reward.pick({**copies, **log.receivers(reward.name)})
            starting([reward.name])
            with failures_named(reward.name, samples, seconds), state_kept(seed):
                results.append(limited(partial(reward.function, **arguments), seconds))
        waiting = {k: r for k, r in enumerate(results) if inspect.isawaitable(r)}
        if waiting:
            names = {k: rewards[k].name for k in waiting}
            starting(list(names.values()))
            with state_kept(seed):
                _finish(waiting, names, samples, seconds)
                results = [waiting.get(k, r) for k, r in enumerate(results)]
    finally:
        # Where another function has failed, coroutines are left that never start.
        for result in results:
            if inspect.iscoroutine(result) and inspect.getcoroutinestate(result) == inspect.CORO_CREATED:
                result.close()
    return results


def _finish(
    waiting: dict[int, Any], names: Mapping[int, str], samples: Samples, seconds: float | None
) -> None:
    """Replaces awaitables by their results, on an event loop of its own."""
    unfinished = dict(names)
    room = asyncio.Semaphore(ASYNC_AT_ONCE)

    async def finish(k: int, awaitable: Awaitable[Any]) -> None:
        async with room:
            with failures_named(names[k], samples, seconds):
                waiting[k] = await _awaited(awaitable, seconds)
            del unfinished[k]

    async def finish_all() -> None:
        await asyncio.gather(*(finish(k, awaitable) for k, awaitable in list(waiting.items())))

    loop_runs = True
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        loop_runs = False  # as a rule; Jupyter has one
    whole = None if seconds is None else seconds * -(-len(waiting) // ASYNC_AT_ONCE) + _SLACK_S
    try:
        limited(lambda: asyncio.run(finish_all()), whole, own_thread=loop_runs)
    except TimeLimitError:  # one of them blocks the loop, or does not let itself be cancelled
        with failures_named(" or ".join(unfinished.values()), samples, seconds):
            raise


async def _awaited(awaitable: Awaitable[Any], seconds: float | None) -> Any:
    task = asyncio.ensure_future(awaitable)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            raise TimeLimitError
        return task.result()
    finally:
        task.cancel()  # not waited for: a task may swallow it
