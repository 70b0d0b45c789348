"""`grpo-lightning` as a process of its own, forked from one that has imported what takes seconds."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import tqdm.asyncio
import tqdm.auto


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


class Running(NamedTuple):
    """A command on its way; `pid` takes signals."""

    pid: int
    cwd: Path

    def wait(self) -> Ended:
        """Returns how it ends."""
        code = _answer("wait", self.pid)
        return Ended(code, (self.cwd / ".out").read_text(), (self.cwd / ".err").read_text())


def started(*args: str, cwd: Path, **environment: str) -> Running:
    """Starts `grpo-lightning ARGS` in `cwd`, offline and without a GPU."""
    files = [str(cwd / ".out"), str(cwd / ".err")]
    return Running(_answer("start", args, str(cwd), environment, *files), cwd)


def command(*args: str, cwd: Path, **environment: str) -> Ended:
    """Runs it to its end."""
    return started(*args, cwd=cwd, **environment).wait()


def small_config(
    folder: Path, model: Any, reward: str, max_steps: int, *callbacks: dict, chat: bool = False, **saver: Any
) -> dict[str, Any]:
    """Writes 12 rows into `folder`; returns a config of seconds that saves into `folder`/ckpt.

    Args:
        folder: of the run.
        model: a folder.
        reward: a reward function.
        max_steps: optimizer steps.
        callbacks: beside ModelCheckpoint.
        chat: prompts are messages.
        saver: arguments of ModelCheckpoint.
    """
    texts = [f"say {i}" for i in range(12)]
    prompts = [[{"role": "user", "content": t}] for t in texts] if chat else texts
    rows = [{"prompt": p, "answer": str(i)} for i, p in enumerate(prompts)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    saver = {"dirpath": str(folder / "ckpt"), **saver}
    return {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": max_steps,
            "default_root_dir": str(folder / "run"),
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saver},
                *callbacks,
            ],
        },
        "model": {
            "model_name": str(model),
            "lora": {"r": 4},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
        "data": {"dataset": str(folder / "rows.jsonl"), "prompts_per_rollout": 4},
        "rollout": {
            "num_generations": 4,
            "sampling": {"max_tokens": 6},
            "reward_funcs": [reward],
        },
    }


def fork() -> int:
    """Returns as `os.fork`; the child ends with this process, so that a test that fails leaves nothing.

    The child's progress bars get a lock of their own: tqdm's is shared by all forks, and a process that is
    killed inside it would leave every other one waiting.
    """
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        lock = threading.RLock()
        for bars in (tqdm.std.tqdm, tqdm.asyncio.tqdm, tqdm.auto.tqdm):  # each may have one
            bars.set_lock(lock)
    return child


def leave_with(main: Callable[[list[str]], int], argv: list[str]) -> NoReturn:
    """Ends this forked process as `grpo-lightning ARGV` ends."""
    code = 1
    try:
        code = main(argv)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _answer(*request: Any) -> int:
    server = _server()
    print(json.dumps(request), file=server.stdin, flush=True)
    return int(server.stdout.readline())


@cache
def _server() -> Any:
    """Starts the process once; it ends with its input."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )


def _serve() -> None:
    """Forks where a line of the input says so, and answers with a pid; else with an exit code."""
    del sys.path[0]  # this folder
    import grpo_lightning.cli.main  # noqa: F401
    from grpo_lightning.__main__ import main

    for line in sys.stdin:
        what, args, *rest = json.loads(line)
        if what == "wait":
            print(os.waitstatus_to_exitcode(os.waitpid(args, 0)[1]), flush=True)
            continue
        cwd, environment, *files = rest
        child = fork()
        if child == 0:
            os.chdir(cwd)
            os.environ.update(environment)
            for number, file in enumerate(files, start=1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            leave_with(main, args)
        print(child, flush=True)


if __name__ == "__main__":
    _serve()


def run_ranks(script, out, *args, timeout=400):
    """Runs `script`, which starts its own ranks and saves `result.pt` in `out`; returns what it saved."""
    import torch

    out.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    given = [sys.executable, str(script), *map(str, args)]
    done = subprocess.run(given, capture_output=True, text=True, timeout=timeout, env=env, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return torch.load(out / "result.pt", weights_only=True)
