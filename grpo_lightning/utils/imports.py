"""Finds what a string in a config names. Importing runs code: a config is as trusted as a script."""

import importlib
import importlib.util
import os
import pkgutil
import sys
import zlib
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo_lightning.errors import ConfigError, choices
from grpo_lightning.utils.import_rules import ALLOWED_CLASSES, is_allowed, origins

_FORMS = "write 'package.module.name', 'package.module:name' or 'path/file.py:name'"


def import_object(spec: str, what: str) -> Any:
    """Returns the object named by `"pkg.mod.name"`, `"pkg.mod:name"` or `"path/file.py:name"`.

    The working folder is importable. A file runs once per process, so two names of one file share its state.

    Args:
        spec: the name; what follows the module may be nested (`"pkg.mod:Class.method"`).
        what: what the object is for, e.g. `"reward function"`; opens every error message.

    Raises:
        ConfigError: nothing is found under that name, importing it fails, or it comes from a library of
            which a config may not name it (`import_rules`), such as `os`, `pickle`, `numpy` and `torch`.
    """
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    where, colon, name = spec.rpartition(":")
    if spec.endswith(".py") or where.endswith(".py"):
        found = _from_file(where if colon else spec, name if colon else "", spec, what)
    else:
        found = _from_module(where, name, spec, what)
    for origin in origins(found):
        _refuse_closed(origin, spec, what)
    if isinstance(found, ModuleType):
        raise ConfigError(f"{what} {spec!r} names a module; add the name inside it, as in '{spec}:name'")
    return found


def import_class(path: str) -> Any:
    """Returns what a `class_path` names: of a library what is allowed, else as `import_object` does."""
    if any(path.startswith(f"{row}.") for row in ALLOWED_CLASSES):
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)
    return import_object(path, "class_path")


def _from_module(where: str, name: str, spec: str, what: str) -> Any:
    modules, attributes = where.split(".") if where else [], name.split(".")
    if not all(part.isidentifier() for part in modules + attributes) or len(modules + attributes) < 2:
        raise ConfigError(f"{what} {spec!r} is not an import path; {_FORMS}")
    _refuse_closed(spec, spec, what)
    if modules:
        module = _import(where, spec, what)
        if module is None:
            raise ConfigError(_no_module(where, spec, what))
        return _walk(module, where, attributes, spec, what)
    # The longest importable prefix is the module. The last part is never imported: a package may have a
    # function and a submodule of one name.
    for end in range(len(attributes) - 1, 0, -1):
        prefix = ".".join(attributes[:end])
        module = _import(prefix, spec, what)
        if module is not None:
            return _walk(module, prefix, attributes[end:], spec, what)
    raise ConfigError(_no_module(attributes[0], spec, what))


def _import(name: str, spec: str, what: str) -> ModuleType | None:
    """Returns the module, or None if there is none of that name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return None
        raise ConfigError(
            f"{what} {spec!r}: {name} imports {error.name!r}, which is not installed"
        ) from error
    except Exception as error:
        raise ConfigError(
            f"{what} {spec!r}: importing {name} failed with {type(error).__name__}: {error}"
        ) from error


def _from_file(path: str, name: str, spec: str, what: str) -> Any:
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ConfigError(f"{what} {spec!r}: there is no file {file}; paths start at the working folder")
    module = _run_file(file, spec, what)
    if not name:
        raise ConfigError(f"{what} {spec!r} names a file; add ':name', one of {', '.join(_public(module))}")
    return _walk(module, path, name.split("."), spec, what)


def _run_file(file: Path, spec: str, what: str) -> ModuleType:
    # The checksum keeps two files of one name apart.
    module_name = f"{file.stem}_{zlib.crc32(str(file).encode()):08x}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    module_spec = importlib.util.spec_from_file_location(module_name, file)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"{what} {spec!r}: {file} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    # Dataclasses and pickles look their module up by name while and after it runs.
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise ConfigError(
            f"{what} {spec!r}: running {file} failed with {type(error).__name__}: {error}"
        ) from error
    return module


def _walk(found: Any, where: str, attributes: Sequence[str], spec: str, what: str) -> Any:
    for attribute in attributes:
        if not hasattr(found, attribute):
            raise ConfigError(_no_attribute(found, where, attribute, spec, what))
        found, where = getattr(found, attribute), f"{where}.{attribute}"
    return found


def _no_attribute(found: Any, where: str, attribute: str, spec: str, what: str) -> str:
    submodules = [module.name for module in pkgutil.iter_modules(getattr(found, "__path__", []))]
    if attribute in submodules:
        return f"{what} {spec!r} names a module; add the name inside it, as in '{where}.{attribute}:name'"
    # The nearest names are enough: some modules have a thousand.
    names = get_close_matches(attribute, {*_public(found), *submodules}, n=20, cutoff=0.0)
    return f"{what} {spec!r}: {where} has no {choices(attribute, names)}"


def _no_module(name: str, spec: str, what: str) -> str:
    return f"{what} {spec!r}: there is no module {name!r}, neither installed nor in {os.getcwd()}; {_FORMS}"


def _public(found: Any) -> list[str]:
    names = [name for name in dir(found) if not name.startswith("_")]
    return [name for name in names if not isinstance(getattr(found, name, None), ModuleType)]


def _refuse_closed(path: str, spec: str, what: str) -> None:
    if not is_allowed(path):
        root = path.replace(":", ".").partition(".")[0]
        raise ConfigError(
            f"{what} {spec!r} comes from {root!r}, which a config may not call; "
            "if you mean it, call it in a function of your own and name that; a file of your own with that "
            f"name is 'path/{root}.py:name'"
        )
