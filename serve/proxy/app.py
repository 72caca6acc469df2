"""The proxy's application: its own routes, and everything else forwarded.

The answer's bytes are forwarded as they arrive, and so is every request that is not a chat request. The comparison with
earlier prompts runs in a thread while the engine works.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

import httpcore
import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.proxy.access import AccessMiddleware
from serve.proxy.fleet import Fleet
from serve.proxy.forward import Proxy, answers_health
from serve.proxy.metrics import health_of, metrics_page
from serve.proxy.reports import Reports
from serve.proxy.upstream import Upstream
from serve.web.assets import PAGE
from serve.web.browsers import BrowserRules
from serve.web.keys import Keys, reloading, viewer_of
from serve.web.pages import ASSET_ROUTES, get_asset, get_request, latest_records, wants_page

KEEP_ALIVE_SECONDS = 4.0  # of an idle connection: uvicorn closes it after 5
METRICS_TYPE = "text/plain; version=0.0.4"


def create_proxy(
    upstreams: Sequence[Upstream],
    rules: frozenset[str],
    reports: Reports | None = None,
    keys: Keys | None = None,
    browsers: BrowserRules | None = None,
    outer: Sequence[Middleware] = (),
) -> Starlette:
    """The application before one engine, or before several that serve the same models.

    `keys` are those that clients have to send; `browsers` are the rules for a proxy without one; `outer` is what every
    request meets first.
    """
    pool = httpcore.AsyncConnectionPool(
        max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_ALIVE_SECONDS
    )
    reports = reports or Reports()
    fleet = Fleet(upstreams)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        watching = asyncio.ensure_future(fleet.watch(partial(answers_health, pool))) if fleet.several else None
        with reloading(keys):
            yield
        await forward.stop()
        if watching:
            watching.cancel()
        await pool.aclose()
        await run_in_threadpool(reports.thread.shutdown, cancel_futures=True)

    forward = Proxy(fleet, pool, rules, reports)
    app = Starlette(
        routes=[*own_routes(fleet, reports), *routes(forward)],
        middleware=[*outer, Middleware(AccessMiddleware, keys=keys, browsers=browsers)],
        lifespan=lifespan,
    )
    app.state.records = reports
    return app


def own_routes(fleet: Fleet, reports: Reports) -> list[BaseRoute]:
    """Of several upstreams, what no one of them can answer."""

    async def get_health(request: Request) -> Response:
        status, body = health_of(fleet)
        return JSONResponse(body, status)

    async def get_metrics(request: Request) -> Response:
        return Response(metrics_page(fleet, reports.refused), media_type=METRICS_TYPE)

    both: list[BaseRoute] = [
        Route("/health", get_health, methods=["GET"]),
        Route("/metrics", get_metrics, methods=["GET"]),
    ]
    return both if fleet.several else []


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
    viewer = viewer_of(request.scope)

    def encode() -> bytes:
        return msgspec.json.encode(latest_records(reports, viewer) | (reports.left_out() if viewer is None else {}))

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
