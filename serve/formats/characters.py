"""Tokens to whole characters, as they come."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

# An incomplete character decodes to this character, which vocabularies themselves spell in one of these ways.
REPLACEMENT_CHAR = "\ufffd"
REPLACEMENT_SPELLINGS = (REPLACEMENT_CHAR, "ï¿½", "<0xEF><0xBF><0xBD>")
# After so many tokens without the end of a character, its bytes are taken as broken: a character has at most four.
MAX_CHARACTER_TOKENS = 8


class CharacterStream:
    """Tokens to whole characters. The start of a character is held back. Each token takes the same time."""

    def __init__(self, backend: Any, delimiters: Collection[str] = ()) -> None:
        self.backend = backend
        added = backend.get_added_tokens_decoder().items()
        self.silent = {index for index, token in added if token.special and token.content not in delimiters}
        self.ids: list[int] = []  # the last tokens that added text together, and those after them
        self.settled = 0  # the number of the former, kept because a token's text depends on the one before
        self.taken = 0  # characters of their text that were returned already

    def feed(self, token: int) -> str:
        """The text that a token adds: none for unknown tokens, and for control tokens that are not delimiters."""
        if token in self.silent or self.backend.id_to_token(token) is None:
            return ""
        self.ids.append(token)
        text = self.backend.decode(self.ids, skip_special_tokens=False)
        held = len(text) - len(text.rstrip(REPLACEMENT_CHAR))
        if held and "".join(map(self.backend.id_to_token, self.ids)).endswith(REPLACEMENT_SPELLINGS):
            held = 0
        if len(self.ids) - self.settled >= MAX_CHARACTER_TOKENS:
            held = min(held, 1)
        new: str = text[self.taken : len(text) - held]
        if new:
            self.ids = self.ids[self.settled :]
            self.settled = len(self.ids)
            self.taken = len(self.backend.decode(self.ids, skip_special_tokens=False)) - held
        return new
