"""Checkpoints of real runs: what a kill, a full disk or a second run leaves, and what `last` makes of it."""

import errno
import json
import os
import resource
import shutil
import signal
from datetime import timedelta

import pytest
import torch
from commands import command, fork
from fits import data, module, rollout, rows_of, same_bits, trainer, weights
from killed import Operations
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors.torch import load_file

from grpo_lightning.checkpoints import AdapterCheckpointIO
from grpo_lightning.checkpoints.adapter_io import adapter_folder, checkpoint_of, replace_link
from grpo_lightning.engines import HFEngine
from grpo_lightning.errors import CheckpointError, ConfigError
from grpo_lightning.utils.atomic_files import STRAY
from grpo_lightning.utils.checked_files import load_sealed, read_seal, verify


@pytest.fixture(scope="module")
def content(model_folder):
    """What a Trainer writes of a LoRA run."""
    m = module(model_folder)
    m.configure_model()
    checkpoint = {"state_dict": m.state_dict(), "global_step": 1, "optimizer_states": []}
    m.on_save_checkpoint(checkpoint)
    return checkpoint


def at(step, content):
    """Another step's checkpoint: its weights tell which."""
    return {
        **content,
        "global_step": step,
        "state_dict": {k: torch.full_like(v, float(step)) for k, v in content["state_dict"].items()},
    }


def pairs(folder):
    """What has a final name: step of each checkpoint, or None; and whether its adapter is there."""
    found = {}
    for file in folder.glob("*.ckpt"):
        verify(file)
        found[file.stem] = read_seal(file).step
    for adapter in folder.glob("*-adapter"):
        seal = read_seal(adapter.with_name(adapter.name.removesuffix("-adapter") + ".ckpt"))
        assert checkpoint_of(adapter) == seal.sha256, "an adapter of another checkpoint"
        assert sorted(p.name for p in adapter.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        found[adapter.name] = True
    return found


class Alone:
    """Enough of a Trainer for one link."""

    is_global_zero = True

    class strategy:
        barrier = staticmethod(lambda: None)


OVER = {"last": 1, "last-adapter": True}
SAVES = {
    "a new name": (
        lambda io, f, c: io.save_checkpoint(at(2, c), f / "new.ckpt"),
        {**OVER, "new": 2, "new-adapter": True},
    ),
    "over an older one": (
        lambda io, f, c: io.save_checkpoint(at(2, c), f / "last.ckpt"),
        {"last": 2, "last-adapter": True},
    ),
    "over one with an adapter, without": (
        lambda io, f, c: io.save_checkpoint({**at(2, c), "grpo_lightning": {}}, f / "last.ckpt"),
        {"last": 2},
    ),
    "removal": (lambda io, f, c: io.remove_checkpoint(f / "last.ckpt"), {}),
    "a link": (
        lambda io, f, c: (
            io.save_checkpoint(at(2, c), f / "new.ckpt"),
            replace_link(Alone(), str(f / "new.ckpt"), str(f / "last.ckpt")),
        ),
        {"last": 2, "last-adapter": True, "new": 2, "new-adapter": True},
    ),
}


def operations_of(save, folder, before, content):
    """The list of file operations of one save."""
    shutil.copytree(before, folder)
    read, write = os.pipe()
    if fork() == 0:
        hooks = Operations()
        hooks.install()
        hooks.active = True
        save(AdapterCheckpointIO(), folder, content)
        hooks.active = False
        with os.fdopen(write, "w") as f:
            json.dump(hooks.log, f)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as f:
        found = json.load(f)
    os.wait()
    return found


@pytest.mark.parametrize("name", SAVES)
def test_a_kill_at_every_file_operation(content, tmp_path, name):
    """Whatever has a final name is whole, old or new; the next start makes pairs of it and tidies up."""
    save, expected = SAVES[name]
    before = tmp_path / "before"
    AdapterCheckpointIO().save_checkpoint(at(1, content), before / "last.ckpt")
    old = pairs(before)
    operations, seen = operations_of(save, tmp_path / "log", before, content), []
    writes = [i for i, (operation, _) in enumerate(operations) if operation == "write"]
    others = [i for i in range(len(operations)) if i not in writes]
    for kill_at in [*others, *writes[::60], len(operations)]:
        folder = tmp_path / str(kill_at)
        shutil.copytree(before, folder)
        pid = fork()
        if pid == 0:
            hooks = Operations(kill_at)
            hooks.install()
            hooks.active = True
            save(AdapterCheckpointIO(), folder, content)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL)
        found = pairs(folder)
        for stem in {"last", "new"} & found.keys():
            assert found[stem] in {old.get(stem), expected.get(stem)}
        seen.append(found)
        AdapterCheckpointIO().guard(folder)
        repaired = pairs(folder)
        assert {k: v for k, v in repaired.items() if isinstance(v, int)} == {
            **{k: v for k, v in found.items() if isinstance(v, int)},
            **{k: True for k in repaired if k.endswith("-adapter")},
        }
        for stem in {"last", "new"} & repaired.keys():
            assert (f"{stem}-adapter" in repaired) == read_seal(folder / f"{stem}.ckpt").adapter
        assert not [p for p in folder.iterdir() if STRAY.match(p.name)]
        assert (code == 0) == (kill_at == len(operations))
    assert seen[0] == old
    assert seen[-1] == expected
    assert len(others) > 4


