"""`python -m serve proxy --upstream URL`: the rules and the divergence report in front of any engine.

The engine speaks the Messages API or OpenAI's. A request's bytes are forwarded as they came, but for what a rule
changes; the answer's as they come. Whatever is no chat request passes untouched. What a prompt shares with the ones
before is found out in a thread, once the request is on its way: nothing waits for it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpcore
import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.app import (
    ASSET_ROUTES,
    MAX_BODY_BYTES,
    RULES_TOLD,
    get_asset,
    get_request,
    get_requests,
    unless_gone,
    wants_page,
)
from serve.assets import PAGE
from serve.gate import OPEN_PATHS, admits, error_response
from serve.messages import CountTokensRequest, Error, ErrorDetail, encode_event
from serve.normalize import DEFAULT_RULES, parse_rules
from serve.openai.errors import error_body
from serve.outcomes import Outcomes
from serve.prepare import warn_once
from serve.render import Prompt, load_tokenizer, prompt
from serve.reports import READERS, Chat, Reports
from serve.sections import vocabulary_of
from serve.splice import FIELDS, normalize_body
from serve.timing import server_timing

log = logging.getLogger("tokenzero.proxy")

VENDOR = "anthropic.com"
# Of one connection, not of what is said over it (RFC 9110, 7.6.1); `expect` was answered by the server in front.
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade expect".split()
)
BODILESS = (204, 304)  # statuses of answers without a body, whatever length they tell
CONNECT_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 4.0  # of an idle connection: uvicorn closes it after 5
SWITCH_SECONDS = 5e-4  # that an event waits for the interpreter while a report is made; Python's own 5 ms are too long
REPORT_HEADER = b"x-tokenzero-report"  # the id under which the proxy reports on a request
# The first event with text, of any of the three APIs; a chunk that has nothing but a role is none.
FIRST_TEXT = re.compile(
    rb'"content_block_delta"|_text\.delta"|arguments\.delta"|"delta": ?\{(?!"role":"assistant","content":""\})[^}]*"'
)
GENERATED = re.compile(rb'"(?:output|completion)_tokens": ?(\d+)')
Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Upstream:
    """The engine behind the proxy."""

    scheme: bytes
    host: bytes
    port: int | None
    path: bytes = b""  # in front of every path
    timeout: float = 600.0  # seconds without a byte before a request is given up

    @property
    def authority(self) -> bytes:
        """What the `host` header says."""
        host = b"[%b]" % self.host if b":" in self.host else self.host
        return host if self.port is None else b"%b:%d" % (host, self.port)


class UpstreamFault(Exception):
    """The engine cannot be reached or breaks HTTP's rules; `status` is 502, or 504 where it is too slow."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def create_proxy(
    upstream: Upstream, rules: frozenset[str], reports: Reports | None = None, api_key: str | None = None
) -> Starlette:
    """The application in front of an engine."""
    pool = httpcore.AsyncConnectionPool(
        max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_ALIVE_SECONDS
    )
    reports = reports or Reports()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await pool.aclose()
        await run_in_threadpool(reports.thread.shutdown, cancel_futures=True)

    forward = Proxy(upstream, pool, rules, reports)
    app = Starlette(routes=routes(forward), middleware=[Middleware(Locked, api_key=api_key)], lifespan=lifespan)
    app.state.serving = reports  # all that the routes of reports need of it
    return app


def routes(forward: ASGIApp) -> list[BaseRoute]:
    """What the proxy answers itself; all else is forwarded."""
    return [
        Route("/v1/requests", get_requests, methods=["GET"]),
        Route("/v1/requests/{id}", get_request, methods=["GET"]),
        *ASSET_ROUTES,
        Route("/", Root(forward)),
        Mount("", app=forward),
    ]


