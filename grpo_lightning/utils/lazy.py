"""Public names that import their module on first use (PEP 562)."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from grpo_lightning.migration.class_paths import moved


def lazy(package: str, where: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns `__getattr__` and `__dir__` : public names live in the submodules that `where` names."""

    def get(name: str) -> Any:
        if name not in where and (text := moved(f"{package}.{name}")):
            raise ImportError(text)
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{where[name]}"), name)

    return get, lambda: sorted(where)
