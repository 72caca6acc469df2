"""Calls that a model writes within its thinking, which it forgot to close."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from serve.formats.readers import WHITESPACE, Call, Calls, Channel, Malformed, Prose, Reader, Source, Tools, match_end

# What the text so far is: nothing but complete calls, something that may still become that, or thinking.
State = Literal["calls", "open", "thinking"]


class LateCalls:
    """Thinking from the opening delimiter of a call on, held back until it is clear whether it ends with calls.

    It does if nothing but complete calls of offered tools follows up to its end.
    """

    def __init__(self, read: Reader, openers: Sequence[str], tools: Tools) -> None:
        self.read, self.openers, self.tools = read, openers, tools
        self.source = Source()  # the text that is held back
        self.found: list[Call | Prose] = []
        self.reader: Calls | None = None  # reads the incomplete call
        self.call_start = 0  # where that call begins

    def advance(self) -> State:
        """Read on in the text; `thinking` is final, and the text is known to be thinking up to `call_start` then."""
        source = self.source
        while True:
            if self.reader is None:
                source.at = self.call_start = match_end(WHITESPACE, source.text, source.at)
                if source.at == len(source.text):
                    return "calls" if self.found else "open"
                if not any(source.text.startswith(opener, source.at) for opener in self.openers):
                    rest = source.text[source.at :]
                    may_open = any(opener.startswith(rest) for opener in self.openers)
                    return "open" if may_open and not source.ended else "thinking"
                self.reader = self.read(source, self.tools)
            try:
                for piece in self.reader:
                    if piece is None:
                        return "open"
                    if isinstance(piece, Channel) or (isinstance(piece, Call) and piece.name not in self.tools):
                        return "thinking"
                    self.found.append(piece)
                    self.call_start = source.at
            except Malformed:
                return "thinking"
            self.reader = None
