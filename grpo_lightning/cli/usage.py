"""What the command line says of options that it does not know, and of values that fit no type."""

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from grpo_lightning.errors import ConfigError, choices
from grpo_lightning.migration.class_paths import moved
from grpo_lightning.migration.options import explain
from grpo_lightning.utils.imports import import_class
from grpo_lightning.utils.untrusted import refused_import
from grpo_lightning.utils.yaml_text import load_yaml

ENGINES = ("HFEngine", "ReplayEngine", "VLLMEngine")
LONGEST = 120
"""characters of a value in a message"""


def complaint(parser: Any, message: str, argv: list[str]) -> list[str]:
    """Returns the lines that say what is wrong; the first is the error, the others are hints.

    Args:
        parser: of the whole command line.
        message: what it said.
        argv: the arguments; all unknown options of these and of the configs are named at once.
    """
    if not re.search(r"unrecognized|not (accept|expect)", message):
        return [condensed(message)]
    known = actions_of(parser)
    unknown = dict(_unknown(known, argv))
    if not unknown:  # inside of something that only the parser can read
        unknown = {key: list(known) for key in dict.fromkeys(_keys(message))}
    if not unknown:
        first = condensed(message)
    elif len(unknown) == 1:
        first = f"there is no option {next(iter(unknown))}"
    else:
        first = f"there are no options {', '.join(unknown)}"
    hints = {key: line for key, near in unknown.items() if (line := hint(key, near))}
    return [first, *(line if len(unknown) == 1 else f"{key}: {line}" for key, line in hints.items())]


def hint(key: str, names: list[str]) -> str | None:
    """Returns where the option of another trainer is, or which of `names` may be meant."""
    bare = key.removeprefix("--").partition("=")[0]
    if (known := explain(key)) is not None:
        return known
    near = get_close_matches(bare, names, n=1, cutoff=0.8)
    return f"did you mean {near[0]!r}?" if near else None


def actions_of(parser: Any) -> dict[str, Any]:
    """Returns dotted name -> action of all options of a parser and of its commands."""
    found = {action.dest: action for action in parser._actions}
    for action in parser._actions:
        for command in (getattr(action, "_name_parser_map", None) or {}).values():
            found |= actions_of(command)
    return found


def _unknown(known: Mapping[str, Any], argv: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields each option that is unknown where it stands, and the names that could be meant."""
    values = iter(argv)
    for arg in values:
        name, joined, value = arg.partition("=")
        if name in ("--config", "-c"):
            path = Path(value if joined else next(values, ""))
            content = load_yaml(path.read_text()) if path.is_file() else None
            yield from _in_mapping(known, content if isinstance(content, dict) else {}, "")
        elif arg.startswith("--") and not _is_known(known, name.removeprefix("--").removesuffix("+")):
            yield name, list(known)


def _is_known(known: Mapping[str, Any], name: str) -> bool:
    parts = name.split(".")
    inside = {".".join(parts[:end]) for end in range(1, len(parts))}
    return name in known or any(hasattr(known.get(key), "_typehint") for key in inside)


def _in_mapping(known: Mapping[str, Any], content: Mapping[Any, Any], prefix: str) -> Iterator[Any]:
    for name, value in content.items():
        key = f"{prefix}{name}"
        action = known.get(key)
        if action is not None and hasattr(action, "_typehint"):
            yield from _in_value(value, action._typehint, key)
        elif isinstance(value, Mapping) and any(k.startswith(f"{key}.") for k in known):
            yield from _in_mapping(known, value, f"{key}.")
        elif action is None:
            yield key, list(known)


def _in_value(value: Any, hint: Any, key: str) -> Iterator[tuple[str, list[str]]]:
    """Yields what a class does not take of the `init_args` given for it, or a dataclass of its fields."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _in_value(item, hint, f"{key}.{number}")
    if not isinstance(value, Mapping):
        return
    if "class_path" in value:
        names, given, inside = _parameters(value["class_path"]), value.get("init_args"), f"{key}.init_args"
    else:
        kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and is_dataclass(kind)]
        names, given, inside = ([f.name for f in fields(kinds[0])] if kinds else []), value, key
    for name in given if names and isinstance(given, Mapping) else ():
        if name not in names:
            yield f"{inside}.{name}", [f"{inside}.{n}" for n in names]


def _parameters(class_path: Any) -> list[str]:
    """Returns the names that a class takes; none where it takes any, or where there is no such class."""
    try:
        parameters = inspect.signature(import_class(str(class_path))).parameters
    except (
        ConfigError,
        AttributeError,
        ImportError,
        TypeError,
        ValueError,
    ):  # a short name, or no class: the parser reads it
        return []
    kinds = {p.kind for p in parameters.values()}
    return [] if inspect.Parameter.VAR_KEYWORD in kinds else list(parameters)


def condensed(message: str) -> str:
    """Returns a parser's message as one line; of a value that fits no type, what it is and what fits."""
    if refused := refused_import(message):
        return refused
    if sentence := moved(message):
        key = re.search(r'[Kk]ey "([^"]+)"', message)
        return f"{key[1]}: {sentence}" if key else sentence
    nested = re.search(r'key "([^"]+)".*got NestedArg\(key=\'([^\']+)\'', message, re.DOTALL)
    if nested is not None:
        key = nested[1]
        return f"{key}.init_args.{nested[2]} needs {key}.class_path, the class that takes it"
    found = re.search(r'[Kk]ey "([^"]+)":?(.*)(?:Given value|Got value): ?(.*)', message, re.DOTALL)
    if found is None:
        return _cut(" ".join(message.split()), 4 * LONGEST)
    key, text, value = found[1], found[2], found[3].strip()
    if key == "rollout.engine":
        return f"{key} is {choices(_cut(value), ENGINES)}; write it as grpo_lightning.engines.NAME"
    reasons = re.findall(r"^\s*- (.+)$", message, re.MULTILINE) or [" ".join(text.split())]
    kept = [r for r in dict.fromkeys(reasons) if "NoneType" not in r and "a path but" not in r]
    allowed = [_plainer(r) for r in kept or reasons]
    return f"{key} is {_cut(value)!r}: {_cut('; '.join(dict.fromkeys(allowed)), 4 * LONGEST)}"


def _plainer(reason: str) -> str:
    """Returns a type's complaint without what only Python's typing says so."""
    reason = re.sub(r"<class '(?:[\w]+\.)*(\w+)'>", r"\1", reason.strip().rstrip("."))
    reason = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", reason)
    reason = re.sub(r"Type .*? expects a function or a callable class: ", "", reason)
    return re.sub(r"\b(Expected|expected) an? one of", r"\1 one of", reason)


def _cut(text: str, length: int = LONGEST) -> str:
    return text if len(text) <= length else f"{text[:length]} ... ({len(text)} characters)"


def _keys(message: str) -> Iterator[str]:
    """Yields the options that the parser itself says it does not know."""
    inside = re.search(r'[Kk]ey "([^"]+)"', message)
    for name in re.findall(r"Option '([^']+)' is not accepted", message):
        yield f"{inside[1]}.{name}" if inside else name
    yield from re.findall(r"(?<!\S)--[\w.\-]+", message)
