"""The engine's answer on its way to the client: unchanged, or, for a chat request, event by event with its status."""

from __future__ import annotations

import json
import logging
import re
import time
from dataclasses import dataclass
from typing import Protocol

import httpcore
import msgspec
from starlette.types import Message, Send

from serve.api.answers import ERROR_TYPES, Error, ErrorDetail, encode_event
from serve.api.openai.errors import error_body
from serve.proxy.chat import Chat
from serve.proxy.errors import error_status
from serve.proxy.reports import Reports
from serve.proxy.upstream import (
    FAILURES,
    REFUSALS,
    Headers,
    Refused,
    UpstreamFault,
    end_to_end,
    is_events,
    pieces,
    retry_after,
)
from serve.web.headers import APPLIED_HEADER, REPORT_HEADER
from serve.web.pages import MAX_LISTED_RULES
from serve.web.timing import server_timing

log = logging.getLogger("tokenzero.proxy")

MAX_EVENT_BYTES = 2**23  # of a stream; the longest tell a whole response of the Responses API once more
BODILESS = (204, 304)  # statuses of answers without a body, even if they have a content-length
# The first event with text, in any of the three APIs. A chunk that has only a role does not count, whatever else in it
# is empty: some engines send it before they begin.
FIRST_TEXT = re.compile(
    rb'"content_block_delta"|_text\.delta"|arguments\.delta"|"delta": ?\{[^}]*?"(?!role")\w+": ?(?:"[^"]|\[? ?\{)'
)
# Events, or comments, that only keep the connection.
IS_PINGS = re.compile(rb"(?:event: ?ping\r?\ndata:[^\r\n]*[\r\n]+|:[^\r\n]*[\r\n]+)+")
PROMPT_COUNTS = re.compile(
    rb'"(input_tokens|prompt_tokens|cache_read_input_tokens|cache_creation_input_tokens|cached_tokens)": ?(\d+)'
)
RESPONSE_ID = re.compile(rb'"id": ?"(resp_[\w-]{1,100})"')
GENERATED = re.compile(rb'"(?:output|completion)_tokens": ?(\d+)')


class ClientSide:
    """The client's side of one answer: what of it has been sent."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self.begun = False  # the head is sent
        self.settled = False  # more than pings is sent: nobody else can give this answer any more
        self.latest = b""  # what was sent last
        self.plain = True  # it is sent without a `content-encoding`

    async def begin(self, start: Message) -> None:
        """Send the head, unless an earlier upstream's has been sent before its pings."""
        if not self.begun:
            self.begun = True
            self.plain = not any(name.lower() == b"content-encoding" for name, _ in start["headers"])
            await self.send(start)

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """Send an answer at once; its headers lack the length."""
        sized = [*headers, (b"content-length", str(len(body)).encode())]
        await self.begin({"type": "http.response.start", "status": status, "headers": sized})
        await self.body(body, more=False)

    async def body(self, data: bytes, more: bool = True, settles: bool = True) -> None:
        """Send a piece of the body."""
        self.settled |= settles
        self.latest = data or self.latest
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def fail(self, path: str, fault: UpstreamFault) -> None:
        """End the stream of a chat request with an error event; one that is compressed just ends."""
        if self.plain:
            await self.body(error_event(path, str(fault), self.latest, fault.status), more=False)


async def relay(answer: httpcore.Response, client: ClientSide) -> None:
    """Forward an answer piece by piece; if it breaks off, the client's connection ends, too."""
    without = (b"content-length",) if answer.status in BODILESS else ()
    headers = end_to_end(answer.headers, *without)
    await client.begin({"type": "http.response.start", "status": answer.status, "headers": headers})
    try:
        async for piece in pieces(answer):
            await client.body(piece)
    except UpstreamFault as fault:
        # Without the last message, the HTTP server closes the connection: the client sees that something is missing.
        log.warning("the answer broke off: %s", fault)
        return
    await client.body(b"", more=False)


@dataclass(frozen=True)
class Usage:
    """The prompt's tokens and how many of them were cached, as an answer reports them; None where it does not.

    Also the id by which a later request can continue it.
    """

    prompt: int | None = None
    cached: int | None = None
    response: str | None = None  # the id of an answer of the Responses API


class Progress(Protocol):
    """Who wants to know how an answer goes; `replaceable` says whether another could be had in its place."""

    replaceable: bool

    def first_token(self, usage: Usage) -> None:
        """The first event with text has arrived; `usage` is what is known by then."""

    def used(self, usage: Usage) -> None:
        """The answer is complete."""

    def refused(self, error: int, retry_after: float | None) -> None:
        """The answer is an error with one of the statuses REFUSALS or FAILURES."""

    def broke(self, fault: UpstreamFault) -> None:
        """The answer broke off after its first token."""


