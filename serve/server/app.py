"""The Starlette application: routes, and answers as JSON or server-sent events.

What happens to a request between its body and its answer is in `serving`; what stands in front of every route is in
`gate`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Protocol

import jax
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve.api.answers import Error, ErrorDetail, Event, Message, TokenCount, encode, encode_event
from serve.api.messages import InvalidRequest, MessagesRequest, decode_count_tokens, decode_request
from serve.api.openai import read_chat, read_responses
from serve.api.openai.errors import is_openai
from serve.api.openai.models import model_body, models_body
from serve.engine.inbox import Overloaded
from serve.rules.normalize import parse_rules
from serve.server.answer import answer, collect
from serve.server.context import RequestContext, ServerContext, unrendered
from serve.server.heartbeat import beating
from serve.server.middleware import RequestGuardMiddleware, TooLarge
from serve.server.prepare import Prepared, prepare, prompt_length
from serve.server.trim import trimming
from serve.web.access import error_response
from serve.web.assets import PAGE
from serve.web.pages import (
    ASSET_ROUTES,
    MAX_BODY_BYTES,
    MAX_LISTED_RULES,
    get_asset,
    get_request,
    get_requests,
    until_disconnect,
    wants_page,
)
from serve.web.timing import Phases

log = logging.getLogger("tokenzero.app")

# Overrides the server's rules for one request: a comma-separated list, or `none`. What experiments switch arms with.
RULES_HEADER = "x-tokenzero-normalize"
# Requests with different salts share no page and no sampled turn.
SALT_HEADER = "x-tokenzero-cache-salt"


def create_app(serving: ServerContext, api_key: str | None = None, max_body_bytes: int = MAX_BODY_BYTES) -> Starlette:
    """The application over an engine that is not started yet; it starts with the application and ends with it."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine = serving.engine
        engine.start()
        trimmer = asyncio.create_task(
            trimming(lambda: engine.counters.steps, lambda: not engine.running and not engine.waiting)
        )
        async with beating(serving.metrics.lag.observe):
            yield
        trimmer.cancel()
        # Both at once: each may take all of the time that stopping may.
        await asyncio.gather(
            run_in_threadpool(engine.stop),
            run_in_threadpool(serving.replay.close, engine.settings.stop_seconds),
        )

    app = Starlette(
        routes=[
            Route("/v1/messages", partial(post_answer, read_messages), methods=["POST"]),
            Route("/v1/chat/completions", partial(post_answer, read_chat), methods=["POST"]),
            Route("/v1/responses", partial(post_answer, read_responses), methods=["POST"]),
            Route("/v1/messages/count_tokens", post_count_tokens, methods=["POST"]),
            Route("/v1/requests", get_requests, methods=["GET"]),
            Route("/v1/requests/{id}", get_request, methods=["GET"]),
            Route("/v1/models", get_models, methods=["GET"]),
            Route("/v1/models/{id:path}", get_model, methods=["GET"]),
            Route("/health", get_health, methods=["GET"]),
            Route("/metrics", get_metrics, methods=["GET"]),
            Route("/api/hello", get_hello, methods=["GET"]),
            Route("/", get_root, methods=["GET"]),
            *ASSET_ROUTES,
        ],
        middleware=[
            Middleware(RequestGuardMiddleware, api_key=api_key, max_body_bytes=max_body_bytes, metrics=serving.metrics)
        ],
        exception_handlers={
            InvalidRequest: lambda request, error: error_response(request.scope, 400, str(error)),
            TooLarge: lambda request, error: error_response(request.scope, 413, str(error)),
            Overloaded: lambda request, error: error_response(request.scope, 529, str(error), {"retry-after": "1"}),
            ClientDisconnect: lambda request, error: Response(status_code=499),
            HTTPException: on_http_error,
        },
        lifespan=lifespan,
    )
    app.state.serving = app.state.records = serving
    return app


class Writer(Protocol):
    """Writes one answer in the form of its API: event by event, or whole."""

    def event(self, event: Event) -> bytes:
        """What an event adds to a stream."""

    def whole(self, message: Message) -> bytes:
        """The body of a whole answer."""


Reader = Callable[[bytes | bytearray], tuple[MessagesRequest, Writer]]  # of a body; raises InvalidRequest


class MessagesWriter:
    """Writes answers as they are."""

    event = staticmethod(encode_event)
    whole = staticmethod(encode)


def read_messages(body: bytes | bytearray) -> tuple[MessagesRequest, Writer]:
    """What a body of `POST /v1/messages` asks for, and what writes the answer."""
    return decode_request(body), MessagesWriter()


async def post_answer(read: Reader, request: Request) -> Response:
    """Generate the answer to a body that `read` reads, as JSON or as a stream of events."""
    serving: ServerContext = request.app.state.serving
    body, phases = await body_of(request), Phases()
    caller = caller_of(request, serving)

    def ready() -> tuple[Prepared, Writer]:
        with phases.timed("decode"):
            message, writer = read(body)
        return prepare(serving, message, caller, phases), writer

    prepared, writer = await run_in_threadpool(ready)
    events = answer(serving, prepared, phases)
    # The first event is asked for here: a request that the engine refuses is answered by a status, not by a stream.
    first = await until_disconnect(request, anext(events))
    if first is None:
        return Response(status_code=499)
    if prepared.message.stream and not isinstance(first, Error):
        return StreamingResponse(
            stream(writer, first, events),
            media_type="text/event-stream",
            headers=headers_of(prepared, phases) | {"cache-control": "no-cache"},
        )
    result = await until_disconnect(request, collect(first, events))
    if result is None:
        return Response(status_code=499)
    if isinstance(result, Error):
        return error_response(request.scope, 500, result.error.message)
    return Response(writer.whole(result), media_type="application/json", headers=headers_of(prepared, phases))


