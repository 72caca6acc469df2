"""Sampled tokens to pieces of an answer, as a stream: thinking, text and tool calls.

Whole characters only, and nothing that may still turn out to be a mark, a call or a stop sequence. How a family of
models writes its marks and calls is `formats`' business.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.calls import SPACE, Call, Calls, Malformed, Source
from serve.formats import Format

HALF = "\ufffd"  # what a character decodes to whose bytes are not all there
# After as many tokens that do not end a character, bytes are taken for broken: one character has at most four.
PATIENCE = 8
# Blanks that are held back at most because a mark may follow, to which they would belong.
BLANKS = 256
BARE, BRACE = re.compile(f"[{SPACE}]{{0,{BLANKS}}}(?={{)"), re.compile("{")


@dataclass(frozen=True)
class Text:
    """More text of the answer."""

    text: str


@dataclass(frozen=True)
class Thinking:
    """More of a block of thinking."""

    text: str


@dataclass(frozen=True)
class ThinkingEnd:
    """The block of thinking is complete; the end of the answer may come without it."""


@dataclass(frozen=True)
class Stopped:
    """A stop sequence ended the answer; nothing follows."""

    sequence: str


Piece = Text | Thinking | ThinkingEnd | Call | Stopped


class CharacterStream:
    """Tokens to whole characters; half a character is held back. Each token costs the same, whatever came before."""

    def __init__(self, backend: Any, marks: Collection[str] = ()) -> None:
        self.backend = backend
        added = backend.get_added_tokens_decoder().items()
        self.silent = {index for index, token in added if token.special and token.content not in marks}
        self.ids: list[int] = []  # the tokens of the last step that gave text, and those after it
        self.settled = 0  # of these, the former: how a token reads depends on the one before it
        self.taken = 0  # characters of their text that were given already

    def feed(self, token: int) -> str:
        """What a token adds; control tokens that are no marks, and tokens that nobody knows, add nothing."""
        if token in self.silent or self.backend.id_to_token(token) is None:
            return ""
        self.ids.append(token)
        text = self.backend.decode(self.ids, skip_special_tokens=False)
        held = len(text) - len(text.rstrip(HALF))
        if len(self.ids) - self.settled >= PATIENCE:
            held = min(held, 1)
        new = text[self.taken : len(text) - held]
        if new:
            self.ids = self.ids[self.settled :]
            self.settled = len(self.ids)
            self.taken = len(self.backend.decode(self.ids, skip_special_tokens=False)) - held
        return new


class AnswerStream:
    """One answer's pieces as its tokens come.

    Whitespace beside a mark or a call belongs to it and is dropped; any other is kept, the last of an answer too.
    Thinking without content gives nothing. With `tools` (input schemas by name; none offered: what looks like a call is
    text), a call comes as one piece once its arguments are complete, whether a tool of its name was offered or not: the
    client answers what is wrong with it. What begins like a call and is none is text, marks included, and is read on
    behind its first mark. Stop sequences are looked for in text alone. With `thinking` the prompt has opened a block of
    thinking already.
    """

    def __init__(
        self,
        backend: Any,
        format: Format,
        stop_sequences: Sequence[str] = (),
        tools: Mapping[str, dict[str, Any]] | None = None,
        thinking: bool = False,
    ) -> None:
        self.characters = CharacterStream(backend, format.marks)
        self.format, self.stops, self.tools = format, tuple(stop_sequences), tools or {}
        self.think, self.unthink = format.think_marks or ("", "")
        openers = format.openers if self.tools else ()
        self.marks = tuple(mark for mark in (self.think, *openers) if mark)
        self.mark = re.compile("|".join(map(re.escape, self.marks)) or "(?!)")
        self.bare = format.bare and bool(self.tools)
        self.thinking = thinking
        self.stopped = self.ended = False
        self.unread = ""  # characters that were not sent yet, outside of calls
        self.plain = 0  # as many of them are known to begin no mark
        self.behind_mark = thinking  # the block follows a mark, which owns the whitespace between
        self.begun = False  # something of the block was sent
        self.source: Source | None = None  # the text of a call that is not complete,
        self.reader: Calls | None = None  # who reads it,
        self.opener = self.ahead = ""  # its first mark, and the text in front of it that was not sent
        self.pieces: list[Piece] = []

    def feed(self, token: int) -> list[Piece]:
        """What the next token adds; nothing after a stop sequence."""
        return self.read(self.characters.feed(token))

    def finish(self) -> list[Piece]:
        """What was held back, at the end of the answer."""
        self.ended = True
        return self.read("")

    def read(self, characters: str) -> list[Piece]:
        """The pieces that more characters complete."""
        self.unread += characters
        while not self.stopped and (
            self.read_call(self.source, self.reader) if self.source and self.reader else self.read_block()
        ):
            pass
        pieces, self.pieces = self.pieces, []
        return pieces

    def read_block(self) -> bool:
        """Read text or thinking up to the next mark; whether there is one, with more to read behind it."""
        if self.behind_mark:
            self.unread = self.unread.lstrip(SPACE)
            self.behind_mark = not self.unread
        found, stops = self.next_mark(), () if self.thinking else self.stops
        text = self.unread[: found.start() if found else len(self.unread) - self.partial_mark()]
        if stop := first_stop(text, stops):
            self.send(text[: stop[0]])
            self.pieces.append(Stopped(stop[1]))
            self.stopped = True
            return False
        held = max([blanks(text) if self.marks or self.thinking else 0, *(overlap(text, stop) for stop in stops)])
        if not found:
            sent = len(text) - (0 if self.ended else held)
            self.send(text[:sent])
            self.unread, self.plain = self.unread[sent:], max(0, self.plain - sent)
            return False
        self.unread, self.plain = self.unread[found.end() :], 0
        if found.group() == (self.unthink if self.thinking else self.think):
            self.send(text[: len(text) - blanks(text)])
            self.turn_over()
        else:
            self.send(text[: len(text) - held])
            self.open_call(found.group(), text[len(text) - held :])
        return True

    def next_mark(self) -> re.Match[str] | None:
        """The first mark among the unread characters: the end of thinking, its beginning, or a call's."""
        if self.thinking:
            return re.compile(re.escape(self.unthink)).search(self.unread)
        if self.bare and not self.begun and not self.plain and (brace := BARE.match(self.unread)):
            return BRACE.match(self.unread, brace.end())
        return self.mark.search(self.unread, self.plain)

    def partial_mark(self) -> int:
        """How many of the unread characters, the last ones, may begin a mark."""
        if self.ended:
            return 0
        marks = (self.unthink,) if self.thinking else self.marks
        return max((overlap(self.unread[self.plain :], mark) for mark in marks), default=0)

    def turn_over(self) -> None:
        """Begin or end thinking."""
        if self.thinking and self.begun:
            self.pieces.append(ThinkingEnd())
        self.thinking, self.behind_mark, self.begun = not self.thinking, True, False

    def open_call(self, opener: str, ahead: str) -> None:
        """Begin a call; what stands ahead of it is text as well if it is none."""
        assert self.format.read
        self.source, self.opener, self.ahead = Source(opener), opener, ahead
        self.reader = self.format.read(self.source, self.tools)

    def read_call(self, source: Source, reader: Calls) -> bool:
        """Read calls that belong together; whether they have ended, or are none, with more to read behind them."""
        source.text, source.ended, self.unread = source.text + self.unread, self.ended, ""
        try:
            for call in reader:
                if call is None:
                    return False
                self.send(self.ahead[: len(self.ahead) - blanks(self.ahead)])
                self.pieces.append(call)
                self.ahead, source.settled = "", source.at
                self.behind_mark, self.begun = True, False
            self.unread = source.text[source.at :]
        except Malformed:
            self.unread = self.ahead + source.text[source.settled :]
            self.plain = 0 if source.settled else len(self.ahead) + len(self.opener)
        self.source = self.reader = None
        return True

    def send(self, text: str) -> None:
        """Add a piece of the block, if there is any."""
        if text:
            self.pieces.append(Thinking(text) if self.thinking else Text(text))
            self.begun = True


def blanks(text: str) -> int:
    """How many blanks at the end of a text belong to a mark behind it."""
    return min(len(text) - len(text.rstrip(SPACE)), BLANKS)


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the stop sequence that is complete first begins, and which it is; of two that end together, the longest."""
    found = [(at + len(stop), at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1:] if found else None
