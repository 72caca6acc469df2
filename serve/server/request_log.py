"""One line of log for each request, and the ids by which it is found again."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.diagnosis.divergence import Report
from serve.server.context import ServerContext
from serve.web.paths import API_PATHS, VERSION, api_path

log = logging.getLogger("tokenzero.requests")

# What may stand in a log, a header and a report as it is.
CALLERS_ID = re.compile(rb"[\x21-\x7e]{1,128}")
# Of requests that are refused before any route is found.
PATHS = frozenset(f"/{VERSION}/{path}" for path in API_PATHS)
LEFT = 499  # the status in the log of a request whose client left before an answer: nginx' number for it


class RequestLogMiddleware:
    """The outermost layer: gives a request its path and ids, and logs a line once it has ended."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and log how it went."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.perf_counter(), LEFT
        # The route puts the id of its message into `message_ids`, whichever copy of the scope it has.
        own, given = f"req_{secrets.token_hex(12)}", id_in(dict(scope["headers"]))
        ids: dict[str, Any] = {"own_id": own, "given_id": given, "request_id": given or own, "message_ids": []}
        scope = {**scope, **ids, "path": api_path(scope["path"])}

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_noted)
        finally:
            level = logging.DEBUG if scope["method"] in ("GET", "HEAD") and status < 400 else logging.INFO
            if log.isEnabledFor(level):
                fields = request_fields(scope, status, time.perf_counter() - begun)
                log.log(level, "%s %s", scope["method"], route_of(scope), extra={"fields": fields})


def id_in(headers: Mapping[bytes, bytes]) -> str | None:
    """The `x-request-id` of a request; None if it has none, or one that is not a short word."""
    given = headers.get(b"x-request-id", b"")
    return given.decode() if CALLERS_ID.fullmatch(given) else None


def route_of(scope: Scope) -> str:
    """The path of a request's route, with the names of its parameters in place of their values; `other` for no route.

    No client can put words into a log by it, or grow the metrics.
    """
    path: str = scope["path"] if scope.get("endpoint") or scope["path"] in PATHS else "other"
    for name, value in scope.get("path_params", {}).items():
        if not path.endswith(value):  # a newline at its end matches no parameter, and no other part of a route
            return "other"
        path = path.removesuffix(value) + f"{{{name}}}"
    return path


def request_fields(scope: Scope, status: int, seconds: float) -> dict[str, Any]:
    """What the line of a request says of it: ids, key, status, times, tokens and what broke its prefix."""
    fields: dict[str, Any] = {"status": status, "request_id": scope["request_id"]}
    if key := scope.get("key"):
        fields |= {"key": key.name} if key.name else {}
    if scope["message_ids"]:
        fields |= message_fields(scope["app"].state.context, scope["message_ids"][0])
    return fields | {"ms": round(1000 * seconds, 1)}


def message_fields(context: ServerContext, id: str) -> dict[str, Any]:
    """What is known of an answer by its message's id."""
    status, report = context.statuses.get(id), context.divergences.reports.peek(id)
    fields: dict[str, Any] = {"id": id, "state": status.state, **(report_fields(report) if report else {})}
    fields["generated"] = status.generated_tokens
    return fields | ({} if status.ttft_ms is None else {"ttft_ms": round(status.ttft_ms, 1)})


def report_fields(report: Report) -> dict[str, Any]:
    """The counts of a prompt's tokens, and where and why it stopped matching."""
    fields: dict[str, Any] = {"read": report.reused_tokens, "computed": report.recomputed_tokens}
    if report.cause:
        fields |= {"cause": report.cause, "at": report.position, "section": report.section, "lost": report.lost_tokens}
    return fields