def test_a_missing_or_foreign_adapter_is_written_again(content, tmp_path):
    io = AdapterCheckpointIO()
    for step in (1, 2):
        io.save_checkpoint(at(step, content), tmp_path / f"{step}.ckpt")
    untouched = (tmp_path / "1-adapter").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "2-adapter")
    shutil.copytree(tmp_path / "1-adapter", tmp_path / "2-adapter")
    (tmp_path / "damaged.ckpt").write_bytes(b"")
    AdapterCheckpointIO().guard(tmp_path)
    for step in (1, 2):
        adapter = tmp_path / f"{step}-adapter"
        assert checkpoint_of(adapter) == read_seal(tmp_path / f"{step}.ckpt").sha256
        assert all((w == step).all() for w in load_file(adapter / "adapter_model.safetensors").values())
        kept = (tmp_path / "1-adapter").stat().st_mtime_ns == untouched
        assert kept, "a healthy pair is left as it is"


def limited(bytes_, action):
    """Runs `action` in a process whose files may have so many bytes; returns what it says of its end."""
    read, write = os.pipe()
    pid = fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))
        try:
            action()
            said = "went on"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    with os.fdopen(read) as f:
        return f.read()


@pytest.mark.parametrize("room", [100, 20_000])
def test_a_disk_without_room(content, tmp_path, room):
    """The kernel refuses a write in the middle of the file, or of the adapter."""
    io, file = AdapterCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint(at(1, content), file)
    before = pairs(tmp_path)
    assert file.stat().st_size > 20_000
    said = limited(room, lambda: io.save_checkpoint(at(2, content), file))
    assert said.startswith(f"CheckpointError: {file} was not saved: File too large (")
    assert "bytes were written" in said
    assert "bytes are free there); the older last.ckpt is as it was" in said
    assert pairs(tmp_path) == before
    assert not [p for p in tmp_path.iterdir() if STRAY.match(p.name)]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("operation", ["fsync", "replace", "rename"])
def test_every_error_of_the_system_comes_out(content, tmp_path, monkeypatch, operation, code):
    io, file = AdapterCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint(at(1, content), file)
    before = pairs(tmp_path)

    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, operation, refuse)
        with pytest.raises(CheckpointError, match=rf"last.ckpt was not saved: {os.strerror(code)}"):
            io.save_checkpoint(at(2, content), file)
    assert pairs(tmp_path) == before
    assert not [p for p in tmp_path.iterdir() if STRAY.match(p.name)]


def test_a_removal_that_fails_is_a_warning(content, tmp_path, monkeypatch):
    io, file = AdapterCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint(at(1, content), file)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", refuse)
        with pytest.warns(UserWarning, match=r"last.ckpt could not be removed: Permission denied"):
            io.remove_checkpoint(file)
    assert pairs(tmp_path) == {"last": 1, "last-adapter": True}


def test_a_run_that_cannot_save_ends_with_an_error(model_folder, tmp_path, monkeypatch):
    """Lightning swallows a PermissionError, and goes on without a checkpoint."""
    replace = os.replace

    def refuse(source, target, **_):
        if str(target).endswith("step=2.ckpt"):
            raise PermissionError(errno.EACCES, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=1)
    with pytest.raises(CheckpointError, match=r"step=2.ckpt was not saved: Permission denied"):
        trainer(tmp_path, rollout(), saver).fit(module(model_folder), data())
    assert pairs(tmp_path / "ckpt") == {"step=1": 1, "step=1-adapter": True}


