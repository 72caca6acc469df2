"""The Starlette application: routes, and answers as JSON or server-sent events.

`prepare` and `answer` do what happens between a request's body and its answer; `middleware` runs before every route.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

from msgspec.structs import replace
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve.api.answers import (
    ERROR_STATUS,
    Error,
    ErrorDetail,
    Event,
    Message,
    ModelInfo,
    ModelPage,
    encode,
    encode_event,
)
from serve.api.messages import InvalidRequest, MessagesRequest, decode_request
from serve.api.openai import read_chat, read_responses
from serve.api.openai.errors import is_openai
from serve.api.openai.models import model_body, models_body
from serve.engine.inbox import Overloaded, QueueFull
from serve.limits.encodings import ENCODINGS, MalformedBody, UnsupportedEncoding
from serve.limits.exceeded import RETRY_SECONDS, LimitExceeded
from serve.server.answer import answer, collect
from serve.server.bodies import read_body
from serve.server.callers import in_own_thread, request_context_of, told_headers, wishing
from serve.server.context import ServerContext
from serve.server.counts import post_count_tokens, post_input_tokens
from serve.server.engine_client import EngineClient
from serve.server.expected import forecast_header
from serve.server.heartbeat import heartbeat
from serve.server.key_metrics import KeyCollector
from serve.server.limits import InFlight, decodable, refuse_too_many
from serve.server.middleware import RequestGuardMiddleware, limit_response
from serve.server.openapi import openapi
from serve.server.pin_routes import PIN_ROUTES
from serve.server.pins import Pins, pins_folder
from serve.server.prepare import Prepared, prepare
from serve.server.request_log import RequestLogMiddleware
from serve.server.sessions import SESSION_ROUTES, Sessions
from serve.server.trim import trim_while_idle
from serve.server.warm import Warming, post_warm, read_warm
from serve.web.access import error_response
from serve.web.agents import shown_ids
from serve.web.assets import PAGE
from serve.web.browsers import browser_rules, cors
from serve.web.headers import APPLIED_HEADER, FORECAST_HEADER
from serve.web.keys import LimitReached, open_keys, reloading, viewer_of
from serve.web.pages import (
    ASSET_ROUTES,
    MAX_LISTED_RULES,
    get_asset,
    get_request,
    get_requests,
    until_disconnect,
    wants_page,
)
from serve.web.timing import Phases

log = logging.getLogger("tokenzero.app")


def create_app(context: ServerContext) -> Starlette:
    """The application over an engine that is not started yet; the engine starts and stops with the application."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine = context.engine
        engine.start()
        await app.state.pins.restore()
        tasks = [
            asyncio.create_task(trim_while_idle(lambda: engine.steps, lambda: engine.idle)),
            asyncio.create_task(warming.run(context)),
        ]
        async with heartbeat(context.metrics.lag.observe):
            with reloading(keys):
                yield
        for task in tasks:
            task.cancel()
        # Both at the same time, since each may take the whole time limit for stopping.
        await asyncio.gather(
            run_in_threadpool(engine.stop),
            run_in_threadpool(context.replay.close, engine.settings.stop_seconds),
        )

    config = context.config
    warming = Warming(read_warm(config), config.ready_when_warm)
    keys = open_keys(config.api_key, config.api_key_file)
    guard = Middleware(
        RequestGuardMiddleware,
        keys=keys,
        browsers=browser_rules(config, config.keyed),
        in_flight=InFlight(config),
        metrics=context.metrics,
    )
    app = Starlette(
        routes=[*ROUTES, *ASSET_ROUTES],
        middleware=[*cors(config), Middleware(RequestLogMiddleware), guard],
        exception_handlers={
            InvalidRequest: refusal,
            LimitExceeded: refusal,
            MalformedBody: lambda request, error: error_response(request.scope, 400, str(error)),
            UnsupportedEncoding: lambda request, error: error_response(
                request.scope, 415, str(error), {"accept-encoding": ", ".join(ENCODINGS)}
            ),
            LimitReached: lambda request, error: limit_response(request.scope, error),
            Overloaded: refusal,
            ClientDisconnect: lambda request, error: Response(status_code=499),
            HTTPException: http_exception_response,
        },
        lifespan=lifespan,
    )
    app.state.context = app.state.records = context
    app.state.keys, app.state.warming, app.state.pins = keys, warming, Pins(context, keys, pins_folder(config))
    app.state.sessions = Sessions(context.engine)
    if keys and keys.path:
        context.metrics.registry.register(KeyCollector(keys))
    return app


class Writer(Protocol):
    """Writes one answer in the form of its API, event by event or whole, after `begin`."""

    def begin(self, id: str, model: str) -> None:
        """Set the id of the message that is written, and the name of the model."""

    def event(self, event: Event) -> bytes:
        """The bytes that an event adds to a stream."""

    def whole(self, message: Message) -> bytes:
        """The body of a whole answer."""


