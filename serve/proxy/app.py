"""The proxy's application: a request's bytes are forwarded unchanged, except where a rule changes them.

The answer's bytes are forwarded as they arrive, and so is every request that is not a chat request. The comparison with
earlier prompts runs in a thread while the engine works.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpcore
import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.proxy.chat import Chat, chat_route, edit_body
from serve.proxy.relay import BODILESS, relay, relay_chat
from serve.proxy.reports import Reports
from serve.proxy.upstream import Upstream, UpstreamFault, faults, request_headers
from serve.rules.body import Unread
from serve.rules.log import warn_once
from serve.web.access import OPEN_PATHS, admits, error_response
from serve.web.assets import PAGE
from serve.web.pages import (
    ASSET_ROUTES,
    MAX_BODY_BYTES,
    get_asset,
    get_request,
    latest_records,
    until_disconnect,
    wants_page,
)

log = logging.getLogger("tokenzero.proxy")

CONNECT_SECONDS = 10.0
AT_ONCE_BYTES = 2**18  # of a body that the event loop processes without a pause
KEEP_ALIVE_SECONDS = 4.0  # of an idle connection: uvicorn closes it after 5


def create_proxy(
    upstream: Upstream, rules: frozenset[str], reports: Reports | None = None, api_key: str | None = None
) -> Starlette:
    """The application before the engine at `upstream`."""
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
    app = Starlette(
        routes=routes(forward), middleware=[Middleware(ApiKeyMiddleware, api_key=api_key)], lifespan=lifespan
    )
    app.state.records = reports
    return app


def routes(forward: ASGIApp) -> list[BaseRoute]:
    """The routes that the proxy answers itself; everything else is forwarded."""
    return [
        Route("/v1/requests", get_requests, methods=["GET"]),
        Route("/v1/requests/{id}", get_request, methods=["GET"]),
        *ASSET_ROUTES,
        Route("/", Root(forward)),
        Mount("", app=forward),
    ]


async def get_requests(request: Request) -> Response:
    """`GET /v1/requests`: what the server has there, and how many requests passed without rules or report, and why."""
    reports: Reports = request.app.state.records

    def encode() -> bytes:
        return msgspec.json.encode(latest_records(reports) | reports.left_out())

    return Response(await run_in_threadpool(encode), media_type="application/json")


class Root:
    """At `/`: the dashboard for browsers, the engine's own answer for other clients."""

    def __init__(self, forward: ASGIApp) -> None:
        self.forward = forward

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or forward."""
        request = Request(scope)
        app = await get_asset(PAGE, request) if wants_page(request) else self.forward
        await app(scope, receive, send)


class ApiKeyMiddleware:
    """The check of the API key, before every route."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self.app, self.key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it on."""
        # Some engines generate at `POST /`.
        is_open = scope["path"] in OPEN_PATHS and scope.get("method") in ("GET", "HEAD")
        locked = scope["type"] == "http" and self.key and not is_open
        if locked and not admits(self.key or "", dict(scope["headers"])):
            form = {**scope, "path": chat_route(scope["path"]) or scope["path"]}
            await error_response(form, 401, "invalid x-api-key")(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class Proxy:
    """Forwards every request to the engine."""

    def __init__(
        self, upstream: Upstream, pool: httpcore.AsyncConnectionPool, rules: frozenset[str], reports: Reports
    ) -> None:
        self.upstream, self.pool, self.rules, self.reports = upstream, pool, rules, reports
        self.reported: set[str] = set()  # shapes of unparsed preambles that were logged already

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward one request and its answer; if the client disconnects, the request to the engine is cancelled."""
        if scope["type"] != "http":
            return
        uploaded = asyncio.Event()  # what the client sends before this is its body

        async def after_upload() -> Message:
            await uploaded.wait()
            return await receive()

        try:
            request = Request(scope, receive)
            content = await self.read(request)
            await until_disconnect(Request(scope, after_upload), self.exchange(request, content, uploaded, send))
        except ClientDisconnect:
            log.debug("%s: the client disconnected while it sent its body", scope["path"])

    async def read(self, request: Request) -> Chat | AsyncIterator[bytes]:
        """A chat request after the rules; for any other request the body, not read yet."""
        route = chat_route(request.scope["path"])
        if request.method != "POST" or route is None:
            return request.stream()
        body, rest = await read_whole(request.stream())
        received = time.perf_counter()
        if rest is not None:
            self.note(route, Unread("too_large", f"expected at most {MAX_BODY_BYTES} bytes, got more"))
            return rest
        encodings = ",".join(request.headers.getlist("content-encoding"))
        if encodings or len(body) > AT_ONCE_BYTES:
            edited, changed = await run_in_threadpool(edit_body, body, encodings, route, self.rules)
        else:
            edited, changed = edit_body(body, encodings, route, self.rules)
        held_s = time.perf_counter() - received
        for odd in edited.unparsed:
            warn_once(odd, self.reported)
        if edited.unread:
            self.note(route, edited.unread)
        return Chat(
            id=f"req_{secrets.token_hex(12)}",
            path=route,
            agent=request.headers.get("user-agent", ""),
            sent=edited.body if changed else body,
            decoded=changed,
            body=edited.body,
            applied=tuple(f"{note.rule} {note.where}" for note in edited.applied),
            received=received,
            held_s=held_s,
        )

    def note(self, route: str, unread: Unread) -> None:
        """Count a request to which no rule could be applied; without rules, nothing is lost."""
        if self.rules:
            self.reports.without_rules.note(unread.reason, f"POST {route}: no rule was applied: {unread.text}")

    async def exchange(
        self, request: Request, content: Chat | AsyncIterator[bytes], uploaded: asyncio.Event, send: Send
    ) -> None:
        """Send a request and forward the answer, or answer with what is wrong with the engine."""
        try:
            answer = await self.open(request, content, uploaded)
            try:
                if isinstance(content, Chat) and answer.status not in BODILESS:
                    await relay_chat(content, answer, send, self.reports)
                else:
                    await relay(answer, send)
            finally:
                await answer.aclose()
        except UpstreamFault as fault:
            log.warning("%s %s: %s", request.method, request.scope["path"], fault)
            scope = {**request.scope, "path": content.path if isinstance(content, Chat) else request.scope["path"]}
            await error_response(scope, fault.status, str(fault))(request.scope, request.receive, send)
        finally:
            if isinstance(content, Chat):
                self.reports.forget(content.id)

    async def open(
        self, request: Request, content: Chat | AsyncIterator[bytes], uploaded: asyncio.Event
    ) -> httpcore.Response:
        """The head of the engine's answer; raises UpstreamFault.

        A request whose body is in memory is sent once more if its connection ends without an answer: the engine may
        have closed the connection while it was idle, or left bytes on it that belong to no answer.
        """
        chat = content if isinstance(content, Chat) else None
        unreported = [chat] if chat else []
        if chat:
            uploaded.set()

        async def body() -> AsyncIterator[bytes]:
            if isinstance(content, Chat):
                for start in range(0, len(content.sent), AT_ONCE_BYTES):
                    yield bytes(content.sent[start : start + AT_ONCE_BYTES])
                while unreported:
                    self.reports.submit(unreported.pop())
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
        headers = request_headers(
            request.headers.raw, self.upstream, len(chat.sent) if chat else None, decoded=bool(chat and chat.decoded)
        )
        timeout = self.upstream.timeout
        limits = {"connect": min(CONNECT_SECONDS, timeout), "read": timeout, "write": timeout}

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


async def read_whole(stream: AsyncIterator[bytes]) -> tuple[bytes | bytearray, AsyncIterator[bytes] | None]:
    """A body and None; or b"" and a stream, for a body that is too long to be read whole."""
    read = bytearray()  # gathered as it arrives: joining its pieces at the end would hold the event loop

    async def whole() -> AsyncIterator[bytes]:
        for start in range(0, len(read), AT_ONCE_BYTES):
            yield bytes(read[start : start + AT_ONCE_BYTES])
        async for piece in stream:
            yield piece

    async for piece in stream:
        read += piece
        if len(read) > MAX_BODY_BYTES:
            return b"", whole()
    return read, None


def target(scope: Scope) -> bytes:
    """The path and query as the client wrote them."""
    query = scope["query_string"]
    path: bytes = scope["raw_path"]
    return path + (b"?" + query if query else b"")
