"""Checkpoint files with a checksum of themselves: torch's zip archive, with one line as the comment.

torch writes a CRC32 per record and does not look at it when it reads; headers and directory have none. So a
SHA-256 over all bytes stands in one line at the end of the file, where the zip format has room for a comment.
"""

import hashlib
import json
import os
import pickle
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from grpo_lightning.errors import CheckpointError

MAGIC = b"grpo-lightning checkpoint "
CHUNK = 1 << 24
"""bytes that are hashed at a time, so that several threads can"""
THREADS = min(8, os.cpu_count() or 1)
ARCHIVE_END = b"PK\5\6"
"""begins the last record of a zip archive: 22 bytes, of which the last two are the length of the comment"""


class Seal(NamedTuple):
    """What the last line of a checkpoint says."""

    launch: int
    """when the process that wrote it started to write, in ns; later than that of the one it resumed"""
    step: int
    resumable: bool
    """it holds the optimizer"""
    adapter: bool
    """an adapter's folder belongs beside it"""
    sha256: str = ""
    """of the SHA-256 of all `CHUNK`s before this line"""


def write_sealed(checkpoint: dict[str, Any], file: IO[bytes], seal: Seal) -> Seal:
    """Writes a checkpoint into an empty file, reads it again, and adds the seal.

    Returns:
        The seal with its checksum.

    Raises:
        OSError: of the file.
        CheckpointError: what is read is not what was written.
    """
    sink = _Sink(file)
    torch.save(checkpoint, sink)  # pyright: ignore[reportArgumentType]
    if sink.error is not None:
        raise sink.error
    file.flush()
    path = Path(file.name)
    if (size := path.stat().st_size) != sink.size:
        raise CheckpointError(f"{path} has {size} bytes of the {sink.size} that were written")
    _check_records(path)
    length = len(_line(seal._replace(sha256="0" * 64)))
    file.seek(-2, os.SEEK_END)
    file.write(length.to_bytes(2, "little"))
    file.flush()
    seal = seal._replace(sha256=_sha256(path, size))
    file.write(_line(seal))
    file.flush()
    os.fsync(file.fileno())
    return seal


class _Sink:
    """What `torch.save` writes to. An error is kept: raised into C++ it would come out as another one."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.error = file, 0, None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
                self.size += len(data)
            except BaseException as error:  # a signal's too: raised again as soon as torch returns
                self.error: BaseException | None = error
        return len(data)

    def flush(self) -> None:
        """torch asks for it; `write_sealed` flushes."""


def read_seal(path: Path) -> Seal | None:
    """Returns a checkpoint's seal, unverified; None if another program wrote it.

    Raises:
        CheckpointError: the seal is damaged, or the file is no checkpoint.
    """
    return _seal_of(path)[0]


def verify(path: Path) -> None:
    """Raises CheckpointError unless every byte of a checkpoint is as it was written.

    Without a seal the CRC32 of the archive's records are compared.
    """
    seal, end = _seal_of(path)
    if seal is None:
        _check_records(path)
    elif _sha256(path, end) != seal.sha256:
        raise CheckpointError(f"{path} is damaged: its checksum is not that of its content")


def load_sealed(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Returns a checkpoint that verifies; never runs code of it.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else than plain data and tensors.
    """
    verify(path)
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} holds Python objects, which could run code: it is not loaded ({reason})"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} could not be loaded: {reason}") from error


def peek(path: Path) -> Seal:
    """Returns the seal; of a file without one, what its content says.

    Raises:
        CheckpointError: it cannot be read.
    """
    seal = read_seal(path)
    if seal is not None:
        return seal
    _check_records(path)  # the lazy way to read trusts what it finds
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return Seal(0, int(content["global_step"]), "optimizer_states" in content, adapter=False)
    except Exception as error:
        raise CheckpointError(f"{path} is not a checkpoint of the Trainer") from error


def _line(seal: Seal) -> bytes:
    fields = json.dumps(seal._asdict()).encode()
    return MAGIC + fields + b" %08x\n" % zlib.crc32(fields)


def _seal_of(path: Path) -> tuple[Seal | None, int]:
    """Returns the seal and where it begins."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1024))
            tail = file.read()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    start = tail.rfind(MAGIC)
    if start < 0:
        if tail[-22:-18] != ARCHIVE_END or tail[-2:] != b"\0\0":
            raise CheckpointError(f"{path} is truncated, or not a checkpoint")
        return None, size
    fields, _, crc = tail[start + len(MAGIC) :].rpartition(b" ")
    if crc != b"%08x\n" % zlib.crc32(fields):
        raise CheckpointError(f"{path} is damaged: its last line is not as it was written")
    return Seal(**json.loads(fields)), size - len(tail) + start


def _sha256(path: Path, end: int) -> str:
    """Returns the SHA-256 of the SHA-256 of all chunks of the first `end` bytes."""
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:

        def of_chunk(start: int) -> bytes:
            return hashlib.sha256(os.pread(file.fileno(), min(CHUNK, end - start), start)).digest()

        try:
            return hashlib.sha256(b"".join(pool.map(of_chunk, range(0, end, CHUNK)))).hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _check_records(path: Path) -> None:
    """Raises CheckpointError unless each record of the archive has the CRC32 that torch wrote of it."""

    def read(first: int) -> None:
        with zipfile.ZipFile(path) as archive:  # one for each thread: a shared one seeks without a lock
            for record in archive.infolist()[first::THREADS]:
                with archive.open(record) as data:
                    while data.read(CHUNK):
                        pass

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(read, range(THREADS)))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