async def body_of(request: Request) -> bytearray:
    """The whole body, gathered as it comes: to join its pieces at the end would hold the loop for large ones."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
    return body


def headers_of(prepared: Prepared, phases: Phases) -> dict[str, str]:
    """What an answer's headers tell: where the time went until now, and the rules that changed the request."""
    applied = {"x-tokenzero-normalized": ", ".join(prepared.applied[:MAX_LISTED_RULES])} if prepared.applied else {}
    return {"server-timing": phases.header()} | applied


async def post_count_tokens(request: Request) -> Response:
    """`POST /v1/messages/count_tokens`: the length of the rendered prompt."""
    serving: ServerContext = request.app.state.serving
    body, phases = await body_of(request), Phases()
    caller = caller_of(request, serving)

    def counted() -> int:
        with phases.timed("decode"):
            asked = decode_count_tokens(body)
        return prompt_length(serving, asked, caller, phases)

    answered = encode(TokenCount(await run_in_threadpool(counted)))
    return Response(answered, media_type="application/json", headers={"server-timing": phases.header()})


async def get_models(request: Request) -> Response:
    """`GET /v1/models`: the one model; requests may call it by any name."""
    serving: ServerContext = request.app.state.serving
    name, context = serving.model_name, serving.engine.settings.max_model_len
    if is_openai(request.url.path, dict(request.scope["headers"])):
        return Response(models_body(name, context), media_type="application/json")
    return JSONResponse({"data": [described(name, context)], "has_more": False, "first_id": name, "last_id": name})


async def get_model(request: Request) -> Response:
    """`GET /v1/models/{id}`: the one model, by the name that it is asked for."""
    name, context = request.path_params["id"], request.app.state.serving.engine.settings.max_model_len
    if not name:
        raise HTTPException(404)
    if is_openai(request.url.path, dict(request.scope["headers"])):
        return Response(model_body(name, context), media_type="application/json")
    return JSONResponse(described(name, context))


def described(name: str, context: int) -> dict[str, str | int]:
    """The model in the Messages API's form; prompt and answer share `context` tokens."""
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": "1970-01-01T00:00:00Z",
        "max_input_tokens": context,
        "max_tokens": context - 1,
    }


async def get_health(request: Request) -> Response:
    """`GET /health`: 200 while the engine's thread lives, and what it computes on."""
    engine = request.app.state.serving.engine
    alive = engine.thread.is_alive()
    about = {"dtype": engine.settings.dtype, "device": jax.devices()[0].device_kind} if alive else {}
    return JSONResponse({"status": "ok" if alive else "engine stopped"} | about, 200 if alive else 503)


async def get_metrics(request: Request) -> Response:
    """`GET /metrics`: Prometheus text, made in a thread, as a tier's figures may wait for its disk."""
    page = await run_in_threadpool(generate_latest, request.app.state.serving.metrics.registry)
    return Response(page, media_type=CONTENT_TYPE_LATEST)


async def get_root(request: Request) -> Response:
    """`GET /`: the dashboard for browsers, and for other clients what `/api/hello` has."""
    return await (get_asset(PAGE, request) if wants_page(request) else get_hello(request))


async def get_hello(request: Request) -> Response:
    """`HEAD /` and `HEAD /api/hello`: what clients probe before they talk."""
    return JSONResponse({"name": "tokenzero"})


def caller_of(request: Request, serving: ServerContext) -> RequestContext:
    """What the request's headers say."""
    headers = request.headers
    key = headers.get("x-api-key") or headers.get("authorization") or ""
    salt, agent = headers.get(SALT_HEADER, ""), headers.get("user-agent", "")
    return RequestContext(rules_of(request, serving), salt.encode(), key.encode(), agent)


def rules_of(request: Request, serving: ServerContext) -> frozenset[str]:
    """The normaliser's rules for this request: the server's, or those its header names."""
    header = request.headers.get(RULES_HEADER)
    if header is None:
        return serving.rules
    try:
        names = parse_rules(header)
    except ValueError as error:
        raise InvalidRequest(f"{RULES_HEADER}: {error}") from error
    if problem := unrendered(serving.tokenizer, names):
        raise InvalidRequest(f"{RULES_HEADER}: {problem}")
    return names


async def stream(writer: Writer, first: Event, rest: AsyncGenerator[Event, None]) -> AsyncIterator[bytes]:
    """Server-sent events; whatever breaks midway ends the stream with an `error` event."""
    try:
        yield writer.event(first)
        async for event in rest:
            yield writer.event(event)
    except Exception as error:
        log.exception("a stream broke")
        yield writer.event(Error(ErrorDetail("api_error", f"{type(error).__name__}: {error}")))
    finally:
        await rest.aclose()


def on_http_error(request: Request, error: Exception) -> Response:
    """Unknown routes and wrong methods."""
    assert isinstance(error, HTTPException)
    path = f"{request.method} {request.url.path}"
    texts = {404: f"no such route: {path}", 405: f"method not allowed: {path}"}
    text = texts.get(error.status_code, error.detail)
    return error_response(request.scope, error.status_code, text, dict(error.headers or {}))