class Root:
    """At `/`: the dashboard for browsers, the engine's own answer for all others."""

    def __init__(self, forward: ASGIApp) -> None:
        self.forward = forward

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or forward."""
        request = Request(scope)
        app = await get_asset(PAGE, request) if wants_page(request) else self.forward
        await app(scope, receive, send)


class Locked:
    """In front of every route: the key."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self.app, self.key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on."""
        locked = scope["type"] == "http" and self.key and scope["path"] not in OPEN_PATHS
        if locked and not admits(self.key or "", dict(scope["headers"])):
            await error_response(scope, 401, "invalid x-api-key")(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class Proxy:
    """Forwards whatever comes."""

    def __init__(
        self, upstream: Upstream, pool: httpcore.AsyncConnectionPool, rules: frozenset[str], reports: Reports
    ) -> None:
        self.upstream, self.pool, self.rules, self.reports = upstream, pool, rules, reports
        self.reported: set[str] = set()  # shapes of unparsed preambles that were logged already

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward one request, and what is answered; a client that goes away takes its request to the engine along."""
        if scope["type"] != "http":
            return
        uploaded = asyncio.Event()  # what the client sends until then is its body

        async def after_upload() -> Message:
            await uploaded.wait()
            return await receive()

        try:
            request = Request(scope, receive)
            content = await self.read(request)
            await unless_gone(Request(scope, after_upload), self.exchange(request, content, uploaded, send))
        except ClientDisconnect:
            log.debug("%s: the client went away while it sent its body", scope["path"])

    async def read(self, request: Request) -> Chat | AsyncIterator[bytes]:
        """A chat request, after the rules; of anything else the body, still to be read."""
        path = request.scope["path"]
        if request.method != "POST" or path not in FIELDS:
            return request.stream()
        body, rest = await read_whole(request.stream())
        received = time.perf_counter()
        if rest is not None:
            return rest
        normal = normalize_body(body, path, self.rules)
        held_s = time.perf_counter() - received
        for odd in normal.unparsed:
            warn_once(odd, self.reported)
        applied = tuple(f"{note.rule} {note.where}" for note in normal.applied)
        agent = request.headers.get("user-agent", "")
        return Chat(f"req_{secrets.token_hex(12)}", path, agent, normal.body, applied, received, held_s)

    async def exchange(
        self, request: Request, content: Chat | AsyncIterator[bytes], uploaded: asyncio.Event, send: Send
    ) -> None:
        """Send a request and hand on the answer, or say what is wrong with the engine."""
        try:
            answer = await self.open(request, content, uploaded)
            try:
                if isinstance(content, Chat) and answer.status not in BODILESS:
                    await relay_chat(content, answer, send, self.reports.outcomes)
                else:
                    await relay(answer, send)
            finally:
                await answer.aclose()
        except UpstreamFault as fault:
            log.warning("%s %s: %s", request.method, request.scope["path"], fault)
            await error_response(request.scope, fault.status, str(fault))(request.scope, request.receive, send)

    async def open(
        self, request: Request, content: Chat | AsyncIterator[bytes], uploaded: asyncio.Event
    ) -> httpcore.Response:
        """The head of the engine's answer; raises UpstreamFault.

        A request that is at hand is sent once more where its connection ends without an answer: the engine may have
        closed it while it was idle, or left bytes on it that belong to no answer.
        """
        chat = content if isinstance(content, Chat) else None
        untold = [chat] if chat else []
        if chat:
            uploaded.set()

        async def body() -> AsyncIterator[bytes]:
            if isinstance(content, Chat):
                yield content.body
                while untold:
                    self.reports.submit(untold.pop())
            else:
                async for piece in content:
                    yield piece
                uploaded.set()

        url = httpcore.URL(
            scheme=self.upstream.scheme,
            host=self.upstream.host,
            port=self.upstream.port,
            target=self.upstream.path + target(request.scope),
        )
        headers = request_headers(request.headers.raw, self.upstream.authority, len(chat.body) if chat else None)
        patience = self.upstream.timeout
        limits = {"connect": min(CONNECT_SECONDS, patience), "read": patience, "write": patience}

        async def attempt() -> httpcore.Response:
            extensions = {"timeout": limits}
            sent = httpcore.Request(request.method, url, headers=headers, content=body(), extensions=extensions)
            return await self.pool.handle_async_request(sent)

        with faults():
            try:
                return await attempt()
            except (httpcore.RemoteProtocolError, httpcore.ReadError):
                if not chat and request.method not in ("GET", "HEAD"):
                    raise
            return await attempt()


@contextmanager
def faults() -> Iterator[None]:
    """Turn what the HTTP client raises into UpstreamFault."""
    try:
        yield
    except httpcore.TimeoutException as error:
        raise UpstreamFault(504, f"the upstream is too slow: {type(error).__name__}") from error
    except (httpcore.NetworkError, httpcore.ProtocolError) as error:
        raise UpstreamFault(502, f"the upstream failed: {type(error).__name__}: {error}") from error


async def relay(answer: httpcore.Response, send: Send) -> None:
    """Hand on an answer piece by piece; one that breaks off ends the client's connection, too."""
    without = (b"content-length",) if answer.status in BODILESS else ()
    headers = end_to_end(answer.headers, *without)
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    try:
        async for piece in pieces(answer):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    except UpstreamFault as fault:
        # Without its last message the server in front closes the connection: the client sees that something is missing.
        log.warning("an answer broke off: %s", fault)
        return
    await send({"type": "http.response.body", "body": b""})


async def relay_chat(chat: Chat, answer: httpcore.Response, send: Send, outcomes: Outcomes) -> None:
    """Hand on the answer to a chat request: event by event, or whole. Raises UpstreamFault before anything is sent."""
    given = {name.lower(): value for name, value in answer.headers}
    headers = end_to_end(answer.headers, b"content-length")
    headers.append((b"server-timing", server_timing({"proxy": chat.held_s}).encode()))
    headers += [(REPORT_HEADER, chat.id.encode())] if chat.path in READERS else []
    if chat.applied:
        headers.append((b"x-tokenzero-normalized", ", ".join(chat.applied[:RULES_TOLD]).encode()))
    encoded = b"content-encoding" in given
    kind = given.get(b"content-type", b"").partition(b";")[0].strip().lower()
    start: Message = {"type": "http.response.start", "status": answer.status, "headers": headers}
    if kind != b"text/event-stream":
        body = b"".join([piece async for piece in pieces(answer)])
        if kind == b"application/json" and b"content-length" in given and not encoded and not is_json(body):
            raise UpstreamFault(502, f"the upstream failed: its {len(body)} bytes, as content-length says, are no JSON")
        headers.append((b"content-length", str(len(body)).encode()))
        await send(start)
        await send({"type": "http.response.body", "body": body})
        outcomes.note(chat.id, state="done", generated_tokens=generated_tokens(body))
        return
    await send(start)
    sent = pending = counted = b""
    waiting, state = True, "broken off"
    try:
        async for piece in pieces(answer):
            # Whole events only: an error must not end up within one.
            pending += piece
            if end := len(pending) if encoded else end_of_events(pending):
                sent, pending = pending[:end], pending[end:]
                await send({"type": "http.response.body", "body": sent, "more_body": True})
                counted = sent if b"_tokens" in sent else counted
                if waiting and FIRST_TEXT.search(sent):
                    waiting = False
                    outcomes.note(chat.id, ttft_ms=1000 * (time.perf_counter() - chat.received))
        state = "done"
    except UpstreamFault as fault:
        log.warning("POST %s: a stream broke off: %s", chat.path, fault)
        if encoded:
            return  # as in `relay`
        pending = error_event(chat.path, str(fault), sent)
    finally:
        outcomes.note(chat.id, state=state, generated_tokens=generated_tokens(counted))
    await send({"type": "http.response.body", "body": pending})


async def pieces(answer: httpcore.Response) -> AsyncIterator[bytes]:
    """The body of an answer as it comes; raises UpstreamFault where it breaks off."""
    with faults():
        async for piece in answer.aiter_stream():
            yield piece


def generated_tokens(answer: bytes) -> int:
    """What an answer, or its latest events, tell of their usage; 0 if nothing."""
    counts = GENERATED.findall(answer)
    return int(counts[-1]) if counts else 0


def end_of_events(data: bytes) -> int:
    """Where the last whole event of a stream ends; 0 if none does."""
    return max((at + len(end) for end in (b"\n\n", b"\r\n\r\n") if (at := data.rfind(end)) >= 0), default=0)


def error_event(path: str, text: str, before: bytes) -> bytes:
    """What ends a stream of the API at `path`; `before` are its latest events."""
    if path == "/v1/chat/completions":
        return b"data: " + error_body(502, text, path) + b"\n\n"
    if path == "/v1/responses":
        numbers = re.findall(rb'"sequence_number": ?(\d+)', before)
        number = int(numbers[-1]) + 1 if numbers else 0
        error = {"type": "error", "code": "server_error", "message": text, "param": None, "sequence_number": number}
        return b"event: error\ndata: " + msgspec.json.encode(error) + b"\n\n"
    return encode_event(Error(ErrorDetail("api_error", text)))


async def read_whole(stream: AsyncIterator[bytes]) -> tuple[bytes, AsyncIterator[bytes] | None]:
    """A body, and None; or nothing, and a body that is too long to be looked at."""
    read: list[bytes] = []
    size = 0

    async def all_of_it() -> AsyncIterator[bytes]:
        for piece in read:
            yield piece
        async for piece in stream:
            yield piece

    async for piece in stream:
        read.append(piece)
        size += len(piece)
        if size > MAX_BODY_BYTES:
            return b"", all_of_it()
    return b"".join(read), None


def target(scope: Scope) -> bytes:
    """Path and query as the client wrote them."""
    query = scope["query_string"]
    return scope["raw_path"] + (b"?" + query if query else b"")


def request_headers(given: Headers, authority: bytes, length: int | None) -> Headers:
    """A client's headers for the engine; `length` of the body if it is known, otherwise as the client sends it."""
    kept = [(name, value) for name, value in end_to_end(given, b"host") if length is None or name != b"content-length"]
    if length is not None:
        kept.append((b"content-length", str(length).encode()))
    elif any(name == b"transfer-encoding" for name, _ in given):
        kept.append((b"transfer-encoding", b"chunked"))
    return [(b"host", authority), *kept]


def end_to_end(headers: Headers, *without: bytes) -> Headers:
    """The headers that are forwarded: not those of one connection, nor those `without`."""
    named = b",".join(value for name, value in headers if name.lower() == b"connection")
    dropped = HOP_BY_HOP.union(without, (name.strip().lower() for name in named.split(b",")))
    return [(name, value) for name, value in headers if name.lower() not in dropped]


def is_json(body: bytes) -> bool:
    """Whether a body is JSON, as most readers take it."""
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from serve.__main__ import Normalize

    cli = argparse.ArgumentParser(
        prog="python -m serve proxy",
        usage="%(prog)s --upstream URL [options]",
        description="Put the rules for prompts and the divergence report in front of any Messages or OpenAI engine.",
    )
    cli.add_argument("--upstream", required=True, metavar="URL", help="the engine, such as http://127.0.0.1:8000")
    cli.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to bind; beyond loopback it takes an --api-key (default: %(default)s)",
    )
    cli.add_argument("--port", type=int, default=8080, help="default: %(default)s")
    cli.add_argument("--api-key", metavar="KEY", help="in x-api-key or as Bearer (default: $TOKENZERO_API_KEY)")
    cli.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds without a byte from the upstream before a request is given up (default: %(default)s)",
    )
    cli.add_argument(
        "--normalize",
        action=Normalize,
        default=",".join(sorted(DEFAULT_RULES)),
        metavar="RULES",
        help="rules for prompts, comma-separated, or none; list explains them (default: %(default)s)",
    )
    cli.add_argument(
        "--model",
        metavar="DIR",
        help="checkpoint whose tokenizer counts positions in reports (default: in characters)",
    )
    cli.add_argument(
        "--trace-text", choices=["on", "off"], default="on", help="off: reports show no words (default: %(default)s)"
    )
    return cli