@pytest.mark.parametrize("lora", [True, False])
def test_a_save_while_the_engine_sleeps(model_folder, tmp_path, lora):
    """Neither wakes it, nor depends on it: the same bits as with an engine that never sleeps."""
    asleep = []

    class Sleeper(HFEngine):
        awake = True

        def generate(self, requests, sampling):
            self.awake = True
            return super().generate(requests, sampling)

        def sync(self, source, version):
            self.awake = True
            super().sync(source, version)

        def sleep(self):
            self.awake = False

    class Watch(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            asleep.append(not engine.awake)

    saved = []
    for name, engine in (("sleeper", Sleeper()), ("plain", HFEngine())):
        engine.awake = True
        saver = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        watch = [Watch()] if name == "sleeper" else []
        m = module(model_folder, **({} if lora else {"lora": None}))
        trainer(tmp_path, rollout(engine=engine), saver, *watch, logger=False).fit(m, data())
        saved.append(load_sealed(tmp_path / name / "step=3.ckpt")["state_dict"])
    assert asleep == [True] * 3
    assert same_bits(*saved)


def test_nothing_is_saved_in_the_middle_of_an_optimizer_step(model_folder, tmp_path):
    """Lightning does at the first micro-batch after a resume, by its clock, and after a validation."""

    def run(name, path=None, **when):
        saver = ModelCheckpoint(tmp_path / name, filename="{step}", save_top_k=-1, save_last=True, **when)
        settings = {"val_check_interval": 1, "check_val_every_n_epoch": None} if "monitor" in when else {}
        split = {"validation_split": 4} if "monitor" in when else {}
        t = trainer(tmp_path, rollout(), saver, accumulate_grad_batches=2, logger=False, **settings)
        t.fit(module(model_folder), data(**split), ckpt_path=path)
        done = {}
        for file in (tmp_path / name).glob("*.ckpt"):
            content = load_sealed(file)
            progress = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
            done[file.stem] = progress["ready"] / content["global_step"]
        return done

    steps = {"step=1": 2, "step=2": 2, "step=3": 2, "last": 2}
    assert run("whole", every_n_train_steps=1) == steps
    resumed = run("resumed", tmp_path / "whole" / "step=1.ckpt", every_n_train_steps=1)
    assert resumed == {k: steps[k] for k in ("step=2", "step=3", "last")}
    assert run("clock", train_time_interval=timedelta(0)) == steps
    validated = run("validated", monitor="val/reward", every_n_train_steps=1)
    assert set(validated.values()) == {2}


def test_a_second_run_in_a_folder_is_refused_before_it_loads_a_model(model_folder, tmp_path):
    def saver():
        return ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=1, save_last=True)

    read, write = os.pipe()

    class Told(Callback):
        def on_train_batch_end(self, *_):
            os.write(write, b".")
            signal.pause()

    first = fork()
    if first == 0:
        trainer(tmp_path / "a", rollout(), saver(), Told()).fit(module(model_folder), data())
        os._exit(0)
    (tmp_path / "ckpt").mkdir()  # so that the second run sees the first before that has saved anything
    os.read(read, 1)
    try:
        m = module(model_folder)
        second = trainer(tmp_path / "b", rollout(), saver())
        with pytest.raises(ConfigError, match=rf"ckpt is in use by another run \(process {first} on"):
            second.fit(m, data())
        assert m.policy is None
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    trainer(tmp_path / "c", rollout(), saver(), max_steps=1).fit(module(model_folder), data())
    trainer(tmp_path / "d", rollout(), saver(), max_steps=1).fit(module(model_folder), data())


def test_a_remote_folder_is_refused_before_a_model_is_loaded(model_folder, tmp_path):
    m, saver = module(model_folder), ModelCheckpoint("memory://x", every_n_train_steps=1)
    with pytest.raises(ConfigError, match="memory://x is remote; checkpoints live in local"):
        trainer(tmp_path, rollout(), saver).fit(m, data())
    assert m.policy is None


def test_last_as_a_link(model_folder, tmp_path):
    """The link is replaced, never missing, and has its adapter; `last` is resumed to the same weights."""

    def run(root, steps, path=None):
        saver = ModelCheckpoint(root / "ckpt", filename="{step}", every_n_train_steps=1, save_last="link")
        m = module(model_folder)
        trainer(root, rollout(), saver, max_steps=steps).fit(m, data(), ckpt_path=path)
        return weights(m)

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "cut", 2)
    link = tmp_path / "cut" / "ckpt" / "last.ckpt"
    assert os.readlink(link) == "step=2.ckpt"
    assert os.readlink(adapter_folder(link)) == "step=2-adapter"
    assert same_bits(run(tmp_path / "cut", 3, str(link)), whole)
    assert pairs(tmp_path / "cut" / "ckpt")["last"] == 3


