"""The routes that server and proxy share: the dashboard, and what is known of the latest requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve.diagnosis.divergence import CAUSES, Divergences, Report
from serve.diagnosis.volatility import Volatility
from serve.web.access import error_response
from serve.web.assets import ASSET_HEADERS, ASSETS
from serve.web.request_status import RequestStatuses

MAX_BODY_BYTES = 32 * 1024 * 1024
# Applied rules that a response lists: a header has limits, and proxies have lower ones.
MAX_LISTED_RULES = 32
T = TypeVar("T")


class RequestRecords(Protocol):
    """The records of the latest requests that a server or a proxy keeps."""

    @property
    def divergences(self) -> Divergences:
        """The reports on their prompts."""

    @property
    def volatility(self) -> Volatility:
        """The parts of prompts that change in every request."""

    @property
    def outcomes(self) -> RequestStatuses:
        """How they went."""


async def get_requests(request: Request) -> Response:
    """`GET /v1/requests`: what the latest requests found in the cache, why not more, how they went; volatile parts."""
    records: RequestRecords = request.app.state.records

    def listed() -> bytes:
        data = [request_record(records, report) for report in records.divergences.latest()]
        return msgspec.json.encode({"data": data, "volatile": records.volatility.latest(), "causes": CAUSES})

    return Response(await run_in_threadpool(listed), media_type="application/json")


def request_record(records: RequestRecords, report: Report) -> dict[str, Any]:
    """What is told of a request: the report on its prompt, and its outcome."""
    record: dict[str, Any] = msgspec.to_builtins(report) | msgspec.to_builtins(records.outcomes.of(report.id))
    return record


async def get_request(request: Request) -> Response:
    """`GET /v1/requests/{id}`: one of them by its message's id, and where in its prompt each section lies."""
    records: RequestRecords = request.app.state.records
    id = request.path_params["id"]

    def found() -> bytes | None:
        if (known := records.divergences.find(id)) is None:
            return None
        report, ranges = known
        sections = [{"section": name, "start": start, "stop": stop} for name, start, stop in ranges or ()]
        return msgspec.json.encode(request_record(records, report) | {"sections": sections if ranges else None})

    body = await run_in_threadpool(found)
    if body is None:
        return error_response(request.scope, 404, f"no request of the latest is known as {id!r:.80}")
    return Response(body, media_type="application/json")


def wants_page(request: Request) -> bool:
    """Whether a browser asks, and not a client that probes."""
    return request.method == "GET" and "text/html" in request.headers.get("accept", "")


async def get_asset(path: str, request: Request) -> Response:
    """A file of the dashboard; browsers are to load nothing from elsewhere."""
    asset = ASSETS[path]
    return Response(asset.content, media_type=asset.media_type, headers=ASSET_HEADERS)


ASSET_ROUTES = [Route(path, partial(get_asset, path), methods=["GET"]) for path in ASSETS]


async def until_disconnect(request: Request, work: Awaitable[T]) -> T | None:
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
