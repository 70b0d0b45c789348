"""YAML that a stranger may have written: bombs and keys that would be lost in silence are refused."""

from dataclasses import dataclass
from typing import Any

import jsonargparse
import yaml

from grpo_lightning.errors import ConfigError

MOST_ALIASED = 10_000
"""nodes that the aliases of one YAML text may add; nine lists of nine aliases each would make 400 million"""
DEEPEST = 50
"""levels of a YAML text; our deepest config has 8"""

_unchecked_load = jsonargparse.get_loader("yaml")


def load_yaml(text: str) -> Any:
    """Returns what jsonargparse makes of a YAML text, a config or one value.

    Raises:
        ConfigError: it is deep, has a key twice, or aliases multiply it or nest it in itself.
    """
    if len(text) > 200 or any(letter in text for letter in "&{[\n"):
        _check(text)
    return _unchecked_load(text)


@dataclass
class _Open:
    """A mapping or sequence whose end the parser has not reached."""

    anchor: str | None = None
    keys: set[str] | None = None
    nodes: int = 1
    children: int = 0


def _check(text: str) -> None:
    """Raises ConfigError if YAML is deep, has a key twice, or aliases multiply it or nest it in itself.

    Looks at the events of the parser: to compose a text is recursive, and ends the process where it is deep.
    """
    sizes: dict[str, int | None] = {}  # of what an anchor names, None while that is open
    added, inside = 0, [_Open()]
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if isinstance(event, yaml.NodeEvent):
                _check_key(inside[-1], event)
            if isinstance(event, yaml.CollectionStartEvent):
                inside.append(
                    _Open(event.anchor, set() if isinstance(event, yaml.MappingStartEvent) else None)
                )
                sizes[event.anchor] = None
                if len(inside) > DEEPEST:
                    raise ConfigError(f"config: YAML is nested deeper than {DEEPEST} levels; flatten it")
            elif isinstance(event, yaml.CollectionEndEvent):
                closed = inside.pop()
                sizes[closed.anchor or ""] = closed.nodes
                inside[-1].nodes += closed.nodes
            elif isinstance(event, yaml.AliasEvent):
                if (size := sizes.get(event.anchor, 1)) is None:
                    raise ConfigError("config: a YAML alias contains itself; write the value out")
                added, inside[-1].nodes = added + size, inside[-1].nodes + size
            elif isinstance(event, yaml.ScalarEvent):
                inside[-1].nodes += 1
    except yaml.YAMLError:
        return  # the loader says so itself
    if added > MOST_ALIASED:
        raise ConfigError(
            f"config: its YAML aliases stand for {added} further values, more than the {MOST_ALIASED} "
            "allowed; write them out, or use fewer"
        )


def _check_key(parent: _Open, event: yaml.NodeEvent) -> None:
    """Counts a child; raises ConfigError for a key that its mapping has already, where the last would win."""
    parent.children += 1
    if parent.keys is None or parent.children % 2 == 0 or not isinstance(event, yaml.ScalarEvent):
        return
    if event.value in parent.keys - {"<<"}:
        line = event.start_mark.line + 1
        raise ConfigError(f"config, line {line}: {event.value!r} is given twice; leave one of them out")
    parent.keys.add(event.value)
