"""A tiny run in forked processes that can be killed at every file operation of a save, and what it leaves."""

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from commands import fork
from fits import data, long, module, rollout, trainer, vowels
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger

from grpo_lightning.checkpoints import AdapterCheckpointIO
from grpo_lightning.checkpoints import adapter_io as checkpoint
from grpo_lightning.checkpoints.newest import newest, resolve_last
from grpo_lightning.errors import ConfigError
from grpo_lightning.losses import AdaptiveEntropy, AdaptiveKL, LossConfig
from grpo_lightning.utils import checked_files as sealed

STEPS = 4
LOSSES = {
    "dapo": LossConfig("dapo"),
    "entropy": LossConfig("dapo", adaptive_entropy=AdaptiveEntropy(target=100.0, delta=0.1, max=0.6)),
    "kl": LossConfig("grpo", kl_coef=0.1, adaptive_kl=AdaptiveKL(target=1e-3, gain=0.5)),
}


class Kind(NamedTuple):
    """One way to train."""

    lora: bool = True
    accumulate: int = 1
    updates: int = 1
    loss: str = "dapo"
    ranks: int = 1
    save_last: bool | str = True


class Operations:
    """Counts the file operations of saves and removals; kills this process before number `kill_at`.

    A write is killed in its middle. `log` gets (operation, name) of each.
    """

    def __init__(self, kill_at: int | None = None, only_folder: Path | None = None) -> None:
        self.kill_at, self.folder, self.active = kill_at, only_folder, False
        self.log: list[tuple[str, str]] = []

    def install(self) -> None:
        """Hooks into this process for good."""
        sys.addaudithook(self._audit)
        fsync, write, own = os.fsync, sealed._Sink.write, self

        def counted_fsync(number: int) -> None:
            if own.active:
                own.count("fsync", os.readlink(f"/proc/self/fd/{number}"))
            fsync(number)

        def counted_write(sink: Any, content: Any) -> int:
            if own.count("write", sink.file.name, kill=False):
                sink.file.write(bytes(content[: len(content) // 2]))
                sink.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return write(sink, content)

        os.fsync, sealed._Sink.write = counted_fsync, counted_write
        for name in ("save_checkpoint", "remove_checkpoint", "guard"):
            setattr(AdapterCheckpointIO, name, self._watched(getattr(AdapterCheckpointIO, name)))
        checkpoint.replace_link = self._watched(checkpoint.replace_link)

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            before, self.active = self.active, True
            try:
                return function(*args, **kwargs)
            finally:
                self.active = before

        return run

    def count(self, operation: str, name: Any, kill: bool = True) -> bool:
        """Notes an operation; returns whether it is the one to die at."""
        if not self.active:
            return False
        self.log.append((operation, Path(os.fsdecode(name)).name))
        due = len(self.log) - 1 == self.kill_at
        if due and kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return due

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open" and isinstance(args[0], str | bytes):
            if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.count("open", args[0])
        elif event in {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink"}:
            self.count(event.removeprefix("os."), args[1] if event == "os.rename" else args[0])


class Lines(Callback):
    """Appends what happens to a file, a line each, as it happens."""

    def __init__(self, file: Path, launch: int) -> None:
        self.launch, self.rank = launch, int(os.environ.get("RANK", "0"))
        self.number = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, **fields: Any) -> None:
        line = json.dumps({"launch": self.launch, "rank": self.rank, **fields}) + "\n"
        os.write(self.number, line.encode())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch.micro_batch == 0:
            step = (trainer.fit_loop.epoch_loop.total_batch_idx, self.rank)
            self.write(what="samples", step=str(step), values={"samples": repr(batch.samples)})


class LineLogger(Logger):
    """Logs into `Lines`."""

    name, version = "lines", 0

    def __init__(self, lines: Lines) -> None:
        super().__init__()
        self.lines = lines

    def log_metrics(self, metrics, step=None):
        if self.lines.rank == 0:
            self.lines.write(what="metrics", step=str(step), values={k: repr(v) for k, v in metrics.items()})

    def log_hyperparams(self, *args, **kwargs):
        pass


def train(model: str, kind: Kind, root: Path, launch: int, resume: bool) -> None:
    """Trains to the end, from the newest checkpoint if there is one."""
    lines = Lines(root / "lines.jsonl", launch)
    saver = ModelCheckpoint(
        root / "ckpt", filename="{step}", every_n_train_steps=1, save_last=kind.save_last, save_top_k=1
    )
    ranks = {"devices": kind.ranks, "strategy": "ddp"} if kind.ranks > 1 else {}
    t = trainer(
        root,
        rollout(updates_per_rollout=kind.updates, reward_funcs=[vowels, long]),
        saver,
        lines,
        max_steps=STEPS,
        accumulate_grad_batches=kind.accumulate,
        logger=LineLogger(lines),
        **ranks,
    )
    path = None
    if resume:
        try:
            path = str(resolve_last(t))
        except ConfigError:  # killed before the first checkpoint
            path = None
    changes = {} if kind.lora else {"lora": None}
    m = module(model, loss=LOSSES[kind.loss], **changes)
    seed = 1000 + launch if path else 0
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    start = 0 if path is None else sealed.peek(Path(path)).step
    lines.write(what="start", step=str(launch), values={"from": start})
    t.fit(m, data(), ckpt_path=path)
    if t.global_step == STEPS:
        lines.write(what="end", step=str(launch), values={})


def launch(
    model: str, kind: Kind, root: Path, number: int, *, resume: bool, operations: Operations | None = None
) -> list[int]:
    """Forks a process per rank; returns their ids. Rank 0 counts, or dies at, `operations`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(kind.ranks):
        pid = fork()
        if pid == 0:
            _child(model, kind, root, number, resume, rank, port, operations)
        pids.append(pid)
    return pids


def _child(model, kind, root, number, resume, rank, port, operations):
    out = os.open(root / f"{number}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if kind.ranks > 1:  # as torchrun does
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
        os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(kind.ranks), "GROUP_RANK": "0"}
        os.environ |= {"LOCAL_WORLD_SIZE": str(kind.ranks), "TORCHELASTIC_RUN_ID": "soak"}
    code = 1
    try:
        if operations is not None and rank == 0:
            operations.install()
        train(model, kind, root, number, resume)
        if operations is not None and rank == 0:
            (root / "operations.json").write_text(json.dumps(operations.log))
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(pids: list[int], seconds: float = 120.0) -> list[int]:
    """Returns exit codes; once one rank has failed the others get 2 s, as under a launcher."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(done[1])
                if codes[pid] != 0:
                    deadline = min(deadline, time.monotonic() + 2)
        if time.monotonic() > deadline:
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.003)
    return [codes[pid] for pid in pids]


def same(a: Any, b: Any, where: str = "") -> list[str]:
    """Returns where two nests of plain values and tensors differ by a bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [d for k in a for d in same(a[k], b[k], f"{where}/{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{where}: length"]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in same(x, y, f"{where}/{i}")]
    return [] if type(a) is type(b) and repr(a) == repr(b) else [where]


def lines_of(root: Path) -> list[dict[str, Any]]:
    """Returns what all launches wrote; a kill may leave half a line."""
    out = []
    for line in (root / "lines.jsonl").read_text().splitlines():
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return out


def final(root: Path) -> dict[str, Any]:
    """Returns the content of the newest checkpoint, without the paths that ModelCheckpoint remembers.

    A run that is killed between its last step's checkpoint and `last` is over when it is resumed: Lightning
    writes no `last` then.
    """
    file = newest([root / "ckpt"]).file
    assert file is not None
    content = sealed.load_sealed(file)
    content["callbacks"] = {k: v for k, v in content["callbacks"].items() if "ModelCheckpoint" not in k}
    return content
