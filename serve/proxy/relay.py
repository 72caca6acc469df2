"""The engine's answer on its way to the client: unchanged, or, for a chat request, event by event with its status."""

from __future__ import annotations

import json
import logging
import re
import time

import httpcore
import msgspec
from starlette.types import Message, Send

from serve.api.answers import Error, ErrorDetail, encode_event
from serve.api.openai.errors import error_body
from serve.proxy.chat import Chat
from serve.proxy.reports import Reports
from serve.proxy.upstream import UpstreamFault, end_to_end, pieces
from serve.web.headers import APPLIED_HEADER, REPORT_HEADER
from serve.web.pages import MAX_LISTED_RULES
from serve.web.timing import server_timing

log = logging.getLogger("tokenzero.proxy")

BODILESS = (204, 304)  # statuses of answers without a body, even if they have a content-length
# The first event with text, in any of the three APIs; a chunk that has only a role does not count.
FIRST_TEXT = re.compile(
    rb'"content_block_delta"|_text\.delta"|arguments\.delta"|"delta": ?\{(?!"role":"assistant","content":""\})[^}]*"'
)
GENERATED = re.compile(rb'"(?:output|completion)_tokens": ?(\d+)')


async def relay(answer: httpcore.Response, send: Send) -> None:
    """Forward an answer piece by piece; if it breaks off, the client's connection ends, too."""
    without = (b"content-length",) if answer.status in BODILESS else ()
    headers = end_to_end(answer.headers, *without)
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    try:
        async for piece in pieces(answer):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    except UpstreamFault as fault:
        # Without the last message, the HTTP server closes the connection: the client sees that something is missing.
        log.warning("the answer broke off: %s", fault)
        return
    await send({"type": "http.response.body", "body": b""})


async def relay_chat(chat: Chat, answer: httpcore.Response, send: Send, reports: Reports) -> None:
    """Forward the answer to a chat request, event by event or whole. Raises UpstreamFault before anything is sent."""
    received, statuses = {name.lower(): value for name, value in answer.headers}, reports.statuses
    headers = end_to_end(answer.headers, b"content-length")
    headers.append((b"server-timing", server_timing({"proxy": chat.held_s}).encode()))
    headers += [(REPORT_HEADER.encode(), chat.id.encode())] if await reports.is_made(chat.id) else []
    if chat.applied:
        headers.append((APPLIED_HEADER.encode(), ", ".join(chat.applied[:MAX_LISTED_RULES]).encode()))
    encoded = b"content-encoding" in received
    kind = received.get(b"content-type", b"").partition(b";")[0].strip().lower()
    start: Message = {"type": "http.response.start", "status": answer.status, "headers": headers}
    if kind != b"text/event-stream":
        body = b"".join([piece async for piece in pieces(answer)])
        if kind == b"application/json" and b"content-length" in received and not encoded and not is_json(body):
            raise UpstreamFault(
                502,
                f"the upstream failed: its {len(body)} bytes, as content-length says, are not JSON",
            )
        headers.append((b"content-length", str(len(body)).encode()))
        await send(start)
        await send({"type": "http.response.body", "body": body})
        statuses.update(chat.id, state="done", generated_tokens=generated_tokens(body))
        return
    await send(start)
    sent = pending = counted = b""
    waiting, state = True, "aborted"
    try:
        async for piece in pieces(answer):
            # Whole events only, so that an error event cannot end up within another event.
            pending += piece
            if end := len(pending) if encoded else end_of_events(pending):
                sent, pending = pending[:end], pending[end:]
                await send({"type": "http.response.body", "body": sent, "more_body": True})
                counted = sent if b"_tokens" in sent else counted
                if waiting and FIRST_TEXT.search(sent):
                    waiting = False
                    statuses.update(chat.id, ttft_ms=1000 * (time.perf_counter() - chat.received))
        state = "done"
    except UpstreamFault as fault:
        log.warning("POST %s: the stream broke off: %s", chat.path, fault)
        if encoded:
            return  # see `relay`
        pending = error_event(chat.path, str(fault), sent)
    finally:
        statuses.update(chat.id, state=state, generated_tokens=generated_tokens(counted))
    await send({"type": "http.response.body", "body": pending})


def generated_tokens(answer: bytes) -> int:
    """The output tokens that an answer, or its latest events, report; 0 if they report none."""
    counts = GENERATED.findall(answer)
    return int(counts[-1]) if counts else 0


def end_of_events(data: bytes) -> int:
    """The position after the last whole event of a stream; 0 if there is none."""
    return max((at + len(end) for end in (b"\n\n", b"\r\n\r\n", b"\r\r") if (at := data.rfind(end)) >= 0), default=0)


def error_event(path: str, text: str, before: bytes) -> bytes:
    """The event that ends a stream of the API at `path` with an error; `before` are its latest events."""
    if path == "/v1/chat/completions":
        return b"data: " + error_body(502, text, path) + b"\n\n"
    if path == "/v1/responses":
        numbers = re.findall(rb'"sequence_number": ?(\d+)', before)
        number = int(numbers[-1]) + 1 if numbers else 0
        error = {"type": "error", "code": "server_error", "message": text, "param": None, "sequence_number": number}
        return b"event: error\ndata: " + msgspec.json.encode(error) + b"\n\n"
    return encode_event(Error(ErrorDetail("api_error", text)))


def is_json(body: bytes) -> bool:
    """Whether a body is JSON that common parsers accept."""
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True
