"""A checkpoint knows whether it is whole: every byte of it counts."""

import errno
import io
import os
import pickle
import random
import threading
import zipfile
from collections import defaultdict

import pytest
import torch

from grpo_lightning.errors import CheckpointError
from grpo_lightning.utils import checked_files
from grpo_lightning.utils.checked_files import Seal, load_sealed, peek, read_seal, verify, write_sealed

SEAL = Seal(launch=7, step=3, resumable=True, adapter=False)
CONTENT = {"global_step": 3, "optimizer_states": [{"exp_avg": torch.arange(40.0)}], "w": torch.ones(5)}


def sealed(path, content=CONTENT, seal=SEAL):
    with path.open("xb") as file:
        return write_sealed(content, file, seal)


def test_what_is_written_is_read_by_us_and_by_torch(tmp_path):
    file = tmp_path / "x.ckpt"
    seal = sealed(file)
    assert read_seal(file) == seal == peek(file)
    assert seal[:4] == SEAL[:4]
    verify(file)
    for content in (load_sealed(file), torch.load(file, weights_only=True)):
        assert torch.equal(content["optimizer_states"][0]["exp_avg"], torch.arange(40.0))
    assert torch.load(file, mmap=True, weights_only=True)["global_step"] == 3


def test_a_flipped_bit_anywhere_is_found(tmp_path):
    """Weights, optimizer, pickle, zip headers, padding, directory, and the seal itself."""
    file = tmp_path / "x.ckpt"
    sealed(file)
    whole, choose = file.read_bytes(), random.Random(0)
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << choose.randrange(8)
        file.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"x\.ckpt is (damaged|truncated)"):
            verify(file)


def test_truncated_anywhere_is_found(tmp_path):
    file = tmp_path / "x.ckpt"
    sealed(file)
    whole = file.read_bytes()
    for length in [*range(0, len(whole), 53), *range(len(whole) - 400, len(whole))]:
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"x\.ckpt"):
            verify(file)


def test_two_flipped_bits_that_torch_loads(tmp_path):
    """Of a file without a seal, torch's CRC32 is looked at, which torch itself does not do."""
    file = tmp_path / "x.ckpt"
    torch.save(CONTENT, file)
    verify(file)
    assert peek(file) == Seal(0, 3, resumable=True, adapter=False)
    found = bytearray(file.read_bytes())
    at = found.index(torch.arange(40.0).numpy().tobytes())
    found[at + 8] ^= 0b11
    file.write_bytes(found)
    loaded = torch.load(file, weights_only=True)["optimizer_states"][0]["exp_avg"]
    assert not torch.equal(loaded, torch.arange(40.0))
    with pytest.raises(CheckpointError, match="damaged: Bad CRC-32"):
        load_sealed(file)


def test_threads_do_not_share_an_archive(tmp_path, monkeypatch):
    """Python 3.12 seeks relative to where another thread has left the file."""
    file = tmp_path / "x.ckpt"
    torch.save([torch.ones(i) for i in range(500)], file)
    threads, open_record = defaultdict(set), zipfile.ZipFile.open

    def opened(archive, record):
        threads[archive].add(threading.get_ident())
        return open_record(archive, record)

    monkeypatch.setattr(checked_files, "THREADS", 8)
    monkeypatch.setattr(zipfile.ZipFile, "open", opened)
    verify(file)
    assert [len(of) for of in threads.values()] == [1] * 8


@pytest.mark.parametrize("content", [b"", b"a text\n" * 100, pickle.dumps({"a": 1})])
def test_other_files_are_no_checkpoints(tmp_path, content):
    file = tmp_path / "x.ckpt"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated, or not a checkpoint"):
        load_sealed(file)
    with pytest.raises(CheckpointError, match="No such file"):
        load_sealed(tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match="directory"):
        load_sealed(tmp_path)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"global_step": Trap()}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="could run code"):
        load_sealed(tmp_path / "x.ckpt")
    assert not (tmp_path / "trapped").exists()


class Full(io.FileIO):
    """A file on a disk with room for 3000 bytes; or one in whose write a signal comes."""

    error: BaseException = OSError(errno.ENOSPC, "No space left on device")

    def write(self, data):
        if self.tell() + len(data) > 3000:
            raise self.error
        return super().write(data)


@pytest.mark.parametrize("error", [Full.error, KeyboardInterrupt()])
def test_an_error_of_a_write_comes_out_as_it_is(tmp_path, error):
    """torch makes a RuntimeError about positions of it."""
    with Full(tmp_path / "x.ckpt", "xb") as file:
        file.error = error
        with pytest.raises(type(error)) as raised:
            write_sealed({"w": torch.zeros(10_000)}, file, SEAL)
    assert raised.value is error


def test_a_write_that_lies_is_found(tmp_path):
    class Lossy(io.FileIO):
        def write(self, data):
            content = bytearray(data)
            if len(content) == 40_000:
                content[777] ^= 4
            return super().write(content)

    with Lossy(tmp_path / "x.ckpt", "xb") as file, pytest.raises(CheckpointError, match="Bad CRC-32"):
        write_sealed({"w": torch.zeros(10_000)}, file, SEAL)
