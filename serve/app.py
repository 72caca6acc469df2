"""The Starlette application: routes, limits and errors in the Messages API's form.

What a request means is decided in `messages`, `normalize` and `render`; what is generated, in `engine`. Here one is led
to the other, and back as JSON or server-sent events.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Collection
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import jax
from msgspec.structs import replace
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import engine as eng
from serve.formats import NONE
from serve.messages import (
    ERROR_TYPES,
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    CountTokensRequest,
    Error,
    ErrorDetail,
    Event,
    InvalidRequest,
    MessageDelta,
    MessagesRequest,
    MessageStart,
    MessageStop,
    Ping,
    Stop,
    StopReason,
    TextBlock,
    TextDelta,
    TokenCount,
    Usage,
    decode_count_tokens,
    decode_request,
    encode,
    encode_event,
    new_id,
)
from serve.messages import Message as Answer
from serve.metrics import ServerMetrics
from serve.normalize import RULES, normalize
from serve.parse import AnswerStream, Piece, Stopped, Text
from serve.render import Tokenizer, render
from serve.steps import SamplingParams

log = logging.getLogger("tokenzero.app")

MAX_BODY_BYTES = 32 * 1024 * 1024
PING_SECONDS = 5.0
OPEN_PATHS = ("/", "/health", "/api/hello")
# Overrides the server's rules for one request: a comma-separated list, or `none`. What experiments switch arms with.
RULES_HEADER = "x-tokenzero-normalize"
# Applied rules that a response lists: a header has limits, and proxies have lower ones.
RULES_TOLD = 32

T = TypeVar("T")


@dataclass(frozen=True)
class Serving:
    """Everything a request handler needs; `app.state.serving`."""

    engine: eng.Engine
    tokenizer: Tokenizer
    model_name: str
    stop_ids: frozenset[int]
    rules: frozenset[str]
    metrics: ServerMetrics
    reported: set[str] = field(default_factory=set)  # shapes of unparsed preambles that were logged already


@dataclass(frozen=True)
class Prompt:
    """A request that is ready for the engine."""

    request: CountTokensRequest
    generation: eng.GenerationRequest
    applied: tuple[str, ...]  # the rules that changed it, in order, with their places


def create_app(
    engine: eng.Engine,
    tokenizer: Tokenizer,
    model_name: str,
    stop_ids: Collection[int],
    rules: Collection[str] = ("strip-preamble",),
    api_key: str | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> Starlette:
    """The application over an engine that is not started yet; it starts with the application and ends with it."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        yield
        await run_in_threadpool(engine.stop)

    app = Starlette(
        routes=[
            Route("/v1/messages", post_messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", post_count_tokens, methods=["POST"]),
            Route("/v1/models", get_models, methods=["GET"]),
            Route("/health", get_health, methods=["GET"]),
            Route("/metrics", get_metrics, methods=["GET"]),
            Route("/api/hello", get_hello, methods=["GET"]),
            Route("/", get_hello, methods=["GET"]),
        ],
        middleware=[Middleware(Gate, api_key=api_key, max_body_bytes=max_body_bytes)],
        exception_handlers={
            InvalidRequest: lambda request, error: error_response(400, str(error)),
            TooLarge: lambda request, error: error_response(413, str(error)),
            eng.Overloaded: lambda request, error: error_response(529, str(error), {"retry-after": "1"}),
            ClientDisconnect: lambda request, error: Response(status_code=499),
            HTTPException: on_http_error,
        },
        lifespan=lifespan,
    )
    app.state.serving = Serving(
        engine, tokenizer, model_name, frozenset(stop_ids), frozenset(rules), ServerMetrics(engine)
    )
    return app


class TooLarge(Exception):
    """The body exceeds the server's limit."""


class Gate:
    """Before any route: the key and the body's size. After it: a request id, a count of the answer, 500 for a fault."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int) -> None:
        self.app, self.key, self.limit = app, api_key, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        read, answered = 0, False

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.limit:
                raise TooLarge(f"request body: expected at most {self.limit} bytes, got more")
            return message

        async def labelled(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                message["headers"].append((b"request-id", f"req_{secrets.token_hex(12)}".encode()))
                metrics: ServerMetrics = scope["app"].state.serving.metrics
                # Unknown paths share one label: a client must not be able to grow the metrics.
                path = scope["path"] if scope.get("endpoint") else "other"
                metrics.responses.labels(path, message["status"]).inc()
            await send(message)

        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.limit:
            text = f"request body: expected at most {self.limit} bytes, got {int(declared)}"
            await error_response(413, text)(scope, receive, labelled)
        elif self.key and scope["path"] not in OPEN_PATHS and not self.admits(headers):
            await error_response(401, "invalid x-api-key")(scope, receive, labelled)
        else:
            try:
                await self.app(scope, limited, labelled)
            except Exception as error:
                if answered:
                    raise
                log.exception("%s %s failed", scope["method"], scope["path"])
                await error_response(500, f"{type(error).__name__}: {error}")(scope, receive, labelled)

    def admits(self, headers: dict[bytes, bytes]) -> bool:
        """Whether x-api-key or a Bearer token equals the key, compared in constant time; clients may send both."""
        assert self.key is not None
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        bearer = token.strip() if scheme.lower() == b"bearer" else b""
        key = self.key.encode()
        return hmac.compare_digest(headers.get(b"x-api-key", b""), key) | hmac.compare_digest(bearer, key)


async def post_messages(request: Request) -> Response:
    """`POST /v1/messages`: generate an answer, as JSON or as a stream of events."""
    serving: Serving = request.app.state.serving
    body, received = await request.body(), time.perf_counter()
    wanted = rules_of(request, serving)
    message = await run_in_threadpool(decode_request, body)
    prompt = await run_in_threadpool(prepare, serving, message, wanted)
    events = answer(serving, message, prompt.generation, received)
    headers = {"x-tokenzero-normalized": ", ".join(prompt.applied[:RULES_TOLD])} if prompt.applied else {}
    # The first event is asked for here: a request that the engine refuses is answered by a status, not by a stream.
    first = await unless_gone(request, anext(events))
    if first is None:
        return Response(status_code=499)
    if message.stream and not isinstance(first, Error):
        return StreamingResponse(
            stream(first, events), media_type="text/event-stream", headers=headers | {"cache-control": "no-cache"}
        )
    result = await unless_gone(request, collect(first, events))
    if result is None:
        return Response(status_code=499)
    if isinstance(result, Error):
        return error_response(500, result.error.message)
    return Response(encode(result), media_type="application/json", headers=headers)


async def post_count_tokens(request: Request) -> Response:
    """`POST /v1/messages/count_tokens`: the length of the rendered prompt."""
    serving: Serving = request.app.state.serving
    body, rules = await request.body(), rules_of(request, serving)

    def count() -> int:
        normalized = normalize(decode_count_tokens(body), rules).request
        return len(render(normalized, serving.tokenizer))

    return Response(encode(TokenCount(await run_in_threadpool(count))), media_type="application/json")


async def get_models(request: Request) -> Response:
    """`GET /v1/models`: the one model; requests may call it by any name."""
    serving: Serving = request.app.state.serving
    model = {
        "type": "model",
        "id": serving.model_name,
        "display_name": serving.model_name,
        "created_at": "1970-01-01T00:00:00Z",
        "max_input_tokens": serving.engine.settings.max_model_len,
    }
    return JSONResponse(
        {"data": [model], "has_more": False, "first_id": serving.model_name, "last_id": serving.model_name}
    )


async def get_health(request: Request) -> Response:
    """`GET /health`: 200 while the engine's thread lives, and what it computes on."""
    engine: eng.Engine = request.app.state.serving.engine
    alive = engine.thread.is_alive()
    about = {"dtype": engine.settings.dtype, "device": jax.devices()[0].device_kind} if alive else {}
    return JSONResponse({"status": "ok" if alive else "engine stopped"} | about, 200 if alive else 503)


async def get_metrics(request: Request) -> Response:
    """`GET /metrics`: Prometheus text."""
    return Response(generate_latest(request.app.state.serving.metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def get_hello(request: Request) -> Response:
    """`HEAD /` and `HEAD /api/hello`: what clients probe before they talk."""
    return JSONResponse({"name": "tokenzero"})


def rules_of(request: Request, serving: Serving) -> frozenset[str]:
    """The normaliser's rules for this request: the server's, or those its header names."""
    header = request.headers.get(RULES_HEADER)
    if header is None:
        return serving.rules
    names = frozenset(name.strip() for name in header.split(",")) - {"", "none"}
    if unknown := sorted(names - set(RULES)):
        raise InvalidRequest(f"{RULES_HEADER}: expected some of {', '.join(RULES)} or none, got {', '.join(unknown)}")
    return names


def prepare(serving: Serving, message: MessagesRequest, rules: frozenset[str]) -> Prompt:
    """Normalise, render and tokenise a request, and clamp its `max_tokens` to the room left."""
    normalized = normalize(message, rules)
    for odd in normalized.unparsed:
        serving.metrics.unparsed.inc()
        shape = re.sub(r"=[^;\s]*", "=", odd.text)[:80]  # values may be fresh in every request
        if shape not in serving.reported and len(serving.reported) < 1000:
            serving.reported.add(shape)
            log.warning("%s begins like a billing header but does not parse, and stays: %.120r", odd.where, odd.text)
    for applied in normalized.applied:
        serving.metrics.normalized.labels(applied.rule).inc()
    tokens = render(normalized.request, serving.tokenizer)
    limit = serving.engine.settings.max_model_len
    if len(tokens) >= limit:
        raise InvalidRequest(f"messages: prompt is too long: {len(tokens)} tokens, expected at most {limit - 1}")
    generation = eng.GenerationRequest(
        tokens=tokens,
        max_tokens=min(message.max_tokens, limit - len(tokens)),
        stop_ids=serving.stop_ids,
        sampling=SamplingParams(
            temperature=1.0 if message.temperature is None else message.temperature,
            top_k=message.top_k or 0,
            top_p=1.0 if message.top_p is None else message.top_p,
            seed=secrets.randbits(32),
        ),
    )
    return Prompt(normalized.request, generation, tuple(f"{a.rule} {a.where}" for a in normalized.applied))


async def answer(
    serving: Serving, message: MessagesRequest, generation: eng.GenerationRequest, received: float
) -> AsyncGenerator[Event, None]:
    """The answer as the API's events, in their order: pings while the prompt is computed, then the message.

    `message_start` comes with the first token, when the counts of its usage are known.
    """
    text = AnswerStream(serving.tokenizer.hf.backend_tokenizer, NONE, message.stop_sequences or ())
    usage, sent, sampled = Usage(0), False, 0
    reason: StopReason = "end_turn"
    stop: str | None = None
    async with aclosing(eng.generate(serving.engine, generation, PING_SECONDS)) as events:
        async for event in events:
            pieces: list[Piece] = []
            match event:
                case eng.Waiting():
                    yield Ping()
                case eng.Failed(problem):
                    yield Error(ErrorDetail("api_error", problem))
                    return
                case eng.Started(prompt_tokens, reused) as started:
                    # The last prompt token runs through the model for its logits; its KV is stored with the others.
                    by_tier = {"device": reused - sum(started.restored.values()), **started.restored}
                    usage = Usage(0, prompt_tokens - reused, reused, 0, by_tier)
                    yield MessageStart(Answer(id=new_id("msg"), model=message.model, usage=usage))
                    yield ContentBlockStart(0, TextBlock(""))
                case eng.Sampled(token):
                    sampled += 1
                    pieces = text.feed(token)
                case eng.Finished(why):
                    sampled += why == "stop"
                    reason = "end_turn" if why == "stop" else "max_tokens"
                    pieces = text.finish()
            for piece in pieces:
                match piece:
                    case Text(more):
                        if not sent:
                            serving.metrics.ttft.observe(time.perf_counter() - received)
                            sent = True
                        yield ContentBlockDelta(0, TextDelta(more))
                    case Stopped(sequence):
                        reason, stop = "stop_sequence", sequence
            if stop is not None:
                break
    yield ContentBlockStop(0)
    final = replace(usage, output_tokens=sampled)
    yield MessageDelta(Stop(reason, stop), final)
    yield MessageStop()


async def stream(first: Event, rest: AsyncGenerator[Event, None]) -> AsyncIterator[bytes]:
    """Server-sent events; whatever breaks midway ends the stream with an `error` event."""
    try:
        yield encode_event(first)
        async for event in rest:
            yield encode_event(event)
    except Exception as error:
        log.exception("a stream broke")
        yield encode_event(Error(ErrorDetail("api_error", f"{type(error).__name__}: {error}")))
    finally:
        await rest.aclose()


async def collect(first: Event, rest: AsyncGenerator[Event, None]) -> Answer | Error:
    """The whole answer as one message, or the error that ended it."""
    start: Answer | None = None
    parts: list[str] = []
    async with aclosing(rest):
        events = [first]
        while events:
            match event := events.pop():
                case Error():
                    return event
                case MessageStart(begun):
                    start = begun
                case ContentBlockDelta(_, TextDelta(text)):
                    parts.append(text)
                case MessageDelta(ended, usage):
                    assert start is not None
                    return Answer(
                        id=start.id,
                        model=start.model,
                        content=(TextBlock("".join(parts)),) if any(parts) else (),
                        stop_reason=ended.stop_reason,
                        stop_sequence=ended.stop_sequence,
                        usage=usage,
                    )
            events.append(await anext(rest))
    raise AssertionError("an answer ends with message_delta or error")


async def unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """What `work` returns, or None if the client goes away first; `work` is cancelled then."""
    done, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        return done.result() if done.done() else None
    finally:
        done.cancel()
        gone.cancel()


async def disconnected(request: Request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """An error in the Messages API's form."""
    body = encode(Error(ErrorDetail(ERROR_TYPES.get(status, "invalid_request_error"), message)))
    return Response(body, status, headers, media_type="application/json")


def on_http_error(request: Request, error: Exception) -> Response:
    """Unknown routes and wrong methods."""
    assert isinstance(error, HTTPException)
    path = f"{request.method} {request.url.path}"
    texts = {404: f"no such route: {path}", 405: f"method not allowed: {path}"}
    return error_response(error.status_code, texts.get(error.status_code, error.detail), dict(error.headers or {}))