# Reads a body: the request, and the writer of its answer. Raises InvalidRequest.
Reader = Callable[[bytes | bytearray], tuple[MessagesRequest, Writer]]


class MessagesWriter:
    """Writes answers in the form of the Messages API."""

    def begin(self, id: str, model: str) -> None:
        """Do nothing: the message has both."""

    event = staticmethod(encode_event)
    whole = staticmethod(encode)


def read_messages(body: bytes | bytearray) -> tuple[MessagesRequest, Writer]:
    """Read a body of the Messages API."""
    return decode_request(body), MessagesWriter()


async def post_messages(request: Request) -> Response:
    """`POST /v1/messages`: the Messages API; JSON, or server-sent events with `"stream": true`."""
    return await post_answer(read_messages, request)


async def post_chat_completions(request: Request) -> Response:
    """`POST /v1/chat/completions`: OpenAI's chat completions, on the same engine and rules."""
    return await post_answer(read_chat, request)


async def post_responses(request: Request) -> Response:
    """`POST /v1/responses`: OpenAI's responses, on the same engine and rules."""
    return await post_answer(read_responses, request)


async def post_answer(read: Reader, request: Request) -> Response:
    """Generate the answer to a body that `read` reads, as JSON or as a stream of events."""
    context: ServerContext = request.app.state.context
    body, phases = await read_body(request), Phases()
    request_context = request_context_of(request, context)

    def read_and_prepare() -> tuple[Prepared, Writer]:
        with phases.timed("decode"):
            message, writer = read(decodable(body, context.config))
            refuse_too_many(message, context.config)
        # OpenAI's APIs work without the name of a model.
        message = message if message.model else replace(message, model=context.config.name)
        prepared = prepare(context, message, wishing(request_context, body), phases)
        writer.begin(prepared.id, message.model)
        return prepared, writer

    prepared, writer = await in_own_thread(request_context, read_and_prepare, request.scope["admitted"].threads)
    for admission in (request_context.admission, request.scope["admitted"]):
        if admission:
            admission.take(len(prepared.generation.tokens) + prepared.generation.max_tokens)
    request.scope["message_ids"].append(prepared.id)
    context.statuses.update(prepared.id, request_id=request.scope["request_id"], **shown_ids(request.headers))
    events = answer(context, prepared, phases)
    # Wait for the first event before the response starts: the engine's refusal becomes a status, not a stream.
    first = await until_disconnect(request, anext(events))
    if first is None:
        return Response(status_code=499)
    if prepared.message.stream and not isinstance(first, Error):
        return StreamingResponse(
            stream(writer, first, events),
            media_type="text/event-stream",
            headers=response_headers(context, prepared, phases) | {"cache-control": "no-cache"},
        )
    result = await until_disconnect(request, collect(first, events))
    if result is None:
        return Response(status_code=499)
    if isinstance(result, Error):
        return error_response(request.scope, ERROR_STATUS[result.error.type], result.error.message)
    headers = response_headers(context, prepared, phases)
    return Response(writer.whole(result), media_type="application/json", headers=headers)


def response_headers(context: ServerContext, prepared: Prepared, phases: Phases) -> dict[str, str]:
    """The headers of an answer: where the time went until now, what was expected, and the rules that changed it."""
    headers = {"server-timing": phases.header()}
    if prepared.applied:
        headers[APPLIED_HEADER] = ", ".join(prepared.applied[:MAX_LISTED_RULES])
    if forecast := context.statuses.get(prepared.id).forecast:
        headers[FORECAST_HEADER] = forecast_header(forecast, len(prepared.prompt.tokens))
    return headers | told_headers(prepared.request_context)


async def get_models(request: Request) -> Response:
    """`GET /v1/models`: the model and its limits, in the form that the request's headers ask for."""
    context: ServerContext = request.app.state.context
    name, limit = context.config.name, context.engine.settings.max_model_len
    if is_openai(request.url.path, dict(request.scope["headers"])):
        return Response(models_body(name, limit), media_type="application/json")
    return Response(encode(ModelPage((model_info(name, limit),), False, name, name)), media_type="application/json")


async def get_model(request: Request) -> Response:
    """`GET /v1/models/{id}`: the same model under any name."""
    name, limit = request.path_params["id"], request.app.state.context.engine.settings.max_model_len
    if not name:
        raise HTTPException(404)
    if is_openai(request.url.path, dict(request.scope["headers"])):
        return Response(model_body(name, limit), media_type="application/json")
    return Response(encode(model_info(name, limit)), media_type="application/json")


def model_info(name: str, limit: int) -> ModelInfo:
    """The model in the Messages API's form; prompt and answer share `limit` tokens."""
    return ModelInfo(id=name, display_name=name, max_input_tokens=limit, max_tokens=limit - 1)


async def get_health(request: Request) -> Response:
    """`GET /health`: 200 while the engine's thread is alive, with its dtype, device and `--tp`; otherwise 503."""
    engine: EngineClient = request.app.state.context.engine
    if not engine.alive:
        return JSONResponse({"status": "engine stopped"}, 503)
    sizes = engine.settings
    return JSONResponse({"status": "ok", "dtype": sizes.dtype, "device": engine.device, "tp": sizes.tensor_parallel})


