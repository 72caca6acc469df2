"""Forwarding: a request's bytes to an engine, unchanged except where a rule changes them, and its answer back.

Of several engines, one that refuses, breaks off or is silent before the first token is replaced by another.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial

import httpcore
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from serve.proxy.chat import Chat, chat_route, edit_body
from serve.proxy.fleet import Attempt, Fleet
from serve.proxy.prefix import Prompt, read_prompt
from serve.proxy.relay import BODILESS, ClientSide, relay, relay_chat
from serve.proxy.reports import APIS, Reports
from serve.proxy.upstream import (
    FAILURES,
    REFUSALS,
    Refused,
    Upstream,
    UpstreamFault,
    end_to_end,
    faults,
    pieces,
    request_headers,
    retry_after,
)
from serve.rules.body import EditedBody, Unread
from serve.rules.log import warn_once
from serve.web.access import STOPPING, error_response
from serve.web.agents import shown_ids
from serve.web.headers import SALT_HEADER
from serve.web.pages import MAX_BODY_BYTES, until_disconnect

log = logging.getLogger("tokenzero.proxy")

CONNECT_SECONDS = 10.0
AT_ONCE_BYTES = 2**18  # of a body that the event loop processes without a pause
MOST_BREAKS = 2  # engines that may break on a request before it is given up
LAST_SECONDS = 5.0  # for the last bytes of answers that were ended
POLL_SECONDS = 0.02
QUESTION_SECONDS = 5.0  # that an engine has to answer `/health`


class Proxy:
    """Forwards every request to an engine."""

    def __init__(
        self, fleet: Fleet, pool: httpcore.AsyncConnectionPool, rules: frozenset[str], reports: Reports
    ) -> None:
        self.fleet, self.pool, self.rules, self.reports = fleet, pool, rules, reports
        self.reported: set[str] = set()  # shapes of unparsed preambles that were logged already
        self.limits: set[asyncio.Timeout] = set()  # of the exchanges that run
        self.stopped = False

    async def stop(self) -> None:
        """End all exchanges with an error, and return when they have, or after a few seconds."""
        self.stopped = True
        loop = asyncio.get_running_loop()
        end = loop.time() + LAST_SECONDS
        for limit in self.limits:
            limit.reschedule(loop.time())
        while self.limits and loop.time() < end:
            await asyncio.sleep(POLL_SECONDS)

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
        id = f"req_{secrets.token_hex(12)}"
        read_body = partial(self.read_body, id, body, encodings, route, request.headers)
        if encodings or len(body) > AT_ONCE_BYTES:
            edited, changed, prompt = await run_in_threadpool(read_body)
        else:
            edited, changed, prompt = read_body()
        held_s = time.perf_counter() - received
        for odd in edited.unparsed:
            warn_once(odd, self.reported)
        if edited.unread:
            self.note(route, edited.unread)
        if named := shown_ids(request.headers):
            self.reports.statuses.update(id, **named)
        return Chat(
            id=id,
            path=route,
            agent=request.headers.get("user-agent", ""),
            sent=edited.body if changed else body,
            decoded=changed,
            body=edited.body,
            applied=tuple(f"{note.rule} {note.where}" for note in edited.applied),
            received=received,
            held_s=held_s,
            salt=request.headers.get(SALT_HEADER, ""),
            key=key.name if (key := request.scope.get("key")) else "",
            prompt=prompt,
        )

    def read_body(
        self, id: str, body: bytes | bytearray, encodings: str, route: str, headers: Mapping[str, str]
    ) -> tuple[EditedBody, bool, Prompt | None]:
        """A body after the rules, whether any rule changed it, and its prompt if there is a choice of upstreams."""
        edited, changed = edit_body(body, encodings, route, self.rules)
        routed = self.fleet.several and route in APIS
        return edited, changed, read_prompt(id, edited.body, route, headers) if routed else None

    def note(self, route: str, unread: Unread) -> None:
        """Count a request to which no rule could be applied; without rules, nothing is lost."""
        if self.rules:
            self.reports.without_rules.note(unread.reason, f"POST {route}: no rule was applied: {unread.text}")

    async def exchange(
        self, request: Request, content: Chat | AsyncIterator[bytes], uploaded: asyncio.Event, send: Send
    ) -> None:
        """Send a request and forward the answer, or answer with what is wrong with the engine."""
        chat = content if isinstance(content, Chat) else None
        client, path = ClientSide(send), chat.path if chat else request.scope["path"]
        try:
            async with self.until_stopped():
                if self.fleet.several:
                    await self.exchange_with_any(request, content, uploaded, client)
                else:
                    await self.attempt(self.fleet.only(), request, content, uploaded, client)
        except UpstreamFault as fault:
            log.warning("%s %s: %s", request.method, request.scope["path"], fault)
            if not client.begun:
                scope = {**request.scope, "path": path}
                await error_response(scope, fault.status, str(fault))(request.scope, request.receive, send)
            elif chat:
                await client.fail(path, fault)
        finally:
            if chat:
                self.reports.forget(chat.id)

    @asynccontextmanager
    async def until_stopped(self) -> AsyncIterator[None]:
        """Run an exchange; raises UpstreamFault in it once the proxy stops."""
        limit = asyncio.timeout(0 if self.stopped else None)
        self.limits.add(limit)
        try:
            async with limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise UpstreamFault(529, STOPPING) from None
        finally:
            self.limits.discard(limit)

    async def exchange_with_any(
        self, request: Request, content: Chat | AsyncIterator[bytes], uploaded: asyncio.Event, client: ClientSide
    ) -> None:
        """Send a request to one upstream after another until one answers. Raises the last one's UpstreamFault."""
        chat = content if isinstance(content, Chat) else None
        can_repeat = chat is not None or request.method in ("GET", "HEAD")
        tried: list[str] = []
        breaks = 0
        refusal: Refused | None = None
        while True:
            attempt = self.fleet.next(chat.prompt if chat else None, tried, self.reports.statuses)
            tried.append(attempt.member.name)
            attempt.replaceable &= can_repeat
            try:
                async with attempt.running():
                    await self.attempt(attempt.member.upstream, request, content, uploaded, client, attempt)
                return
            except Refused as refused:
                refusal = refused
                breaks += refused.error in FAILURES
                if breaks == MOST_BREAKS:
                    break
                log.warning("%s: %s: trying another", attempt.member.name, refused)
            except UpstreamFault as fault:
                # Connecting harms nobody. A request that has reached two engines before they broke may be the cause.
                breaks += not fault.unsent
                if (
                    len(tried) == len(self.fleet.members)
                    or client.settled
                    or breaks == MOST_BREAKS
                    or not (can_repeat or fault.unsent)
                ):
                    if refusal and not client.settled:
                        break
                    raise
                log.warning("%s: %s: trying another", attempt.member.name, fault)
        if client.begun and not refusal.is_stream:
            raise UpstreamFault(502, str(refusal))
        await client.whole(refusal.status, refusal.headers, refusal.body)

    async def attempt(
        self,
        upstream: Upstream,
        request: Request,
        content: Chat | AsyncIterator[bytes],
        uploaded: asyncio.Event,
        client: ClientSide,
        progress: Attempt | None = None,
    ) -> None:
        """Send a request to one upstream and forward the answer.

        Raises UpstreamFault, and Refused where the attempt is replaceable.
        """
        answer = await self.open(upstream, request, content, uploaded)
        try:
            if progress and answer.status in (*REFUSALS, *FAILURES):
                progress.refused(answer.status, retry_after(answer.headers))
                if progress.replaceable:
                    body = b"".join([piece async for piece in pieces(answer)])
                    raise Refused(answer.status, answer.status, end_to_end(answer.headers, b"content-length"), body)
            if isinstance(content, Chat) and answer.status not in BODILESS:
                await relay_chat(content, answer, client, self.reports, progress)
            else:
                await relay(answer, client)
        finally:
            await answer.aclose()

    async def open(
        self, upstream: Upstream, request: Request, content: Chat | AsyncIterator[bytes], uploaded: asyncio.Event
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
            scheme=upstream.scheme, host=upstream.host, port=upstream.port, target=upstream.path + target(request.scope)
        )
        headers = request_headers(
            request.headers.raw, upstream, len(chat.sent) if chat else None, decoded=bool(chat and chat.decoded)
        )
        limits = {
            "connect": min(CONNECT_SECONDS, upstream.timeout),
            "read": upstream.timeout,
            "write": upstream.timeout,
        }

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
        try:
            with faults():
                return await attempt()
        except UpstreamFault as fault:
            fault.unsent = False  # the first time, it was: perhaps that is why nobody listens any more
            raise


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


async def answers_health(pool: httpcore.AsyncConnectionPool, upstream: Upstream) -> bool:
    """Whether an engine answers `GET /health`; any answer does that is not one of a server's errors."""
    url = httpcore.URL(
        scheme=upstream.scheme, host=upstream.host, port=upstream.port, target=upstream.path + b"/health"
    )
    headers = request_headers([], upstream, None)
    try:
        with faults():
            async with asyncio.timeout(QUESTION_SECONDS), pool.stream("GET", url, headers=headers) as answer:
                return answer.status < 500
    except (UpstreamFault, TimeoutError):
        return False
