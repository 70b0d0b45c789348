"""From what a config says to a reward function."""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from grpo_lightning.errors import ConfigError, choices
from grpo_lightning.utils.imports import import_object

RewardFunction = Callable[..., Any]
RewardSpec = RewardFunction | str | Mapping[str, Any]

_WHAT = "reward function"
_WRAP = "reward models are not offered yet; call the model in a function of your own and name that function"


def resolve(spec: RewardSpec) -> RewardFunction:
    """Returns the callable that `spec` stands for.

    Args:
        spec: a callable; `"pkg.mod.func"`, `"pkg.mod:func"` or `"path/file.py:func"`; or
            `{"class_path": ..., "init_args": {...}}`, whose result is the callable.

    Raises:
        ConfigError: it cannot be found or built, or is a reward model or a class instead of a function.
    """
    if isinstance(spec, str):
        function = _imported(spec)
    elif isinstance(spec, Mapping):
        function = _built(spec)
    else:
        function = spec
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(function, torch.nn.Module):
        raise ConfigError(f"{_WHAT} {_shown(spec)} is an nn.Module; {_WRAP}")
    if inspect.isclass(function):
        path = spec if isinstance(spec, str) else f"{function.__module__}.{function.__qualname__}"
        raise ConfigError(
            f"{_WHAT} {_shown(spec)} is a class; give an instance, "
            f"in YAML {{class_path: {path}, init_args: {{...}}}}"
        )
    if not callable(function):
        raise ConfigError(
            f"{_WHAT} {_shown(spec)} is a {type(function).__name__} and cannot be called; give a function, "
            "an import path or {class_path: ..., init_args: {...}}"
        )
    return function


def _imported(spec: str) -> Any:
    if "/" in spec and ":" not in spec and not spec.endswith(".py"):
        raise ConfigError(f"{_WHAT} {spec!r} looks like a model of the hub; {_WRAP}")
    if spec.isidentifier():
        from grpo_lightning import rewards

        if spec in rewards.__all__:
            raise ConfigError(f"{_WHAT} {spec!r} is written 'grpo_lightning.rewards.{spec}'")
    return import_object(spec, _WHAT)


def _built(spec: Mapping[str, Any]) -> Any:
    allowed = ("class_path", "init_args")
    for key in spec:
        if key not in allowed:
            raise ConfigError(f"{_WHAT} {_shown(spec)} has the key {choices(key, allowed)}")
    path, arguments = spec.get("class_path"), spec.get("init_args") or {}
    if not isinstance(path, str) or not isinstance(arguments, Mapping):
        raise ConfigError(
            f"{_WHAT} {_shown(spec)} must be {{class_path: an import path, init_args: a mapping}}"
        )
    factory = import_object(path, _WHAT)
    if not callable(factory):
        raise ConfigError(f"{_WHAT} {path!r} is a {type(factory).__name__}, not a class or function")
    try:
        return factory(**arguments)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{_WHAT} {path!r} failed with init_args {dict(arguments)!r}: {type(error).__name__}: {error}"
        ) from error


def _shown(spec: object) -> str:
    text = repr(spec)
    return text if len(text) <= 200 else f"{text[:200]}…"
