"""Sampled tokens to pieces of an answer, as a stream: thinking, text and tool calls.

Whole characters only, and nothing that may still turn out to be a mark, a call or a stop sequence. How a family of
models writes its marks and calls is `formats`' business.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.api.stops import Stops
from serve.formats.families import Format
from serve.formats.readers import BLANK, SPACE, Call, Calls, Malformed, Source, end_of

HALF = "\ufffd"  # what a character decodes to whose bytes are not all there,
SPELLED = (HALF, "ï¿½", "<0xEF><0xBF><0xBD>")  # and how vocabularies spell the character itself
# After as many tokens that do not end a character, bytes are taken for broken: one character has at most four.
PATIENCE = 8
# Blanks that are held back at most because a mark may follow, to which they would belong.
BLANKS = 256
# What was read as a call and is none is read again from each mark in it, as often at most.
RETRIES = 8
# A call that is longer may take long to read: to find that it is none, or to decode its arguments.
HEAVY_CHARS = 2**16
NO_STOPS = Stops()


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


AnswerEvent = Text | Thinking | ThinkingEnd | Call | Stopped


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
        if held and "".join(map(self.backend.id_to_token, self.ids)).endswith(SPELLED):
            held = 0
        if len(self.ids) - self.settled >= PATIENCE:
            held = min(held, 1)
        new: str = text[self.taken : len(text) - held]
        if new:
            self.ids = self.ids[self.settled :]
            self.settled = len(self.ids)
            self.taken = len(self.backend.decode(self.ids, skip_special_tokens=False)) - held
        return new


class Marks:
    """The marks that count in a block: some anywhere, others only where it begins."""

    def __init__(self, anywhere: Sequence[str], leading: Sequence[str]) -> None:
        self.anywhere, self.leading = [list(filter(None, marks)) for marks in (anywhere, leading)]
        either, first = ["|".join(map(re.escape, marks)) or "(?!)" for marks in (self.anywhere, self.leading)]
        self.next, self.first = re.compile(f"({either})"), re.compile(f"[{SPACE}]{{0,{BLANKS}}}({first})")

    def find(self, text: str, start: int, fresh: bool) -> re.Match[str] | None:
        """The first mark, its group 1; `fresh` says that a block begins at `start`."""
        return (self.first.match(text, start) if fresh else None) or self.next.search(text, start)

    def partial(self, text: str, fresh: bool) -> int:
        """How many characters, the last ones, may begin a mark."""
        whole = text.lstrip(SPACE)
        leads = fresh and any(mark.startswith(whole) for mark in self.leading)
        return max([len(whole) if leads else 0, *(overlap(text, mark) for mark in self.anywhere)])

    def possible(self, fresh: bool) -> bool:
        """Whether a mark may still come."""
        return bool(self.anywhere or (fresh and self.leading))


class AnswerStream:
    """One answer's pieces as its tokens come.

    Whitespace beside a mark or a call belongs to it and is dropped; any other is kept, the last of an answer too.
    Thinking without content gives nothing; its opening mark, written again, is dropped. With `tools` (input schemas by
    name; none offered: what looks like a call is text), a call comes as one piece once its arguments are complete,
    whether a tool of its name was offered or not: the client answers what is wrong with it. What begins like a call and
    is none is text, marks included, and is read on behind its first mark. Stop sequences are looked for in text alone:
    of two that end together the longest counts, and otherwise the one that is complete first.
    With `thinking` the prompt has opened a block of thinking already; `begun` are the tokens of an answer that goes on:
    how the next ones read depends on them. An answer that is bound to be JSON has the format `of_json`: marks within it
    are text.
    """

    def __init__(
        self,
        backend: Any,
        format: Format,
        stops: Stops = NO_STOPS,
        tools: Mapping[str, dict[str, Any]] | None = None,
        thinking: bool = False,
        begun: Sequence[int] = (),
    ) -> None:
        self.characters = CharacterStream(backend, format.marks)
        for token in begun[-PATIENCE:]:
            self.characters.feed(token)
        self.format, self.stops, self.tools = format, stops, tools or {}
        think, unthink = format.think_marks or ("", "")
        marks = (think, *(format.openers if self.tools else ()))
        bare = ("{",) if format.bare and self.tools else ()
        self.text_marks = Marks(*(marks, bare) if format.within else ((), (*marks, *bare)))
        self.thinking_marks = Marks((unthink,), (think,))
        self.switch = (think, unthink)
        self.thinking = thinking
        self.stopped = False
        self.source = Source()  # the text of the answer
        self.sent = 0  # characters of it that were sent, or dropped
        self.scanned = self.matched = 0  # how far stop sequences were looked for, and their automaton's state there
        self.plain = 0  # no mark begins ahead of here
        self.behind_mark = thinking  # the block follows a mark, which owns the whitespace between
        self.begun = False  # something of the block was sent
        self.reader: Calls | None = None  # who reads the call that is not complete,
        self.opened = 0  # and where its first mark stands
        self.failed = self.retries = 0  # how far calls were read that were none, and how often up to there
        self.pieces: list[AnswerEvent] = []

    @property
    def heavy(self) -> bool:
        """Whether the next token may take long, which is no work for an event loop."""
        return self.reader is not None and len(self.source.text) - self.opened > HEAVY_CHARS

    def feed(self, token: int) -> list[AnswerEvent]:
        """What the next token adds; nothing after a stop sequence."""
        return self.read(self.characters.feed(token))

    def finish(self) -> list[AnswerEvent]:
        """What was held back, at the end of the answer."""
        self.source.ended = True
        return self.read("")

    def read(self, characters: str) -> list[AnswerEvent]:
        """The pieces that more characters complete."""
        self.source.add(characters)
        while not self.stopped and (self.read_call(self.reader) if self.reader else self.read_block()):
            pass
        pieces, self.pieces = self.pieces, []
        return pieces

    def read_block(self) -> bool:
        """Read text or thinking up to the next mark; whether there is one, with more to read behind it."""
        whole = self.source.text
        if self.behind_mark:
            self.sent = end_of(BLANK, whole, self.sent)
            self.behind_mark = self.sent == len(whole)
        marks = self.thinking_marks if self.thinking else self.text_marks
        start = max(self.sent, self.plain)
        fresh = not self.begun and start == self.sent
        found = marks.find(whole, start, fresh)
        text = whole[self.sent : found.start(1) if found else len(whole)]
        if not (found or self.source.ended):
            text = text[: len(text) - marks.partial(whole[start:], fresh)]
        if not self.thinking and (stop := self.scan(whole, self.sent + len(text))):
            self.send(whole[self.sent : self.scanned - len(stop)])
            self.pieces.append(Stopped(stop))
            self.stopped = True
            return False
        begins = 0 if self.thinking else self.stops.depth[self.matched]
        held = max(blanks(text) if marks.possible(fresh) else 0, begins)
        if not found:
            text = text[: len(text) - (0 if self.source.ended else held)]
            self.send(text)
            self.sent += len(text)
            return False
        if found[1] in self.switch:
            self.send(text[: len(text) - blanks(text)])
            self.sent = found.end(1)
            self.switch_to(found[1] == self.switch[0])
        else:
            self.send(text[: len(text) - held])
            self.sent += len(text) - held
            self.open_call(found)
        return True

    def scan(self, whole: str, end: int) -> str | None:
        """Look for stop sequences up to `end`, each character once; the one that is complete."""
        if self.scanned < self.sent:  # a mark or a call came between
            self.scanned, self.matched = self.sent, 0
        self.matched, count = self.stops.scan(self.matched, whole[self.scanned : end])
        self.scanned += count
        return self.stops.complete[self.matched]

    def switch_to(self, thinking: bool) -> None:
        """Begin or end thinking; beginning it again changes nothing."""
        if self.begun and self.thinking:
            self.pieces.append(ThinkingEnd())
        self.thinking, self.behind_mark, self.begun = thinking, True, False

    def open_call(self, mark: re.Match[str]) -> None:
        """Begin a call; what was not sent ahead of it is text as well if it is none."""
        assert self.format.read
        self.opened, self.plain = mark.span(1)
        self.source.at = self.source.settled = self.opened
        self.reader = self.format.read(self.source, self.tools)

    def read_call(self, reader: Calls) -> bool:
        """Read calls that belong together; whether they have ended, or are none, with more to read behind them."""
        source = self.source
        try:
            for call in reader:
                if call is None:
                    return False
                ahead = source.text[self.sent : self.opened]
                self.send(ahead[: len(ahead) - blanks(ahead)])
                self.pieces.append(call)
                self.sent = self.opened = source.settled = source.at
                self.behind_mark, self.begun = True, False
            self.sent = source.at
        except Malformed:
            if source.settled >= self.plain:
                self.sent = source.settled
            self.retries = self.retries + 1 if self.opened < self.failed else 0
            self.failed = max(self.failed, source.at)
            if self.retries == RETRIES:
                self.plain = self.failed
        self.reader = None
        return True

    def send(self, text: str) -> None:
        """Add a piece of the block, if there is any."""
        if text:
            self.pieces.append(Thinking(text) if self.thinking else Text(text))
            self.begun = True


def blanks(text: str) -> int:
    """How many blanks at the end of a text belong to a mark behind it."""
    return min(len(text) - len(text.rstrip(SPACE)), BLANKS)


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `mark`."""
    for size in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:size]):
            return size
    return 0
