"""Sampled tokens -> text, as a stream: whole characters only, and nothing that may turn out to be a stop sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers.decoders import DecodeStream


@dataclass(frozen=True)
class Piece:
    """What one token added: text that is safe to send, and the stop sequence that it completed, if any."""

    text: str
    stop: str | None = None


class TextStream:
    """One answer's text as it grows; holds back half a character, and the start of a stop sequence."""

    def __init__(self, backend: Any, stop_sequences: Sequence[str] = ()) -> None:
        self.backend = backend
        self.stops = tuple(stop_sequences)
        self.stream = DecodeStream(skip_special_tokens=True)
        self.held = ""

    def feed(self, token: int) -> Piece:
        """Take the next token; after a stop sequence nothing more may be fed."""
        text = self.held + (self.stream.step(self.backend, token) or "")
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
