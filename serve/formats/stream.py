"""Sampled tokens to the events of an answer, as a stream: thinking, text and tool calls.

Only whole characters are sent, and no text that may still become a delimiter, a call or a stop sequence. How a family
of models writes delimiters and calls is in `format`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.api.stops import Stops
from serve.formats.characters import MAX_CHARACTER_TOKENS, CharacterStream
from serve.formats.format import Format
from serve.formats.late_calls import LateCalls
from serve.formats.readers import (
    CLOSING,
    SPACE,
    WHITESPACE,
    Call,
    Calls,
    Channel,
    Cut,
    CutCall,
    Malformed,
    Prose,
    Source,
    match_end,
    overlap,
)

# At most so much whitespace is held back because a delimiter may follow, to which it would belong.
MAX_HELD_WHITESPACE = 256
# At most so many times, text that failed_until to parse as a call is scanned again from the next delimiter in it.
MAX_RETRIES = 8
# A longer call may take long to read: to decode its arguments, or to find that it is not a call.
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
    """The block of thinking is complete. An answer may also end without this event."""


@dataclass(frozen=True)
class Stopped:
    """A stop sequence ended the answer; nothing follows."""

    sequence: str


AnswerEvent = Text | Thinking | ThinkingEnd | Call | CutCall | Stopped


class Delimiters:
    """The delimiters that count in a block: some of them anywhere, others only at its start."""

    def __init__(self, anywhere: Sequence[str], leading: Sequence[str]) -> None:
        self.extended: dict[str, Delimiters] = {}
        self.anywhere, self.leading = [list(filter(None, delimiters)) for delimiters in (anywhere, leading)]
        either, first = ["|".join(map(re.escape, delimiters)) or "(?!)" for delimiters in (self.anywhere, self.leading)]
        self.next, self.first = re.compile(f"({either})"), re.compile(f"[{SPACE}]{{0,{MAX_HELD_WHITESPACE}}}({first})")

    def with_another(self, delimiter: str) -> Delimiters:
        """These delimiters and another one that counts anywhere."""
        if delimiter not in self.extended:
            self.extended[delimiter] = Delimiters((*self.anywhere, delimiter), self.leading)
        return self.extended[delimiter]

    def find_delimiter(self, text: str, start: int, at_start: bool) -> re.Match[str] | None:
        """The first delimiter, as group 1 of the match. With `at_start`, a block begins there."""
        return (self.first.match(text, start) if at_start else None) or self.next.search(text, start)

    def partial_length(self, text: str, at_start: bool) -> int:
        """The number of characters at the end of a text that may begin a delimiter."""
        whole = text.lstrip(SPACE)
        leads = at_start and any(delimiter.startswith(whole) for delimiter in self.leading)
        return max([len(whole) if leads else 0, *(overlap(text, delimiter) for delimiter in self.anywhere)])

    def possible(self, at_start: bool) -> bool:
        """Whether a delimiter may follow."""
        return bool(self.anywhere or (at_start and self.leading))


class AnswerStream:
    """The events of one answer, as its tokens come.

    - Whitespace next to a delimiter or a call belongs to it and is dropped. Other whitespace is kept, also at the end.
    - Thinking without content gives no event. A second opening delimiter inside thinking is kept as text; at the start
      of thinking it is dropped.
    - A call is one event, sent when its arguments are complete, whether its tool was offered or not: the client reports
      what is wrong with it. Without tools, text that looks like a call is text.
    - Calls inside thinking are thinking, unless the answer ends with them, perhaps after the delimiter that closes
      thinking: from the first on, thinking is held back until that is clear. These calls are of offered tools only.
    - A call that the limit of tokens ended is a CutCall if its name is known, and otherwise dropped.
    - A closing delimiter that stands later than its call is dropped.
    - Text that begins like a call but does not parse as one is text, delimiters included. It is read again after its
      first delimiter.
    - Stop sequences are matched in text only, not in thinking or calls. The first that is complete ends the answer; of
      two that end at the same character, the longest.

    Args:
        backend: the `tokenizers.Tokenizer` of the model.
        format: how the model writes thinking and calls; `format_for_json` of it for an answer that must be JSON.
        stops: the request's stop sequences.
        tools: input schemas by the name of the tool.
        thinking: whether the prompt ends inside a block of thinking.
        begun: tokens of the answer that are in the prompt already. How the next ones decode depends on them.
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
        self.characters = CharacterStream(backend, format.delimiters)
        for token in begun[-MAX_CHARACTER_TOKENS:]:
            self.characters.feed(token)
        self.format, self.stops, self.tools = format, stops, tools or {}
        think, unthink = format.think_delimiters or ("", "")
        bare = format.call_without_marker and bool(self.tools)
        self.openers = (*(format.call_openers if self.tools else ()), *(["{"] if bare else []))
        anywhere = (*format.headers, think, *self.openers)
        leading = (*format.leading, *(["["] if bare else []))
        self.text_delimiters = Delimiters(
            *(anywhere, leading) if format.delimiters_inside_text else ((), (*anywhere, *leading))
        )
        self.thinking_delimiters = Delimiters((unthink, *format.headers, *self.openers), (think,))
        self.closers = (*format.extra_delimiters, *CLOSING)
        self.after_calls = re.compile(f"(?:[{SPACE}]|{'|'.join(map(re.escape, self.closers))})*")
        self.switch = (think, unthink)
        self.thinking = thinking
        self.stopped = False
        self.source = Source()  # the text of the answer
        self.sent = 0  # characters of it that were sent or dropped
        self.scanned = self.matched = 0  # end of the text scanned for stops, and their automaton's state there
        self.scan_start = 0  # no delimiter begins before this
        self.after_delimiter = thinking  # whitespace at the block's start belongs to the delimiter before it
        self.begun = False  # whether any of the block was sent
        self.reader: Calls | None = None  # reads the incomplete call
        self.call_start = 0  # where the delimiter of that call begins
        self.late: LateCalls | None = None  # reads calls inside thinking
        self.flat = False  # `Source.flat` for the rest of this block of thinking
        self.thinking_end = -1  # where this block of thinking ends, as far as that was searched for
        self.end_scanned = 0  # how far it was
        self.failed_until = self.retries = 0  # how far text was read that was not a call, and how often again
        self.events: list[AnswerEvent] = []

    @property
    def heavy(self) -> bool:
        """Whether the next token may take too long for an event loop."""
        return (self.reader or self.late) is not None and len(self.source.text) - self.call_start > HEAVY_CHARS

    def feed(self, token: int) -> list[AnswerEvent]:
        """The events of the next token; none after a stop sequence."""
        return self.read(self.characters.feed(token))

    def finish(self, cut: bool = False) -> list[AnswerEvent]:
        """The events of what was held back, at the end of the answer; `cut` says that the limit of tokens ended it."""
        self.source.ended, self.source.cut = True, cut
        return self.read("")

    def read(self, characters: str) -> list[AnswerEvent]:
        """The events of more characters."""
        self.source.add(characters)
        while not self.stopped and self.step():
            pass
        events, self.events = self.events, []
        return events

    def step(self) -> bool:
        """Read a call, a block or a part of it. Returns whether reading continues."""
        if self.reader:
            return self.read_call(self.reader)
        return self.read_late_calls(self.late) if self.late else self.read_block()

    def read_block(self) -> bool:
        """Read text or thinking up to the next delimiter. Returns whether there was one, so that reading continues."""
        whole = self.source.text
        if self.after_delimiter:
            self.sent = match_end(WHITESPACE, whole, self.sent)
            self.after_delimiter = self.sent == len(whole)
        delimiters = self.thinking_delimiters if self.thinking else self.text_delimiters
        if closing := self.source.unclosed if not self.thinking and self.format.delimiters_inside_text else "":
            delimiters = delimiters.with_another(closing)
        start = max(self.sent, self.scan_start)
        at_start = not self.begun and start == self.sent
        found = delimiters.find_delimiter(whole, start, at_start)
        text = whole[self.sent : found.start(1) if found else len(whole)]
        if not (found or self.source.ended):
            text = text[: len(text) - delimiters.partial_length(whole[start:], at_start)]
        if not self.thinking and (stop := self.scan(whole, self.sent + len(text))):
            self.send(whole[self.sent : self.scanned - len(stop)])
            self.events.append(Stopped(stop))
            self.stopped = True
            return False
        begins = 0 if self.thinking else self.stops.depth[self.matched]
        held = max(trailing_whitespace(text) if delimiters.possible(at_start) else 0, begins)
        if not found:
            text = text[: len(text) - (0 if self.source.ended else held)]
            self.send(text)
            self.sent += len(text)
            return False
        if found[1] in self.switch:
            self.send(text[: len(text) - trailing_whitespace(text)])
            self.sent = found.end(1)
            self.switch_to(found[1] == self.switch[0])
        elif found[1] == closing:
            self.send(text)
            self.sent, self.source.unclosed = found.end(1), ""
        else:
            self.send(text[: len(text) - held])
            self.sent += len(text) - held
            self.open_call(found)
        return True

    def scan(self, whole: str, end: int) -> str | None:
        """The stop sequence that is complete before `end`, or None. Each character is scanned once."""
        if self.scanned < self.sent:  # a delimiter or a call came in between
            self.scanned, self.matched = self.sent, 0
        self.matched, count = self.stops.scan(self.matched, whole[self.scanned : end])
        self.scanned += count
        return self.stops.complete[self.matched]

    def switch_to(self, thinking: bool) -> None:
        """Begin or end thinking. Beginning it twice changes nothing."""
        if self.begun and self.thinking:
            self.events.append(ThinkingEnd())
        self.thinking, self.after_delimiter, self.begun, self.flat = thinking, True, False, False

    def open_call(self, delimiter: re.Match[str]) -> None:
        """Begin a call. The text held back before it is sent with the call, or as text with what is not a call."""
        assert self.format.read
        self.call_start, self.scan_start = delimiter.span(1)
        if self.thinking and delimiter[1] not in self.format.headers:
            self.late = LateCalls(self.format.read, self.openers, self.tools)
            self.late.source.flat = self.flat
            return
        self.source.at = self.source.settled = self.call_start
        self.source.unclosed = ""
        self.reader = self.format.read(self.source, self.tools)

    def read_call(self, reader: Calls) -> bool:
        """Read a group of calls. Returns whether it ended or was not a call, so that reading continues."""
        source = self.source
        try:
            for read in reader:
                if read is None:
                    return False
                text = source.text[self.sent : self.call_start]
                if isinstance(read, Prose):
                    self.send(text + read.text)
                else:
                    self.send(text[: len(text) - trailing_whitespace(text)])
                    self.switch_to(isinstance(read, Channel) and read.thinking)
                    self.events += [] if isinstance(read, Channel) else [read]
                self.sent = self.call_start = source.settled = source.at
            self.sent = source.at
        except Cut as cut:
            text = source.text[self.sent : self.call_start]
            self.send(text[: len(text) - trailing_whitespace(text)])
            self.events += [cut.call] if cut.call else []
            self.sent = len(source.text)
        except Malformed:
            if source.settled >= self.scan_start:
                self.sent = source.settled
            self.count_failure(source.at)
        self.reader = None
        return True

    def count_failure(self, read_to: int) -> None:
        """Note that the text from `call_start` is no call. After many such texts, all of them are passed over."""
        self.retries = self.retries + 1 if self.call_start < self.failed_until else 0
        self.failed_until = max(self.failed_until, read_to)
        if self.retries == MAX_RETRIES:
            self.scan_start = self.failed_until

    def read_late_calls(self, late: LateCalls) -> bool:
        """Read calls inside thinking. Returns whether it is clear what they are, so that reading continues."""
        source, whole, start = self.source, self.source.text, self.call_start
        end = self.find_thinking_end(start)
        stop = end if end is not None else len(whole) - (0 if source.ended else overlap(whole, self.switch[1]))
        fed = start + len(late.source.text)
        late.source.add(whole[fed:stop])
        late.source.ended = source.ended or end is not None
        state = late.advance()
        self.flat = late.source.flat
        follows = end is not None and self.has_text(end + len(self.switch[1]))
        if (state != "thinking" and not late.source.ended) or (state == "calls" and not follows and not source.ended):
            return False
        self.late = None
        if state == "calls" and not follows and not source.cut:
            self.send_late_calls(late)
        elif state == "calls":
            self.scan_start = stop
        else:
            self.call_start = start + late.call_start
            self.scan_start = self.call_start + 1
            self.count_failure(start + late.source.at)
        return True

    def has_text(self, start: int) -> bool:
        """Whether the answer goes on at `start` with more than some whitespace and closing delimiters."""
        rest = self.source.text[start : start + MAX_HELD_WHITESPACE]
        if start + len(rest) < len(self.source.text):
            return True
        rest = rest[match_end(self.after_calls, rest, 0) :]
        return bool(rest) and (self.source.ended or not any(mark.startswith(rest) for mark in self.closers))

    def find_thinking_end(self, start: int) -> int | None:
        """Where the delimiter that closes thinking is, at `start` or later. Each character is searched once."""
        if self.thinking_end < start:
            at = self.source.text.find(self.switch[1], max(self.end_scanned, start))
            if at < 0:
                self.end_scanned = len(self.source.text) - len(self.switch[1]) + 1
                return None
            self.thinking_end = at
        return self.thinking_end

    def send_late_calls(self, late: LateCalls) -> None:
        """End thinking with the calls in it. Words between their delimiters are thinking."""
        text = self.source.text[self.sent : self.call_start]
        text += "".join(piece.text for piece in late.found if isinstance(piece, Prose))
        self.send(text[: len(text) - trailing_whitespace(text)])
        self.switch_to(False)
        self.events += [piece for piece in late.found if isinstance(piece, Call)]
        self.sent = len(self.source.text)

    def send(self, text: str) -> None:
        """Add an event with more text of the block, if there is any."""
        if text:
            self.events.append(Thinking(text) if self.thinking else Text(text))
            self.begun = True


def trailing_whitespace(text: str) -> int:
    """The number of whitespace characters at the end of a text that belong to a delimiter after it."""
    return min(len(text) - len(text.rstrip(SPACE)), MAX_HELD_WHITESPACE)
