"""`rollout.reward_workers`: reward functions in processes that are killed where they hang."""

import json
import pickle
import time
from collections import deque
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from grpo_lightning.errors import ConfigError, RewardError
from grpo_lightning.rewards.process import Process, ProcessEndedError
from grpo_lightning.rewards.resolve import RewardSpec
from grpo_lightning.rewards.scores import Scores
from grpo_lightning.rewards.validation import Samples, late

_START_S = 600.0
"""seconds that importing the functions may take"""
ERRORS = {"ConfigError": ConfigError, "RewardError": RewardError}


class RewardWorkers:
    """n processes that hold the reward functions of a run.

    They start with the first call, without the secrets of the environment, and end with this process.

    Args:
        specs: what `Rewards` got; the processes import it anew.
        weights: [K].
        count: n.
        seconds: that one function may take for one call; None is no limit.

    Raises:
        ConfigError: a function cannot be imported by another process.
    """

    def __init__(
        self, specs: Sequence[RewardSpec], weights: Sequence[float], count: int, seconds: float | None
    ) -> None:
        for spec in specs:
            _check_importable(spec)
        setup = {"specs": list(specs), "weights": list(weights)}
        self._processes = [
            Process("grpo_lightning.rewards.worker_scoring:scorer", setup) for _ in range(count)
        ]
        self._seconds = seconds

    def score(self, calls: Sequence[Mapping[str, Any]]) -> list[Scores]:
        """Returns the scores of several calls of `Rewards.score`, given by their arguments.

        Raises:
            RewardError: a function fails, does not return in time, or its process ends; the processes that
                are at work are ended.
            ConfigError: raised by a function.
        """
        waiting, idle = deque(enumerate(calls)), deque(self._processes)
        at_work: dict[Connection, _Call] = {}
        scores: dict[int, Scores] = {}
        try:
            while waiting or at_work:
                while waiting and idle:
                    index, call = waiting.popleft()
                    process = idle.popleft()
                    at_work[process.send(call)] = _Call(process, index, call)
                first = min(call.deadline for call in at_work.values())
                patience = None if first == float("inf") else max(0.0, first - time.monotonic())
                for connection in wait(list(at_work), patience):
                    assert isinstance(connection, Connection)
                    call = at_work[connection]
                    done = call.heard(json.loads(call.process.receive(connection)), self._seconds)
                    if done is not None:
                        scores[call.index] = done
                        idle.append(at_work.pop(connection).process)
                for call in at_work.values():
                    if call.deadline <= time.monotonic():
                        raise call.late(self._seconds)
        except ProcessEndedError as ended:
            raise RewardError(f"a reward worker ended: {ended}; {_doing(at_work)}") from ended
        finally:
            for call in at_work.values():
                call.process.kill()
        return [scores[index] for index in range(len(calls))]

    def close(self) -> None:
        """Ends the processes; a later call starts them anew."""
        for process in self._processes:
            process.kill()

    @property
    def count(self) -> int:
        """The number of processes, n."""
        return len(self._processes)

    @property
    def pids(self) -> list[int | None]:
        """The ids of the processes, None for one that has not started."""
        return [process.pid for process in self._processes]


class _Call:
    """One request that a process is at work on."""

    def __init__(self, process: Process, index: int, arguments: Mapping[str, Any]) -> None:
        self.process, self.index = process, index
        self.names: list[str] = []
        self.samples = Samples(arguments["prompts"], arguments["completions"], arguments["columns"])
        self.deadline = time.monotonic() + _START_S

    def heard(self, message: dict[str, Any], seconds: float | None) -> Scores | None:
        """Takes a message of the process; returns the scores if it holds them."""
        if "error" in message:
            raise ERRORS[message["error"]](message["text"])
        if "scores" in message:
            return Scores(**message["scores"])
        self.names = message["starting"]
        self.deadline = float("inf") if seconds is None else time.monotonic() + seconds
        return None

    def late(self, seconds: float | None) -> RewardError:
        """Returns the error of a call whose time is over."""
        if not self.names or seconds is None:
            return RewardError(
                f"a reward worker took longer than {_START_S:g} s to import the reward functions"
            )
        return late(" or ".join(self.names), self.samples, seconds)


def _doing(at_work: Mapping[Any, _Call]) -> str:
    names = sorted({name for call in at_work.values() for name in call.names})
    samples = next((call.samples for call in at_work.values()), None)
    what = f"at work were {', '.join(map(repr, names))}" if names else "it had called no function yet"
    return f"{what} (see above for what it printed)" + ("" if samples is None else f"{samples.show(0)}")


def _check_importable(spec: RewardSpec) -> None:
    if isinstance(spec, str | Mapping):
        return
    home = getattr(getattr(spec, "func", spec), "__module__", None) or type(spec).__module__
    reason = "it is defined in the script or notebook that runs" if home == "__main__" else ""
    try:
        pickle.dumps(spec)
    except Exception as error:  # pickle raises whatever an object's own methods raise
        reason = reason or f"{type(error).__name__}: {error}"
    if reason:
        raise ConfigError(
            f"rollout.reward_workers: another process cannot import the reward function {spec!r}: {reason}; "
            "move it to the top level of a module and name it as 'package.module.name' or 'file.py:name', "
            "or set rollout.reward_workers to 0"
        )
