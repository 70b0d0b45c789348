"""What a model is by its files, whatever the folder is called."""

import hashlib
import json
from pathlib import Path
from typing import Any

FILES = ("config.json", "generation_config.json", "*.index.json", "tokenizer*", "special_tokens_map.json",
         "added_tokens.json", "vocab.*", "merges.txt", "chat_template*", "spiece.model")  # fmt: skip
"""read whole"""
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
"""sampled"""
SLICE, SLICES = 64, 16
VOLATILE = ("transformers_version", "_name_or_path")
"""of a config, say who wrote it and not what it is"""


def contents(folder: Path, names: tuple[str, ...] = FILES + WEIGHTS) -> dict[str, str]:
    """Returns a hash for each file of a model or tokenizer.

    Of weights it covers the file's size, the header, and of every tensor 16 slices of 64 bytes, the first
    and the last among them: all of a small tensor. Training moves nearly all numbers of a tensor, so other
    weights are found out within milliseconds; a change of single numbers of a large tensor need not be.

    Args:
        folder: with the files; those that are missing are left out.
        names: patterns of names.
    """
    found = {path for name in names for path in folder.glob(name) if path.is_file()}
    sampled = {path for name in WEIGHTS for path in folder.glob(name)}
    return {p.name: _sample(p) if p in sampled else _digest(p) for p in sorted(found)}


def of_module(module: Any) -> dict[str, str]:
    """Returns the hashes of a module's model and, if it is another, its tokenizer."""
    revision = module.model_kwargs.get("revision")
    found = contents(_folder_of(module.model_path, revision))
    if module.tokenizer_name:
        others = contents(_folder_of(module.tokenizer_name, None), FILES[3:])
        found = {k: v for k, v in found.items() if not _is_tokenizers(k)} | others
    return found


def _is_tokenizers(name: str) -> bool:
    return any(Path(name).match(pattern) for pattern in FILES[3:])


def _folder_of(source: str, revision: str | None) -> Path:
    """Returns the folder of a model; of a hub id, the one in the cache that it was loaded from."""
    if Path(source).is_dir():
        return Path(source)
    from transformers.utils.hub import cached_file

    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False, "local_files_only": True}
        path = cached_file(source, name, revision=revision, **options)
        if path is not None:
            return Path(path).parent
    raise FileNotFoundError(f"{source}: neither its config nor its tokenizer is in the cache")


def _digest(path: Path) -> str:
    data = path.read_bytes()
    if path.name in ("config.json", "generation_config.json"):
        values = {k: v for k, v in json.loads(data).items() if k not in VOLATILE}
        data = json.dumps(values, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def _sample(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as f:
        for start, stop in _spans(f) if path.suffix == ".safetensors" else _ends(size):
            last = max(start, stop - SLICE)
            places = range(start, stop, SLICE) if stop - start <= SLICE * SLICES else _spread(start, last)
            for place in places:
                f.seek(place)
                digest.update(f.read(min(SLICE, stop - place)))
    return digest.hexdigest()[:16]


def _spread(start: int, last: int) -> list[int]:
    return [start + (last - start) * i // (SLICES - 1) for i in range(SLICES)]


def _ends(size: int) -> list[tuple[int, int]]:
    """Returns 1024 spans over a file without a header that we read."""
    step = max(SLICE * SLICES, size // 1024)
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def _spans(f: Any) -> list[tuple[int, int]]:
    """Returns the spans of all tensors, and of the header cut into pieces that are read whole."""
    length = int.from_bytes(f.read(8), "little")
    base = 8 + length
    header = json.loads(f.read(length))
    tensors = sorted(v["data_offsets"] for k, v in header.items() if k != "__metadata__")
    piece = SLICE * SLICES
    own = [(start, min(start + piece, base)) for start in range(0, base, piece)]
    return own + [(base + start, base + stop) for start, stop in tensors]