async def get_ready(request: Request) -> Response:
    """`GET /ready`: 200 while requests are served, with the compiled shapes of steps; 503 before (phases) and after."""
    engine: EngineClient = request.app.state.context.engine
    if not engine.alive:
        return JSONResponse({"status": "engine stopped"}, 503)
    compiled, shapes = engine.compiled
    warming: Warming = request.app.state.warming
    if warming.required and warming.missing:
        return JSONResponse({"status": "warming", "done": len(warming.done), "missing": warming.missing[:100]}, 503)
    return JSONResponse({"status": "ready", "compiled": compiled, "shapes": shapes})


async def get_metrics(request: Request) -> Response:
    """`GET /metrics`: Prometheus metrics, see below; a key of a file that is no admin's gets its own."""
    viewer = viewer_of(request.scope)
    registry = request.app.state.context.metrics.registry
    if viewer is not None:
        registry = CollectorRegistry()
        registry.register(KeyCollector(request.app.state.keys, viewer))
    # In a thread, since a tier's figures may wait for its disk.
    page = await run_in_threadpool(generate_latest, registry)
    return Response(page, media_type=CONTENT_TYPE_LATEST)


async def get_openapi(request: Request) -> Response:
    """`GET /openapi.json`: these routes with the schemas of their bodies, as OpenAPI 3.1."""
    return Response(await run_in_threadpool(openapi, ROUTES), media_type="application/json")


async def get_root(request: Request) -> Response:
    """`GET /`: the dashboard in a browser; other clients get the same as from `/api/hello`."""
    return await (get_asset(PAGE, request) if wants_page(request) else get_hello(request))


async def get_hello(request: Request) -> Response:
    """`GET /api/hello`: what clients probe first; `HEAD` works as well."""
    return JSONResponse({"name": "tokenzero"})


async def stream(writer: Writer, first: Event, rest: AsyncGenerator[Event, None]) -> AsyncIterator[bytes]:
    """Server-sent events; an exception midway ends the stream with an `error` event."""
    try:
        yield writer.event(first)
        async for event in rest:
            yield writer.event(event)
    except Exception as error:
        log.exception("a stream failed")
        yield writer.event(Error(ErrorDetail("api_error", f"{type(error).__name__}: {error}")))
    finally:
        await rest.aclose()


def refusal(request: Request, error: Exception) -> Response:
    """The answer to a request that cannot be read, or goes beyond a limit, which is counted."""
    if isinstance(error, Overloaded):
        error = LimitExceeded(str(error), "max_queue" if isinstance(error, QueueFull) else "", 529, RETRY_SECONDS)
    assert isinstance(error, InvalidRequest | LimitExceeded)
    if error.limit:
        request.app.state.context.metrics.count_refused(error.limit)
    headers = error.headers if isinstance(error, LimitExceeded) else {}
    return error_response(request.scope, error.status, str(error), headers)


def http_exception_response(request: Request, error: Exception) -> Response:
    """The response to an unknown route or a wrong method."""
    assert isinstance(error, HTTPException)
    path = f"{request.method} {request.url.path}"
    instead = NOT_SERVED.get(request.url.path, "the API is at /v1/messages, /v1/chat/completions and /v1/responses")
    texts = {404: f"no such route: {path}: {instead}", 405: f"method not allowed: {path}"}
    text = texts.get(error.status_code, error.detail)
    return error_response(request.scope, error.status_code, text, dict(error.headers or {}))


# Routes of the APIs that other servers have, and what to use instead.
NOT_SERVED = {
    "/v1/completions": "send the prompt as a user message to /v1/chat/completions",
    "/v1/embeddings": "this model writes text only",
}

ROUTES = [
    Route("/v1/messages", post_messages, methods=["POST"]),
    Route("/v1/messages/count_tokens", post_count_tokens, methods=["POST"]),
    Route("/v1/chat/completions", post_chat_completions, methods=["POST"]),
    Route("/v1/responses", post_responses, methods=["POST"]),
    Route("/v1/responses/input_tokens", post_input_tokens, methods=["POST"]),
    Route("/v1/cache/warm", post_warm, methods=["POST"]),
    *PIN_ROUTES,
    Route("/v1/requests", get_requests, methods=["GET"]),
    Route("/v1/requests/{id}", get_request, methods=["GET"]),
    *SESSION_ROUTES,
    Route("/v1/models", get_models, methods=["GET"]),
    Route("/v1/models/{id:path}", get_model, methods=["GET"]),
    Route("/health", get_health, methods=["GET"]),
    Route("/ready", get_ready, methods=["GET"]),
    Route("/metrics", get_metrics, methods=["GET"]),
    Route("/openapi.json", get_openapi, methods=["GET"]),
    Route("/", get_root, methods=["GET"]),
    Route("/api/hello", get_hello, methods=["GET"]),
]
