"""Sampled tokens -> text, as a stream: whole characters only, and nothing that may turn out to be a stop sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

HALF = "\ufffd"  # what a character decodes to whose bytes are not all there
# After as many tokens that do not end a character, bytes are taken for broken: one character has at most four.
PATIENCE = 8


@dataclass(frozen=True)
class Piece:
    """What one token added: text that is safe to send, and the stop sequence that it completed, if any."""

    text: str
    stop: str | None = None


class CharacterStream:
    """Tokens to whole characters; half a character is held back. Each token costs the same, whatever came before."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.silent = {index for index, token in backend.get_added_tokens_decoder().items() if token.special}
        self.ids: list[int] = []  # the tokens of the last step that gave text, and those after it
        self.settled = 0  # of these, the former: how a token reads depends on the one before it
        self.taken = 0  # characters of their text that were given already

    def feed(self, token: int) -> str:
        """What a token adds; control tokens, and those that the tokenizer does not know, add nothing."""
        if token in self.silent or self.backend.id_to_token(token) is None:
            return ""
        self.ids.append(token)
        text = self.backend.decode(self.ids)
        held = len(text) - len(text.rstrip(HALF))
        if len(self.ids) - self.settled >= PATIENCE:
            held = min(held, 1)
        new = text[self.taken : len(text) - held]
        if new:
            self.ids = self.ids[self.settled :]
            self.settled = len(self.ids)
            self.taken = len(self.backend.decode(self.ids)) - held
        return new


class TextStream:
    """One answer's text as it grows; holds back half a character, and the start of a stop sequence."""

    def __init__(self, backend: Any, stop_sequences: Sequence[str] = ()) -> None:
        self.stops = tuple(stop_sequences)
        self.characters = CharacterStream(backend)
        self.held = ""

    def feed(self, token: int) -> Piece:
        """Take the next token; after a stop sequence nothing more may be fed."""
        text = self.held + self.characters.feed(token)
        found = [(at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            # The earliest match ends the answer; of two at one place, the one that is complete first.
            at, stop = min(found, key=lambda f: (f[0], len(f[1])))
            self.held = ""
            return Piece(text[:at], stop)
        keep = max((overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return Piece(text[: len(text) - keep])

    def finish(self) -> str:
        """What was held back and turned out to be plain text."""
        text, self.held = self.held, ""
        return text


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
