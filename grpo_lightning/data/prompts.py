"""From rows to prompts: renaming, templates and checks. Errors name the file and line, or the row."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

from grpo_lightning.data.files import Row
from grpo_lightning.errors import ConfigError, DataError, choices
from grpo_lightning.types import Prompt

OURS = (
    "messages",
    "conversation",
    "tokenize",
    "add_generation_prompt",
    "return_dict",
    "return_tensors",
    "continue_final_message",
)


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """How a row becomes a prompt and columns; its fields are options of `PromptDataModule`."""

    prompt_column: str = "prompt"
    prompt_template: str | None = None
    system_prompt: str | None = None
    conversational: bool | None = None
    columns: Mapping[str, str] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.conversational is False and self.system_prompt is not None:
            raise ConfigError(
                "data.system_prompt needs messages, but data.conversational is false; set one of them to null"
            )
        if taken := sorted(set(self.chat_template_kwargs) & set(OURS)):
            raise ConfigError(
                f"data.chat_template_kwargs has {', '.join(taken)}, which is set here; leave it out"
            )
        self._template_columns()

    def _template_columns(self) -> list[str]:
        """Returns the columns that `prompt_template` reads."""
        if self.prompt_template is None:
            return []
        try:
            names = [name for _, name, _, _ in Formatter().parse(self.prompt_template) if name is not None]
        except ValueError:
            names = [""]
        if not all(name.isidentifier() for name in names):
            raise ConfigError(
                f"data.prompt_template is {self.prompt_template!r}; in braces stand names of columns, as in "
                "{question}; write braces that are meant as they are twice: {{ }}"
            )
        return names

    def rename(self, row: Row, place: str) -> Row:
        """Returns the row with `columns` applied: `{new: old}`, all at once."""
        if not isinstance(row, Mapping):
            raise DataError(
                f"{place}: expected a dict of columns, got {type(row).__name__}; give rows as dicts"
            )
        renames = self.columns or {}
        for old in renames.values():
            _require(row, old, place, "data.columns names it")
        kept = {name: value for name, value in row.items() if name not in renames.values()}
        if clash := sorted(kept.keys() & renames.keys()):
            raise DataError(
                f"{place}: data.columns renames to {', '.join(clash)}, which exists already; "
                "choose another name"
            )
        return kept | {new: row[old] for new, old in renames.items()}

    def split(self, row: Row, place: str) -> tuple[Prompt, Row]:
        """Returns the checked prompt and every other column.

        Raises:
            DataError: the prompt is missing, empty, or neither a string nor a list of messages.
        """
        row = self.rename(row, place)
        prompt = _check_prompt(self._read_prompt(row, place), place)
        others = {name: value for name, value in row.items() if name != self.prompt_column}
        return self._converse(prompt, place), others

    def _read_prompt(self, row: Row, place: str) -> Any:
        if self.prompt_template is None:
            remedy = "set data.prompt_column, data.columns or data.prompt_template"
            return _require(row, self.prompt_column, place, remedy)
        values = {
            name: _require(row, name, place, "data.prompt_template names it")
            for name in self._template_columns()
        }
        for name, value in values.items():
            if value is None:
                raise DataError(
                    f"{place}: column {name!r} is null, but data.prompt_template needs it; remove the row"
                )
        try:
            return self.prompt_template.format(**values)
        except (KeyError, ValueError) as error:
            raise DataError(
                f"{place}: data.prompt_template cannot be filled: {error!r}; simplify it"
            ) from error

    def _converse(self, prompt: Prompt, place: str) -> Prompt:
        """Returns the prompt as messages where `conversational` or `system_prompt` ask for them."""
        if isinstance(prompt, list) and self.conversational is False:
            raise DataError(
                f"{place}: the prompt is a list of messages, but data.conversational is false; set it to null"
            )
        if isinstance(prompt, str):
            if not self.conversational and self.system_prompt is None:
                return prompt
            prompt = [{"role": "user", "content": prompt}]
        if self.system_prompt is None:
            return prompt
        if prompt[0]["role"] == "system":
            raise DataError(f"{place}: the prompt has its own system message; set data.system_prompt to null")
        return [{"role": "system", "content": self.system_prompt}, *prompt]


def _require(row: Row, column: str, place: str, why: str) -> Any:
    if column not in row:
        raise DataError(f"{place}: there is no column {choices(column, map(str, row))}; {why}")
    return row[column]


def _check_prompt(prompt: Any, place: str) -> Prompt:
    empty = not prompt.strip() if isinstance(prompt, str) else not prompt
    if empty or not isinstance(prompt, (str, list)):
        found = "null" if prompt is None else repr(prompt) if empty else f"a {type(prompt).__name__}"
        raise DataError(f"{place}: the prompt is {found}; it must be a text or a list of messages, not empty")
    if isinstance(prompt, str):
        return prompt
    for number, message in enumerate(prompt):
        _check_message(message, f"{place}, message {number}")
    if prompt[-1]["role"] == "assistant":
        raise DataError(
            f"{place}: the last message is the assistant's; "
            "move the answer to a column of its own, where the rewards find it"
        )
    return prompt


def _check_message(message: Any, place: str) -> None:
    if not isinstance(message, Mapping):
        raise DataError(
            f"{place}: expected {{'role': ..., 'content': ...}}, got {type(message).__name__}; "
            "write messages as objects"
        )
    for key in ("role", "content"):
        value = message.get(key)
        if not isinstance(value, str) or not value.strip():
            has = "is missing" if key not in message else f"is {value!r:.60}"
            raise DataError(f"{place}: {key!r} {has}; it must be a text, not empty")
