"""Reads what a stranger may have written, checkpoints and configs, without running or fetching anything."""

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jsonargparse
import yaml

from grpo_lightning.errors import ConfigError
from grpo_lightning.utils.credentials import check_credentials
from grpo_lightning.utils.import_rules import ALLOWED_CLASSES, CLOSED
from grpo_lightning.utils.yaml_text import load_yaml

NOT_PLAIN = "weights_only is False, which lets a checkpoint run code; ours hold plain types: leave it out"


def restrict_parser() -> None:
    """Sets, for all parsers of this process, what a config may name and where configs are read from."""
    jsonargparse.set_parsing_settings(
        import_path_denylist=sorted(CLOSED),
        import_path_allowlist=sorted(ALLOWED_CLASSES),
        config_read_mode_urls_enabled=False,
        config_read_mode_fsspec_enabled=False,  # on since `lightning.pytorch.cli` was imported
        instantiate_subclass_spec_in_any=False,  # a class_path inside model_kwargs stays a mapping
    )
    jsonargparse.set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))


def refused_import(message: str) -> str | None:
    """Returns our words for jsonargparse's refusal of an import path, None for other messages."""
    found = re.search(r"Importing '([^']+)' is not allowed, denied by the '([^']+)' entry", message)
    if found is None:
        return None
    key = re.search(r'[Kk]ey "([^"]+)"', message)
    return (
        f"{key[1] if key else 'config'}: {found[1]!r} comes from {found[2]!r}, which a config may not name; "
        "if you mean it, name a class or function of your own that uses it"
    )


def check_arguments(argv: list[str]) -> list[str]:
    """Returns the arguments, none of which is given twice or is a credential.

    `--config` and `--KEY+`, which appends, may repeat; what stands below such a key belongs to its last item.

    Raises:
        ConfigError: a credential, or an option that is there twice, where the last one would win in silence.
    """
    given: set[str] = set()
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        name, joined, value = arg.partition("=")
        if not name.startswith("--") or name in ("--", "--config"):
            continue
        check_credentials({name.lstrip("-"): value if joined else following})
        if name.endswith("+"):
            given = {other for other in given if not other.startswith(f"{name[:-1]}.")}
        elif name in given:
            raise ConfigError(f"{name} is given twice; leave one of them out")
        else:
            given.add(name)
    return argv


def check_config(config: Any) -> None:
    """Raises ConfigError if parsed options hold a credential, or a checkpoint that must not be read."""
    check_credentials(config)
    if config.get("weights_only") is False:
        raise ConfigError(NOT_PLAIN)
    check_local(config.get("ckpt_path"))


def check_local(path: Any, key: str = "--ckpt_path") -> None:
    """Raises ConfigError if `path` is an address, or a name in Lightning's registry of models."""
    if re.match(r"([A-Za-z][\w+.-]+:|registry$)", str(path)) and not os.path.exists(path):
        raise ConfigError(
            f"{key} is {str(path)!r}; checkpoints are read from local files only: download it first, and "
            "give the file's path"
        )


@contextmanager
def plain(path: Any, key: str = "--ckpt_path") -> Iterator[None]:
    """Turns torch's refusal to run what a file holds into one line."""
    try:
        yield
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        names = f"it names {found[1]}" if found else "it is no checkpoint, or a damaged one"
        raise ConfigError(
            f"{key} is {str(path)!r}, of which only tensors and plain types are read, and {names}; nothing "
            "of it was run: give a checkpoint that this package wrote"
        ) from error


def read_plain_checkpoints(trainer: Any) -> None:
    """Makes `trainer` read checkpoints from local files and with `weights_only=True`, whatever it is told.

    Lightning unpickles what it gets from an http(s) address, and whatever the caller or
    TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD asks to. Checkpoints of this package hold tensors and plain types.
    """
    strategy = trainer.strategy
    if "load_checkpoint" in vars(strategy):
        return
    load = strategy.load_checkpoint

    def load_plain(checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        check_local(checkpoint_path)
        if weights_only is False:
            raise ConfigError(NOT_PLAIN)
        # Lightning takes a path that begins with «http» for an address.
        with plain(checkpoint_path):
            return load(os.path.abspath(checkpoint_path), weights_only=True)

    strategy.load_checkpoint = load_plain


class PlainCheckpoints:
    """Makes `load_from_checkpoint` of a Lightning class read local files, with `weights_only=True`."""

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns what Lightning's `load_from_checkpoint` returns."""
        check_local(checkpoint_path, "checkpoint_path")
        if kwargs.pop("weights_only", None) is False:
            raise ConfigError(NOT_PLAIN)
        if isinstance(checkpoint_path, (str, os.PathLike)):
            checkpoint_path = os.path.abspath(checkpoint_path)
        with plain(checkpoint_path, "checkpoint_path"):
            load: Any = super().load_from_checkpoint  # type: ignore[misc]  # of the class beside this one
            return load(checkpoint_path, *args, weights_only=True, **kwargs)
