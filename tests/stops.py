"""Runs of the command line that wait to be stopped: at call AT of an engine or a reward they hang."""

import time
from pathlib import Path

import yaml
from commands import command, small_config, started

MINE = '''
import asyncio, os, sys, time
from collections.abc import Sequence
from pathlib import Path
from lightning.pytorch.callbacks import Callback
from grpo_lightning.errors import EngineError
from grpo_lightning.engines import HFEngine
from grpo_lightning.engines.base import Request
from grpo_lightning.types import Completion, SamplingParams

CALLS = 0
AT = int(os.environ.get("AT", "0"))


def now():
    global CALLS
    CALLS += 1
    if CALLS == AT and os.environ.get("RANK_AT", "0") == os.environ.get("LOCAL_RANK", "0"):
        Path("here").write_text(str(os.getpid()))
        return True
    return False


def score(completions):
    return [sum(c in "aeiou" for c in str(text)) / 8 for text in completions]


def plain(completions, **_):
    return score(completions)


def sleeps(completions, **_):
    if now():
        time.sleep(1000)
    return score(completions)


def busy(completions, **_):
    if now():
        while True:
            pass
    return score(completions)


def stubborn(completions, **_):
    while now() or CALLS == AT:
        try:
            time.sleep(1000)
        except BaseException:
            pass
    return score(completions)


async def waits(completions, **_):
    if now():
        await asyncio.sleep(1000)
    return score(completions)


def exits(completions, **_):
    if now():
        sys.exit(0)
    return score(completions)


def interrupts(completions, **_):
    if now():
        raise KeyboardInterrupt
    return score(completions)


def cancels(completions, **_):
    if now():
        raise asyncio.CancelledError
    return score(completions)


async def cancels_itself(completions, **_):
    if now():
        raise asyncio.CancelledError
    return score(completions)


def fails(completions, **_):
    if now():
        raise ValueError("no such answer")
    return score(completions)


def seeds(completions, **_):
    import random
    from lightning.pytorch import seed_everything
    seed_everything(CALLS + 100)
    os.environ["PL_GLOBAL_SEED"] = str(CALLS)
    now()
    return score(completions)


class Slow(HFEngine):
    """Hangs where no library looks at a flag."""

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[list[Completion]]:
        if now():
            time.sleep(1000)
        return super().generate(requests, sampling)


class Long(HFEngine):
    """Decodes on and on."""

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[list[Completion]]:
        if now():
            from dataclasses import replace
            sampling = replace(sampling, max_tokens=10**6, temperature=1.0)
            self._policy.eos_ids.clear()
        return super().generate(requests, sampling)


class Dies(HFEngine):
    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[list[Completion]]:
        if now():
            raise EngineError("the engine is dead")
        return super().generate(requests, sampling)

    def close(self) -> None:
        Path("closed").touch()
        super().close()


def rows():
    if now():
        sys.exit(0)
    return [{"prompt": f"say {i}"} for i in range(12)]


class Leaves(Callback):
    def on_train_batch_end(self, *_):
        if now():
            sys.exit(0)


class Interrupts(Callback):
    def on_train_batch_end(self, *_):
        if now():
            raise KeyboardInterrupt


class Fails(Callback):
    def on_before_optimizer_step(self, *_):
        if now():
            raise ValueError("a callback failed")


class Constructed(Callback):
    def __init__(self):
        sys.exit(0)
'''


def config(model, folder: Path, **changes) -> dict:
    """Writes `mine.py` and `rows.jsonl` into `folder`; returns a config with `changes`, keys joined by __."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.py").write_text(MINE)
    report = {"class_path": "grpo_lightning.callbacks.RunReport", "init_args": {"curve": None}}
    out = small_config(folder, model, f"{folder / 'mine.py'}:plain", 4, report, every_n_train_steps=1000)
    for key, value in changes.items():
        *path, last = key.split("__")
        place = out
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(out))
    return out


def fit(folder: Path, *args: str, **environment: str):
    """Runs the config of `folder` to its end."""
    return command("fit", "--config", "config.yaml", *args, cwd=folder, **environment)


def begun(folder: Path, *args: str, seconds: float = 120, **environment: str):
    """Starts it, and returns it once it has left its mark."""
    (folder / "here").unlink(missing_ok=True)
    run = started("fit", "--config", "config.yaml", *args, cwd=folder, **environment)
    wait_for(folder / "here", seconds, folder / ".err")
    return run


def wait_for(path: Path, seconds: float = 120, said: Path | None = None) -> str:
    """Returns what a file says, once it is there."""
    deadline = time.monotonic() + seconds
    while not path.is_file() or not path.read_text():
        assert time.monotonic() < deadline, said.read_text() if said else f"{path} did not come"
        if said is not None and said.is_file():
            assert "\nerror: " not in said.read_text(), said.read_text()
        time.sleep(0.01)
    return path.read_text()


def adapter(folder: Path) -> bytes:
    """Returns what a finished run has learned."""
    return (folder / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
