"""From checked prompts to token ids, with the model's own tokenizer and nothing else."""

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from grpo_lightning.data.control_tokens import ControlTokens
from grpo_lightning.data.files import Row, place_of
from grpo_lightning.data.prompts import PromptFormat
from grpo_lightning.errors import ConfigError, DataError, choices
from grpo_lightning.types import Message, Prompt

OVERLONG = ("error", "drop", "left-truncate")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """One prompt, ready for a rollout."""

    prompt: Prompt
    prompt_ids: list[int]
    columns: Row
    uid: int
    """where the row stands in the dataset; the same in every run and on every rank"""


class EncodedPrompts(Sequence[EncodedPrompt]):
    """The prompts of one split: token ids, held compactly, and the rows, from which all else is read."""

    def __init__(self, rows: Any, form: PromptFormat, name: str) -> None:
        self.rows, self.form, self.name = rows, form, name
        self.uids: list[int] = []
        self.ids: list[array] = []
        self.column_names: dict[str, None] = {}
        self.num_dropped = 0
        self.num_truncated = 0
        self.num_spelled = 0
        self.fingerprint = ""

    def __len__(self) -> int:
        return len(self.uids)

    def __getitem__(self, index: int) -> EncodedPrompt:  # type: ignore[override]
        uid = self.uids[index]
        prompt, others = self.form.split(self.rows[uid], place_of(self.rows, uid, self.name))
        columns = {name: others.get(name) for name in self.column_names}
        return EncodedPrompt(prompt=prompt, prompt_ids=self.ids[index].tolist(), columns=columns, uid=uid)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.ids), default=0)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Turns rows into token ids with the model's own tokenizer.

    Args:
        tokenizer: of the model that is trained.
        form: how a row becomes a prompt.
        max_prompt_tokens: longest prompt, in tokens; None is no limit.
        overlong: what happens to longer ones: `error`, `drop`, or `left-truncate`, which keeps the end.
    """

    tokenizer: Any
    form: PromptFormat
    max_prompt_tokens: int | None = None
    overlong: str = "error"

    def __post_init__(self) -> None:
        if self.overlong not in OVERLONG:
            raise ConfigError(f"data.overlong is {choices(self.overlong, OVERLONG)}")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ConfigError(
                f"data.max_prompt_tokens is {self.max_prompt_tokens}; "
                "it must be at least 1, or null for no limit"
            )

    def encode_all(self, rows: Any, indices: Sequence[int], name: str = "dataset") -> EncodedPrompts:
        """Returns the prompts of `rows[indices]`, every one of them checked.

        Raises:
            DataError: a row cannot be used (the message names file and line, or the row), or none is left.
        """
        out = EncodedPrompts(rows, self.form, name)
        digest = hashlib.sha256()
        first: type | None = None
        for index in indices:
            place = place_of(rows, index, name)
            prompt, columns, ids = self.encode_row(rows[index], place)
            first = first or type(prompt)
            if type(prompt) is not first:
                raise DataError(
                    f"{place}: the prompt is {_shape(type(prompt))}, but earlier ones are {_shape(first)}; "
                    "make them all alike, or set data.conversational: true"
                )
            kept = self.fit(ids, place)
            out.column_names.update(dict.fromkeys(columns))
            if kept is None:
                out.num_dropped += 1
                continue
            out.num_truncated += len(kept) < len(ids)
            out.num_spelled += self.spells(prompt) is not None
            out.uids.append(index)
            out.ids.append(array("i", kept))
            digest.update(out.ids[-1].tobytes() + _stable(columns))
        if not out.uids:
            left = f"all {out.num_dropped} prompts are longer than data.max_prompt_tokens"
            raise DataError(
                f"{name}: {left if out.num_dropped else 'the dataset is empty'}; "
                "give a dataset with at least one usable row"
            )
        out.fingerprint = digest.hexdigest()[:16]
        return out

    @cached_property
    def control(self) -> ControlTokens:
        """The tokenizer's control tokens."""
        return ControlTokens(self.tokenizer, self.form.chat_template_kwargs)

    def spells(self, prompt: Prompt) -> str | None:
        """Returns a control token that the prompt spells out and that has to be text, or None."""
        written = isinstance(prompt, str) and self.form.prompt_template is None
        return None if written else self.control.spelled_in(prompt)

    def encode_row(self, row: Row, place: str) -> tuple[Prompt, Row, list[int]]:
        """Returns the prompt, the other columns and the token ids.

        Control tokens that the row spells out are encoded as text, since they would end a turn or begin one
        of another role; those of the chat template, of `data.prompt_template` and of `data.system_prompt` are
        tokens. A text prompt without `data.prompt_template` is a template itself: there they are tokens too.
        """
        prompt, columns = self.form.split(row, place)
        if (spelled := self.spells(prompt)) is None:
            return prompt, columns, self.encode(prompt, place)
        marked, _ = self.form.split(self.control.mark(row), place)
        text = marked if isinstance(marked, str) else self._apply_template(marked, place, tokenize=False)
        ids = self.control.encode(text, add_special_tokens=isinstance(marked, str))
        if ids is None:
            raise DataError(
                f"{place}: the prompt spells out the control token {spelled!r}, and "
                f"{_name(self.tokenizer)} ({type(self.tokenizer).__name__}) can only make that token of it; "
                "change or remove the row"
            )
        return prompt, columns, ids

    def encode(self, prompt: Prompt, place: str) -> list[int]:
        """Returns the token ids; messages go through the chat template, strings are tokenised as they are."""
        try:
            plain = isinstance(prompt, str)
            ids = self.tokenizer(prompt)["input_ids"] if plain else self._apply_template(prompt, place)
        except (TypeError, UnicodeError) as error:
            raise DataError(
                f"{place}: the prompt cannot be tokenised: {error}; look for broken Unicode, and at "
                "data.chat_template_kwargs"
            ) from error
        if not ids:
            raise DataError(f"{place}: the tokenizer makes no token of the prompt {prompt!r}; remove the row")
        return list(ids)

    def _apply_template(self, messages: list[Message], place: str, *, tokenize: bool = True) -> Any:
        from jinja2 import TemplateError

        if getattr(self.tokenizer, "chat_template", None) is None:
            raise DataError(
                f"{place}: the prompt is a list of messages, but the tokenizer {_name(self.tokenizer)} has "
                "no chat template; take an instruction-tuned model, or make texts with data.prompt_template"
            )
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=tokenize,
                add_generation_prompt=True,
                return_dict=False,  # transformers 5 returns a mapping otherwise
                **self.form.chat_template_kwargs,
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"{place}: the chat template of {_name(self.tokenizer)} refuses ({roles}): {error}; "
                "change the roles or data.system_prompt"
            ) from error

    def fit(self, ids: list[int], place: str) -> list[int] | None:
        """Returns the ids that are kept, None if the prompt is dropped."""
        limit = self.max_prompt_tokens
        if limit is None or len(ids) <= limit:
            return ids
        if self.overlong == "error":
            raise DataError(
                f"{place}: the prompt has {len(ids)} tokens, more than data.max_prompt_tokens={limit}; "
                "raise the limit, or set data.overlong to drop or left-truncate"
            )
        return None if self.overlong == "drop" else ids[-limit:]

    def report(self, prompts: EncodedPrompts) -> Iterator[str]:
        """Yields one line for each thing that was done to overlong prompts, and to control tokens."""
        total = len(prompts) + prompts.num_dropped
        if prompts.num_spelled:
            yield f"{prompts.num_spelled} of {total} prompts spell out control tokens: encoded as text"
        for count, what in (
            (prompts.num_dropped, "dropped"),
            (prompts.num_truncated, "truncated on the left"),
        ):
            if count:
                limit = self.max_prompt_tokens
                yield f"{count} of {total} prompts are longer than data.max_prompt_tokens={limit}: {what}"


def _stable(columns: Row) -> bytes:
    # Objects that JSON does not know count by their type: their addresses would differ from run to run.
    return json.dumps(columns, skipkeys=True, default=lambda value: type(value).__name__).encode()


def _shape(kind: type) -> str:
    return "a text" if kind is str else "a list of messages"


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