async def relay_chat(
    chat: Chat, answer: httpcore.Response, client: ClientSide, reports: Reports, progress: Progress | None = None
) -> None:
    """Forward the answer to a chat request, event by event or whole. Raises UpstreamFault before anything is sent.

    With `progress`, another upstream could answer instead: all but pings is held back until the first event with text,
    and UpstreamFault is raised if the answer ends before it.
    """
    received = {name.lower(): value for name, value in answer.headers}
    headers = end_to_end(answer.headers, b"content-length")
    headers.append((b"server-timing", server_timing({"proxy": chat.held_s}).encode()))
    headers += [(REPORT_HEADER.encode(), chat.id.encode())] if await reports.is_made(chat.id) else []
    if chat.applied:
        headers.append((APPLIED_HEADER.encode(), ", ".join(chat.applied[:MAX_LISTED_RULES]).encode()))
    encoded = b"content-encoding" in received
    kind = received.get(b"content-type", b"")
    start: Message = {"type": "http.response.start", "status": answer.status, "headers": headers}
    if is_events(kind):
        await relay_events(chat, answer, start, encoded, client, reports, progress)
        return
    body = b"".join([piece async for piece in pieces(answer)])
    is_json_type = kind.partition(b";")[0].strip().lower() == b"application/json"
    if is_json_type and b"content-length" in received and not encoded and not is_json(body):
        raise UpstreamFault(502, f"the upstream failed: its {len(body)} bytes, as content-length says, are not JSON")
    if client.begun:  # by the pings of an engine that broke off
        text = f"the upstream answered with status {answer.status} in place of a stream"
        await client.body(error_event(chat.path, text, b""), more=False)
        return
    await client.whole(answer.status, headers, body)
    reports.statuses.update(chat.id, state="done", generated_tokens=generated_tokens(body))
    if progress and answer.status == 200:
        progress.used(usage_in(body, chat.path))


async def relay_events(
    chat: Chat,
    answer: httpcore.Response,
    start: Message,
    encoded: bool,
    client: ClientSide,
    reports: Reports,
    progress: Progress | None,
) -> None:
    """Forward a stream of events; see `relay_chat`."""
    held = pending = sent = opened = counted = b""
    waiting, state, statuses = True, "aborted", reports.statuses
    if not progress:
        await client.begin(start)
    try:
        async for piece in pieces(answer):
            # Whole events only, so that an error event cannot end up within another event.
            pending += piece
            if not (end := len(pending) if encoded else end_of_events(pending)):
                if len(pending) > MAX_EVENT_BYTES:
                    pending = b""
                    raise UpstreamFault(502, f"the upstream sends an event of more than {MAX_EVENT_BYTES} bytes")
                continue
            sent, pending = pending[:end], pending[end:]
            opened, counted = (opened or sent, sent) if b"_tokens" in sent else (opened, counted)
            if waiting and (encoded or FIRST_TEXT.search(sent)):
                waiting = False
                if progress:
                    progress.first_token(usage_in(opened, chat.path))
                if not encoded:
                    statuses.update(chat.id, ttft_ms=1000 * (time.perf_counter() - chat.received))
            early = waiting and progress is not None
            if early and not IS_PINGS.fullmatch(sent):
                held += sent
                refuse(answer, sent, held, progress)
                continue
            await client.begin(start)
            await client.body(sent if early else held + sent, settles=not early)
            held = held if early else b""
        state = "done"
    except UpstreamFault as fault:
        if progress and not client.settled:
            raise
        if progress:
            progress.broke(fault)
        log.warning("POST %s: the stream broke off: %s", chat.path, fault)
        if encoded:
            return  # see `relay`
        pending = error_event(chat.path, str(fault), sent)
    finally:
        statuses.update(chat.id, state=state, generated_tokens=generated_tokens(counted))
    await client.begin(start)
    await client.body(held + pending, more=False)
    if progress and state == "done" and answer.status == 200:
        progress.used(usage_in(opened + counted, chat.path))


def refuse(answer: httpcore.Response, latest: bytes, events: bytes, progress: Progress | None) -> None:
    """Raise Refused for an error that another engine might not have, in the latest of the events so far."""
    error = error_status(latest)
    if progress and error and error in (*REFUSALS, *FAILURES):
        progress.refused(error, retry_after(answer.headers))
        if progress.replaceable:
            raise Refused(error, answer.status, end_to_end(answer.headers, b"content-length"), events)


def usage_in(answer: bytes, route: str) -> Usage:
    """What an answer, or its events that count tokens, says of its prompt; of several numbers, the last."""
    found = {name: int(number) for name, number in PROMPT_COUNTS.findall(answer)}
    cached = found.get(b"cache_read_input_tokens", found.get(b"cached_tokens"))
    prompt = found.get(b"input_tokens", found.get(b"prompt_tokens"))
    if prompt is not None and route == "/v1/messages":  # the others' count includes what was cached
        prompt += (cached or 0) + found.get(b"cache_creation_input_tokens", 0)
    response = RESPONSE_ID.search(answer) if route == "/v1/responses" else None
    return Usage(prompt or None, cached, response and response[1].decode())


def generated_tokens(answer: bytes) -> int:
    """The output tokens that an answer, or its latest events, report; 0 if they report none."""
    counts = GENERATED.findall(answer)
    return int(counts[-1]) if counts else 0


def end_of_events(data: bytes) -> int:
    """The position after the last whole event of a stream; 0 if there is none."""
    return max((at + len(end) for end in (b"\n\n", b"\r\n\r\n", b"\r\r") if (at := data.rfind(end)) >= 0), default=0)


def error_event(path: str, text: str, before: bytes, status: int = 502) -> bytes:
    """The event that ends a stream of the API at `path` with an error; `before` are its latest events."""
    if path == "/v1/chat/completions":
        return b"data: " + error_body(status, text, path) + b"\n\n"
    if path == "/v1/responses":
        numbers = re.findall(rb'"sequence_number": ?(\d+)', before)
        number = int(numbers[-1]) + 1 if numbers else 0
        error = {"type": "error", "code": "server_error", "message": text, "param": None, "sequence_number": number}
        return b"event: error\ndata: " + msgspec.json.encode(error) + b"\n\n"
    return encode_event(Error(ErrorDetail(ERROR_TYPES[529] if status == 529 else "api_error", text)))


def is_json(body: bytes) -> bool:
    """Whether a body is JSON that common parsers accept."""
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True