def test_a_link_is_led_elsewhere_before_its_checkpoint_is_removed(content, tmp_path):
    """Lightning saves, removes the old one, then renews the link: a kill between the two left it dangling."""
    io, link = AdapterCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint(at(1, content), tmp_path / "step=1.ckpt")
    replace_link(Alone(), str(tmp_path / "step=1.ckpt"), str(link))
    io.save_checkpoint(at(2, content), tmp_path / "step=2.ckpt")
    assert pairs(tmp_path)["last"] == 1
    io.remove_checkpoint(tmp_path / "step=1.ckpt")
    expected = {"last": 2, "last-adapter": True, "step=2": 2, "step=2-adapter": True}
    assert pairs(tmp_path) == expected


def test_the_command_line_takes_the_newest_sound_one(model_folder, tmp_path):
    """F07, F08, F46: exit codes and lines as a person meets them."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(8)))
    (tmp_path / "reward.py").write_text(
        "def size(completions, **_):\n    return [len(c) for c in completions]\n"
    )
    folder = tmp_path / "runs" / "ckpt"
    saver = {"dirpath": str(folder), "filename": "{step}", "every_n_train_steps": 1, "save_top_k": -1}
    callback = {"class_path": "ModelCheckpoint", "init_args": {**saver, "save_last": True}}
    config = {
        "trainer": {"accelerator": "cpu", "devices": 1, "logger": False, "callbacks": [callback]},
        "model": {"model_name": model_folder, "lora": {"r": 4}},
        "data": {"dataset": str(tmp_path / "rows.jsonl"), "prompts_per_rollout": 4},
        "rollout": {"num_generations": 4, "sampling": {"max_tokens": 6}, "reward_funcs": ["reward.py:size"]},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))

    def fit(steps, *args):
        return command(
            "fit", "--config", "config.yaml", "--trainer.max_steps", str(steps), *args, cwd=tmp_path
        )

    done = fit(1, "--ckpt_path", "last")
    assert done.code == 2, done.err
    assert f"error: --ckpt_path last: there is no checkpoint in {folder}; name a file" in done.err
    assert fit(2).code == 0
    for name in ("last", "step=2"):
        found = bytearray((folder / f"{name}.ckpt").read_bytes())
        found[len(found) // 2] ^= 3
        (folder / f"{name}.ckpt").write_bytes(found)
    done = fit(3, "--ckpt_path", str(folder / "last.ckpt"))
    assert done.code == 1
    line = next(x for x in done.err.splitlines() if x.startswith("error:"))
    assert "last.ckpt is damaged: its checksum is not that of its content" in line
    assert line.endswith(f"; sound is {folder}/step=1.ckpt of step 1")
    assert "Traceback" not in done.err
    done = fit(3, "--ckpt_path", "last")
    assert done.code == 0, done.err
    assert f"{folder}/last.ckpt is damaged" in done.err
    assert f"taking {folder}/step=1.ckpt of step 1" in done.err
    assert read_seal(folder / "step=3.ckpt").step == 3
    done = fit(4, "--ckpt_path", "rows.jsonl")
    assert done.code == 1
    assert "rows.jsonl is truncated, or not a checkpoint" in done.err


def test_a_run_that_is_stopped_before_its_first_step_logs_the_steps_of_the_whole_run(model_folder, tmp_path):
    root, saver = tmp_path, {"every_n_train_steps": 1, "filename": "{step}"}

    def stops(completions, **_):
        os.kill(os.getpid(), signal.SIGTERM)
        return [0.0] * len(completions)

    pid = fork()
    if pid == 0:
        try:
            t = trainer(root / "a", rollout(reward_funcs=[stops]), ModelCheckpoint(root / "ckpt", **saver))
            t.fit(module(model_folder), data())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    stopped = root / "ckpt" / "stopped.ckpt"
    assert read_seal(stopped).step == 0
    trainer(root / "b", rollout(), ModelCheckpoint(root / "ckpt", **saver)).fit(
        module(model_folder), data(), ckpt_path=stopped
    )
    assert [int(r["step"]) for r in rows_of(root / "b") if r["loss"]] == [0, 1, 2]


def test_a_short_soak(tmp_path):
    """Ten of the kills of `python tests/soak.py`, two ranks and full fine-tuning among them."""
    import soak

    assert soak.main(["--kills", "10", "--kinds", "3", "--out", str(tmp_path)]).wrong == []
