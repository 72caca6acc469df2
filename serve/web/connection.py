"""A connection of a client: uvicorn's HTTP protocol with limits on headers, time, and connections.

What is beyond a limit is answered in the form of the API, and the connection is closed once the client has read that. A
client that closes its sending side still gets its answers: see `eof_received`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serve.limits.exceeded import LimitExceeded
from serve.web.access import error_response
from serve.web.browsers import ANSWER_HEADERS
from serve.web.connections import Connections, allow_open_files
from serve.web.paths import api_path

if TYPE_CHECKING:
    from uvicorn.config import Config
    from uvicorn.server import ServerState

log = logging.getLogger("tokenzero.connections")

# After a refusal the client has so long to read why. What it sends meanwhile is ignored, but no more of it.
LINGER_SECONDS, LINGER_BYTES = 2.0, 2**20
# To a client that has closed its sending side: one that is gone altogether answers with a reset.
# https://www.rfc-editor.org/rfc/rfc9110#section-15.2 lets every client read it before its answer.
PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"
PROBE_AFTER_SECONDS = 0.5  # most answers that can begin have begun by then
NEXT_PROBE_SECONDS, MOST_PROBE_SECONDS = 0.05, 5.0  # until the next; doubled each time


class Reading(Enum):
    """What a connection reads."""

    NOTHING = "nothing"  # it waits for a request
    HEADERS = "headers"
    BODY = "body"
    REST = "rest"  # after a refusal: it is ignored


class Connection(HttpToolsProtocol):
    """One connection. All of a server share `shared`."""

    def __init__(
        self,
        shared: Connections[Connection],
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.shared, self.limits = shared, shared.limits
        self.address = ""
        self.reading = Reading.NOTHING
        self.header_bytes = 0  # that are read in a row: of headers, and of what is around the pieces of a body
        self.ignored_bytes = 0  # after a refusal
        self.problem: LimitExceeded | None = None
        self.read_timer: asyncio.TimerHandle | None = None
        self.write_timer: asyncio.TimerHandle | None = None
        self.probe_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a place, of a connection that waits if there is no other."""
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        self.time_reading(self.limits.header_seconds, self.headers_late)
        idle, problem = self.shared.open(self, self.address)
        if idle and problem:
            idle.transport.close()
            self.shared.on_refused(problem.limit)
        elif problem and self.shared.overfull:
            self.shared.on_refused(problem.limit)
            transport.abort()
        else:
            self.problem = problem

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the place back."""
        super().connection_lost(exc)
        self.shared.closed(self, self.address)
        for timer in (self.read_timer, self.write_timer, self.probe_timer):
            if timer:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Read a part of a request; of headers no more than may be, as the parser would gather them all."""
        self._unset_keepalive_if_required()
        if self.reading is Reading.REST:
            self.ignored_bytes += len(data)
            if self.ignored_bytes > LINGER_BYTES:
                self.transport.abort()
        most = self.limits.max_header_bytes
        while data and self.reading is not Reading.REST and self.parser:
            if self.reading is Reading.NOTHING:
                self.begin_headers()
            if self.problem:
                self.refuse(self.problem)
                return
            piece = data[: most + 1 - self.header_bytes]
            self.header_bytes += len(piece)
            self.feed(piece)
            data = data[len(piece) :]
            if self.header_bytes > most and self.reading in (Reading.HEADERS, Reading.BODY):
                what = "headers" if self.reading is Reading.HEADERS else "chunk extensions and trailers"
                self.refuse(self.too_long("max_header_bytes", what, most, "more", 431))

    def feed(self, data: bytes) -> None:
        """Parse a part of a request, and refuse what is no HTTP."""
        rest = memoryview(data)
        try:
            while rest:
                rest = self.parse(rest)
        except (httptools.HttpParserError, LimitExceeded) as error:
            found = f"the request is not HTTP/1.1: {error}: see https://www.rfc-editor.org/rfc/rfc9112"
            self.refuse(self.problem or LimitExceeded(found, "http", 400))

    def parse(self, data: memoryview) -> memoryview:
        """Parse data, up to the end of the headers of a request for another protocol; return what is left."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self.parser.feed_data(self.without_upgrade())
            return data[upgrade.args[0] :]
        return data[:0]

    def without_upgrade(self) -> bytes:
        """The headers once more, without the wish for another protocol, which a server may ignore.

        With it, the parser takes the body for bytes of that protocol. Java's HTTP client wishes for HTTP/2 in this way.
        Source: https://www.rfc-editor.org/rfc/rfc9110#section-7.8. Raises LimitExceeded for CONNECT, which is no
        request to this server.
        """
        if (method := self.parser.get_method()) == b"CONNECT":
            self.problem = LimitExceeded("CONNECT: expected a request to this server, got one to another", "http", 400)
            raise self.problem
        line = b"%b %b HTTP/%b" % (method, self.url, self.parser.get_http_version().encode())
        headers = [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([line, *headers, b"", b""])

    def begin_headers(self) -> None:
        """A request has begun."""
        self.shared.waiting.pop(self, None)
        self.reading, self.header_bytes = Reading.HEADERS, 0
        self.time_reading(self.limits.header_seconds, self.headers_late)

    def on_message_begin(self) -> None:
        """A request has begun, which may have been sent together with the one before."""
        if self.reading is not Reading.HEADERS:
            self.begin_headers()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Read a part of the path."""
        super().on_url(url)
        self.refuse_long_line("the path", len(self.url), 414)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Read a header; one that follows the body is ignored: https://www.rfc-editor.org/rfc/rfc9110#section-6.5.1."""
        if self.reading is Reading.BODY:
            return
        self.refuse_long_line(f"header {name.decode('latin-1'):.40}", len(name) + len(value), 431)
        super().on_header(name, value)

    def refuse_long_line(self, what: str, found: int, status: int) -> None:
        """Raise LimitExceeded, which ends the parser, for a line that is too long."""
        if found > (most := self.limits.max_header_line_bytes):
            self.problem = self.too_long("max_header_line_bytes", what, most, str(found), status)
            raise self.problem

    def too_long(self, limit: str, what: str, most: int, found: str, status: int) -> LimitExceeded:
        """The refusal of headers that are too long."""
        flag = limit.replace("_", "-")
        return LimitExceeded(
            f"{what}: expected at most {most} bytes, got {found}: shorten it, or raise --{flag}", limit, status
        )

    def on_headers_complete(self) -> None:
        """Answer the request, whose body is still to come."""
        if self.parser.should_upgrade():
            return  # it is read once more, see `parse`
        super().on_headers_complete()  # raises for a path that is none
        self.reading, self.header_bytes = Reading.BODY, 0
        self.time_reading(self.limits.body_seconds, self.body_late)

    def on_body(self, body: bytes) -> None:
        """Read a part of the body; what is around its chunks is counted anew."""
        self.header_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is read."""
        if self.parser.should_upgrade():
            return
        self.reading = Reading.NOTHING
        self.time_reading(None)
        super().on_message_complete()
        if not self.answering:  # it was answered before
            self.shared.waiting[self] = self.address
            self.time_reading(self.timeout_keep_alive, self.headers_late)

    def on_response_complete(self) -> None:
        """Wait for the next request, unless the client sends none."""
        super().on_response_complete()
        if self.transport.is_closing():
            self.time_writing()
        elif self.reading is Reading.NOTHING and not self.answering:  # another one, sent together with it
            self.shared.waiting[self] = self.address

    def timeout_keep_alive_handler(self) -> None:
        """Close after a while without another request."""
        super().timeout_keep_alive_handler()
        self.time_writing()

    def time_reading(self, seconds: float | None, late: Callable[[], None] = lambda: None) -> None:
        """Call `late` unless what is read now is complete after so many seconds; None ends this."""
        if self.read_timer:
            self.read_timer.cancel()
        self.read_timer = None if seconds is None else self.loop.call_later(seconds, late)

    def headers_late(self) -> None:
        """Refuse headers that take too long; a connection without a request is closed."""
        if self.answering:  # of a request before, whose answer holds up this one
            self.time_reading(self.limits.header_seconds, self.headers_late)
        elif self.reading is Reading.NOTHING:
            self.transport.close()
        else:
            self.refuse(self.too_slow("header_seconds", "headers", self.limits.header_seconds))

    def body_late(self) -> None:
        """Refuse a body that takes too long; time in which it is not read does not count."""
        if self.flow.read_paused:
            self.time_reading(self.limits.body_seconds, self.body_late)
        else:
            self.refuse(self.too_slow("body_seconds", "body", self.limits.body_seconds))

    def too_slow(self, limit: str, what: str, seconds: float) -> LimitExceeded:
        """The refusal of what arrives too slowly."""
        flag = limit.replace("_", "-")
        return LimitExceeded(
            f"{what}: expected all within {seconds:g} s, got a part: send it faster, or raise --{flag}", limit, 408
        )

    @property
    def answering(self) -> bool:
        """Whether an answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def refuse(self, problem: LimitExceeded) -> None:
        """Answer with an error, if no other answer has begun, and close once the client has had time to read it."""
        if self.reading is Reading.REST or self.transport.is_closing():
            return
        self.shared.waiting.pop(self, None)
        self.shared.on_refused(problem.limit)
        before, self.reading = self.reading, Reading.REST
        self.time_reading(None)
        if before is not Reading.BODY and self.answering:
            self.cycle.keep_alive = False  # the request before, whose answer goes on
            self.flow.pause_reading()
            return
        if before is Reading.BODY and (self.cycle.response_started or self.pipeline):
            self.transport.close()
            self.time_writing()
            return
        if self.answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.write(b"".join(self.refusal(problem)))
        self.transport.write_eof()
        self.flow.resume_reading()
        self.time_reading(LINGER_SECONDS, self.transport.abort)

    def refusal(self, problem: LimitExceeded) -> Iterable[bytes]:
        """The answer to a request that is refused."""
        path = (getattr(self, "url", b"") or b"/").partition(b"?")[0].decode("latin-1")
        scope = {"path": api_path(path), "headers": self.headers or []}
        answer = error_response(scope, problem.status, str(problem), problem.headers)
        yield STATUS_LINE[answer.status_code]
        id = f"req_{secrets.token_hex(12)}".encode()
        own = [(b"request-id", id), (b"x-request-id", id), (b"connection", b"close")]
        for name, value in [*self.server_state.default_headers, *ANSWER_HEADERS, *own, *answer.raw_headers]:
            yield b"%b: %b\r\n" % (name, value)
        yield b"\r\n"
        if not self.parser or self.parser.get_method() != b"HEAD":
            yield bytes(answer.body)

    def pause_writing(self) -> None:
        """The client reads more slowly than its answer is made."""
        super().pause_writing()
        self.time_writing()

    def resume_writing(self) -> None:
        """The client has read on."""
        super().resume_writing()
        if self.write_timer and not self.transport.is_closing():
            self.write_timer.cancel()
            self.write_timer = None

    def time_writing(self) -> None:
        """Give the connection up unless the client reads within some seconds."""
        if self.write_timer is None:
            self.write_timer = self.loop.call_later(self.limits.stall_seconds, self.stalled)

    def stalled(self) -> None:
        """Give up a client that reads nothing."""
        self.shared.on_refused("stall_seconds")
        self.transport.abort()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether to stay open when the client sends no more: only while a whole request waits for its answer to begin.

        A client that is gone altogether looks the same until it is sent something, so after a while it is sent `PROBE`
        until its answer begins; the second write to one that is gone fails.
        """
        waits = self.reading is Reading.NOTHING and self.answering and not self.cycle.response_started
        if not waits or self.scope["http_version"] != "1.1":
            return False
        self.cycle.keep_alive = False
        self.probe_timer = self.loop.call_later(PROBE_AFTER_SECONDS, self.probe, NEXT_PROBE_SECONDS)
        return True

    def probe(self, seconds: float) -> None:
        """Find out whether the client is still there, and again after so many seconds."""
        if self.answering and not (self.cycle.response_started or self.pipeline or self.transport.is_closing()):
            self.transport.write(PROBE)
            self.probe_timer = self.loop.call_later(seconds, self.probe, min(2 * seconds, MOST_PROBE_SECONDS))


def limited(shared: Connections[Connection], open_files: int = 1) -> Any:
    """What makes a connection, for uvicorn's `http`; each takes so many of the process's open files."""
    if problem := allow_open_files(open_files * shared.limits.max_connections):
        log.warning("%s", problem)
    return partial(Connection, shared)