def parse_upstream(url: str, rules: frozenset[str], timeout: float) -> Upstream:
    """The engine at a URL; raises ValueError if it is none, or one that these rules must not be applied for."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"expected a URL such as http://127.0.0.1:8000, got {url!r:.80}")
    host = parts.hostname.rstrip(".")
    if rules and (host == VENDOR or host.endswith(f".{VENDOR}")):
        raise ValueError(f"{host} authenticates by what {', '.join(sorted(rules))} would change: add --normalize none")
    if "tools-first" in rules:
        raise ValueError("tools-first is done where prompts are rendered: leave it out of --normalize")
    if not timeout > 0:
        raise ValueError(f"expected a --timeout above 0 seconds, got {timeout}")
    return Upstream(parts.scheme.encode(), host.encode(), parts.port, parts.path.rstrip("/").encode(), timeout)


def reports_of(model: str | None, show_text: bool) -> Reports:
    """Reports in tokens of a checkpoint's tokenizer, or in characters; raises ValueError for a folder without one."""
    if not model:
        return Reports(show_text=show_text)
    tokenizer = load_tokenizer(model)

    def render(request: CountTokensRequest, tools_first: bool) -> Prompt:
        return prompt(request, tokenizer, tools_first=tools_first)

    return Reports(render, vocabulary_of(tokenizer.hf), "tokens", show_text)


def main(argv: Sequence[str]) -> None:
    """Parse, and forward until interrupted."""
    import uvicorn

    from serve.__main__ import is_loopback

    cli = parser()
    args = cli.parse_args(argv)
    key = args.api_key or os.environ.get("TOKENZERO_API_KEY")
    if not key and not is_loopback(args.host):
        cli.error(f"--host {args.host} is reachable from elsewhere: give an --api-key, or bind 127.0.0.1")
    try:
        rules = parse_rules(args.normalize)
        upstream = parse_upstream(args.upstream, rules, args.timeout)
    except ValueError as error:
        cli.error(str(error))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    try:
        reports = reports_of(args.model, args.trace_text == "on")
    except ValueError as error:
        sys.exit(f"proxy: {error}")
    sys.setswitchinterval(SWITCH_SECONDS)
    app = create_proxy(upstream, rules, reports, key)
    uvicorn.run(
        app,
        host=args.host,
        port=args.port,
        log_level="info",
        access_log=False,
        # The upstream's are forwarded.
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=10,
    )
