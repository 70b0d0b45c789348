"""Keeps control tokens text where a dataset spells them out: `<|im_end|>` in a prompt ends no turn."""

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

_FIRST, _OPEN, _CLOSE = 0x17000, "\U000187f6", "\U000187f7"
"""Tangut letters: a marker is one that stands for a control token, between two that no text has there"""


class ControlTokens:
    """The control tokens of a tokenizer, and a way to encode texts that spell them.

    They are its special tokens, and the added tokens that its chat template puts around the turns.

    Args:
        tokenizer: of the model that is trained.
        template_kwargs: variables of its chat template.
    """

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any]) -> None:
        self.tokenizer, self.template_kwargs = tokenizer, template_kwargs

    @cached_property
    def tokens(self) -> list[str]:
        """The control tokens, longest first."""
        turns = self._turns()
        added = {token.content: token.special for token in self.tokenizer.added_tokens_decoder.values()}
        found = {text for text, special in added.items() if special or text in turns}
        found |= set(self.tokenizer.all_special_tokens)
        return sorted((text for text in found if text.strip()), key=lambda text: (-len(text), text))

    def _turns(self) -> str:
        """Returns three turns as the chat template writes them; nothing if there is none, or it refuses."""
        from jinja2 import TemplateError

        if getattr(self.tokenizer, "chat_template", None) is None:
            return ""
        say = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
        try:
            return self.tokenizer.apply_chat_template(say, tokenize=False, **self.template_kwargs)
        except TemplateError:
            return ""

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.tokens)) or r"(?!)")

    def spelled_in(self, value: Any) -> str | None:
        """Returns a control token that a text, or a text within lists and mappings, spells out, or None."""
        if isinstance(value, str):
            found = self._pattern.search(value)
            return None if found is None else found[0]
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        return next(filter(None, map(self.spelled_in, inner)), None)

    def mark(self, value: Any) -> Any:
        """Returns a text, or a structure with texts, with a marker in place of every control token."""
        if isinstance(value, str):
            return self._pattern.sub(lambda found: self._markers[found[0]], value)
        if isinstance(value, Mapping):
            return {key: self.mark(inner) for key, inner in value.items()}
        return [self.mark(inner) for inner in value] if isinstance(value, list) else value

    @cached_property
    def _markers(self) -> dict[str, str]:
        return {text: f"{_OPEN}{chr(_FIRST + i)}{_CLOSE}" for i, text in enumerate(self.tokens)}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int] | None:
        """Returns the ids of a marked text: markers become the text that they stand for, the rest is as ever.

        None if the tokenizer is none of the `tokenizers` library.
        """
        if self._core is None:
            return None
        ids = self._core.encode(text, add_special_tokens=add_special_tokens).ids
        return [part for token in ids for part in self._spelled.get(token, (token,))]

    @cached_property
    def _core(self) -> Any:
        """A copy of the tokenizer's core to which every marker is one token, if it has one."""
        from tokenizers import AddedToken, Tokenizer

        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        core = Tokenizer.from_str(backend.to_str())
        core.no_truncation()
        core.no_padding()
        core.add_tokens([AddedToken(marker, normalized=False) for marker in self._markers.values()])
        return core

    @cached_property
    def _spelled(self) -> dict[int, tuple[int, ...]]:
        """The token of a marker -> the ids of what it stands for, as text."""
        return {self._core.token_to_id(marker): self._as_text(text) for text, marker in self._markers.items()}

    def _as_text(self, text: str) -> tuple[int, ...]:
        controls = {self._core.token_to_id(token) for token in self.tokens}
        ids = self._plain(text)
        if controls & set(ids):  # an added token that is not special is found even so, but not by letters
            ids = [token for letter in text for token in self._plain(letter)]
        return tuple(ids)

    def _plain(self, text: str) -> list[int]:
        """Returns the ids of a text in which special tokens are not looked for."""
        core, start = self._core, next(iter(self._markers.values()))
        core.encode_special_tokens = True
        try:  # behind a token, since some tokenizers put a space before the first text
            return core.encode(start + text, add_special_tokens=False).ids[1:]
        finally:
            core.encode_special_tokens = False
