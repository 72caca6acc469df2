"""The routes that server and proxy share: the dashboard, and the records of the latest requests."""

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

from serve.diagnosis.causes import CAUSES
from serve.diagnosis.divergence import Divergences, Report
from serve.diagnosis.volatility import Volatility
from serve.web.access import error_response
from serve.web.assets import ASSET_HEADERS, ASSETS
from serve.web.keys import viewer_of
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
    def statuses(self) -> RequestStatuses:
        """Their states, times and counts."""


async def get_requests(request: Request) -> Response:
    """`GET /v1/requests`: what the latest requests found in the cache, what broke their prefix, and how they went."""
    records: RequestRecords = request.app.state.records
    viewer = viewer_of(request.scope)
    body = await run_in_threadpool(lambda: msgspec.json.encode(latest_records(records, viewer)))
    return Response(body, media_type="application/json")


def latest_records(records: RequestRecords, viewer: str | None = None) -> dict[str, Any]:
    """The records of the latest requests, the parts of prompts that change in every one, and what the causes mean.

    Of a `viewer`, only those of the key with this name.
    """
    data = [request_record(records, report) for report in records.divergences.latest(viewer)]
    return {"data": data, "volatile": records.volatility.latest(viewer), "causes": CAUSES}


def request_record(records: RequestRecords, report: Report) -> dict[str, Any]:
    """The record of a request: the report on its prompt, and its status."""
    record: dict[str, Any] = msgspec.to_builtins(report) | msgspec.to_builtins(records.statuses.get(report.id))
    return record


async def get_request(request: Request) -> Response:
    """`GET /v1/requests/{id}`: one of them by its message's id, with the place of each section in its prompt."""
    records: RequestRecords = request.app.state.records
    id, viewer = request.path_params["id"], viewer_of(request.scope)

    def encode() -> bytes | None:
        if (found := records.divergences.find_report(id, viewer)) is None:
            return None
        report, ranges = found
        sections = [{"section": name, "start": start, "stop": stop} for name, start, stop in ranges or ()]
        return msgspec.json.encode(request_record(records, report) | {"sections": sections if ranges else None})

    body = await run_in_threadpool(encode)
    if body is None:
        return error_response(request.scope, 404, f"unknown request id {id!r:.80}: only the latest requests are kept")
    return Response(body, media_type="application/json")


def wants_page(request: Request) -> bool:
    """Whether a browser sent the request, rather than a client that probes."""
    return request.method == "GET" and "text/html" in request.headers.get("accept", "")


async def get_asset(path: str, request: Request) -> Response:
    """A file of the dashboard; its headers forbid browsers to load anything from elsewhere."""
    asset = ASSETS[path]
    return Response(asset.content, media_type=asset.media_type, headers=ASSET_HEADERS)


ASSET_ROUTES = [Route(path, partial(get_asset, path), methods=["GET"]) for path in ASSETS]


async def until_disconnect(request: Request, work: Awaitable[T]) -> T | None:
    """The result of `work`, or None if the client disconnects first; `work` is cancelled then."""
    result, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnect(request))
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        return result.result() if result.done() else None
    finally:
        result.cancel()
        gone.cancel()


async def disconnect(request: Request) -> None:
    """Return when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
