"""Which checkpoint `last` is, and who may write where."""

import os
import signal
import subprocess
import time

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from grpo_lightning.checkpoints import AdapterCheckpointIO
from grpo_lightning.checkpoints.newest import newest, resolve_last
from grpo_lightning.checkpoints.run_lock import RunLock
from grpo_lightning.errors import CheckpointError, ConfigError
from grpo_lightning.utils.atomic_files import remove_strays, temporary


def content(step, **changes):
    return {"global_step": step, "state_dict": {"w": torch.ones(3)}, "optimizer_states": [], **changes}


def trainer(folder, **changes):
    savers = [ModelCheckpoint(folder, save_last=True)] if folder else []
    return pl.Trainer(callbacks=savers, logger=False, accelerator="cpu", **changes)


def damage(file):
    found = bytearray(file.read_bytes())
    found[len(found) // 2] ^= 1
    file.write_bytes(found)


def test_the_step_inside_counts_and_not_the_time_of_the_file(tmp_path):
    io = AdapterCheckpointIO()
    for step, name in ((1, "b"), (3, "a"), (2, "c")):
        io.save_checkpoint(content(step), tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", (1e9 - step, 1e9 - step))
    assert newest([tmp_path])[:2] == (tmp_path / "a.ckpt", 3)
    io.save_checkpoint(content(3), tmp_path / "last.ckpt")
    assert newest([tmp_path]).file == tmp_path / "last.ckpt"


def test_a_later_launch_is_newer_than_a_higher_step(tmp_path, monkeypatch):
    """A run begun anew, or resumed from an older checkpoint, leaves files of later steps behind."""
    first = AdapterCheckpointIO()
    first.save_checkpoint(content(9), tmp_path / "step=9.ckpt")
    second = AdapterCheckpointIO()
    monkeypatch.setattr(time, "time_ns", lambda: 1)  # another host, whose clock is behind
    second.load_checkpoint(tmp_path / "step=9.ckpt")
    second.save_checkpoint(content(4), tmp_path / "step=4.ckpt")
    assert newest([tmp_path])[:2] == (tmp_path / "step=4.ckpt", 4)


def test_files_of_other_programs_are_older(tmp_path):
    torch.save(content(9), tmp_path / "theirs.ckpt")
    assert newest([tmp_path])[:2] == (tmp_path / "theirs.ckpt", 9)
    AdapterCheckpointIO().save_checkpoint(content(2), tmp_path / "ours.ckpt")
    assert newest([tmp_path])[:2] == (tmp_path / "ours.ckpt", 2)


def test_weights_alone_cannot_be_resumed(tmp_path):
    io = AdapterCheckpointIO()
    io.save_checkpoint(content(1), tmp_path / "a.ckpt")
    io.save_checkpoint({"global_step": 2, "state_dict": {}}, tmp_path / "best.ckpt")
    assert newest([tmp_path]).file == tmp_path / "a.ckpt"
    assert newest([tmp_path], fit=False).file == tmp_path / "best.ckpt"


def test_a_damaged_last_is_named_and_the_next_one_taken(tmp_path, recwarn):
    io = AdapterCheckpointIO()
    for step in (1, 2, 3):
        io.save_checkpoint(content(step), tmp_path / f"step={step}.ckpt")
    io.save_checkpoint(content(3), tmp_path / "last.ckpt")
    assert resolve_last(trainer(tmp_path)) == tmp_path / "last.ckpt"
    assert not [w for w in recwarn if "ckpt_path" in str(w.message)]
    damage(tmp_path / "last.ckpt")
    (tmp_path / "step=3.ckpt").write_bytes(b"PK")
    assert resolve_last(trainer(tmp_path)) == tmp_path / "step=2.ckpt"
    told = " ".join(str(w.message) for w in recwarn)
    assert f"{tmp_path}/last.ckpt is damaged" in told
    assert f"{tmp_path}/step=3.ckpt is truncated" in told
    assert f"taking {tmp_path}/step=2.ckpt of step 2" in told
    for file in tmp_path.glob("*.ckpt"):
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint is sound"):
        resolve_last(trainer(tmp_path))


def test_last_without_one_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"last: there is no checkpoint in .*/none; name"):
        resolve_last(trainer(tmp_path / "runs" / "none"))
    (tmp_path / "last.ckpt").symlink_to("gone.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.ckpt is a link to gone\.ckpt, which is gone"):
        resolve_last(trainer(tmp_path))
    with pytest.raises(ConfigError, match="no ModelCheckpoint is configured"):
        resolve_last(pl.Trainer(enable_checkpointing=False, logger=False, accelerator="cpu"))


def test_a_run_whose_logger_made_a_new_folder_is_told_of_the_old_one(tmp_path):
    old = tmp_path / "logs" / "version_0" / "checkpoints" / "last.ckpt"
    AdapterCheckpointIO().save_checkpoint(content(1), old)
    t = pl.Trainer(logger=CSVLogger(tmp_path, name="logs"), accelerator="cpu")
    with pytest.raises(ConfigError, match=rf"version_1/checkpoints; .* is {old}"):
        resolve_last(t)


def test_an_explicit_damaged_checkpoint_is_an_error_and_names_a_sound_one(tmp_path):
    io = AdapterCheckpointIO()
    for step in (1, 2):
        io.save_checkpoint(content(step), tmp_path / f"step={step}.ckpt")
    damage(tmp_path / "step=2.ckpt")
    with pytest.raises(
        CheckpointError, match=r"step=2.ckpt is damaged: .*; sound is .*step=1.ckpt of step 1"
    ):
        io.load_checkpoint(tmp_path / "step=2.ckpt")
    with pytest.raises(CheckpointError, match="No such file"):
        io.load_checkpoint(tmp_path / "none" / "x.ckpt")


@pytest.mark.parametrize("url", ["s3://bucket/x.ckpt", "memory://x.ckpt", "http://host/x.ckpt"])
def test_remote_paths_are_refused(url):
    io = AdapterCheckpointIO()
    for call in (io.load_checkpoint, lambda u: io.save_checkpoint(content(1), u), io.remove_checkpoint):
        with pytest.raises(ConfigError, match=f"{url} is remote"):
            call(url)
    with pytest.raises(ConfigError, match="memory://x is remote"):
        resolve_last(trainer("memory://x"))


def test_a_folder_has_one_run_and_a_killed_run_keeps_nobody_out(tmp_path, capfd):
    read, write = os.pipe()
    held = os.fork()
    if held == 0:
        lock = RunLock(tmp_path)
        if child := os.fork():  # one that outlives its parent
            os.write(write, f"{child}\n".encode())
        time.sleep(600)
        lock.release()
        os._exit(0)
    child = int(os.read(read, 100))
    try:
        with pytest.raises(ConfigError, match=rf"in use by another run \(process {held} on .*dirpath"):
            RunLock(tmp_path)
        os.kill(held, signal.SIGKILL)
        os.waitpid(held, 0)
        lock = RunLock(tmp_path)  # although the child lives
        assert f"process {held} on" in capfd.readouterr().out
        lock.release()
        RunLock(tmp_path).release()
        assert capfd.readouterr().out == ""
    finally:
        os.kill(child, signal.SIGKILL)


def test_strays_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    living = subprocess.Popen(["sleep", "600"])
    dead = subprocess.Popen(["true"])
    dead.wait()
    own = temporary(tmp_path / "last.ckpt").name
    names = {pid: own.replace(f"-{os.getpid()}-", f"-{pid}-") for pid in (living.pid, dead.pid)}
    try:
        for name in names.values():
            (tmp_path / name).write_text("")
        folder = tmp_path / own.replace(f"-{os.getpid()}-", f"-{dead.pid}-").replace("last.ckpt", "x-adapter")
        folder.mkdir()
        (folder / "file").write_text("")
        (tmp_path / "last.ckpt").write_text("")
        assert set(remove_strays(tmp_path)) == {names[dead.pid], folder.name}
        assert {p.name for p in tmp_path.iterdir()} == {names[living.pid], "last.ckpt"}
    finally:
        living.kill()
