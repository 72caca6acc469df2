"""The middleware before every route: its path, who may call it, the body's size, and errors in the form of its API."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.limits.encodings import BodyTooLarge
from serve.limits.exceeded import LimitExceeded
from serve.server.limits import InFlight
from serve.server.metrics import ServerMetrics
from serve.server.request_log import route_of
from serve.web.access import OPEN_PATHS, error_response, stopping_response
from serve.web.browsers import ANSWER_HEADERS, BrowserRules
from serve.web.keys import Keys, LimitReached, secrets_in

log = logging.getLogger("tokenzero.app")


class RequestGuardMiddleware:
    """Check the key and the body's size before a route; after it, add a request id, count, answer 500 for a fault."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys | None,
        browsers: BrowserRules | None,
        in_flight: InFlight,
        metrics: ServerMetrics,
    ) -> None:
        self.app, self.keys, self.browsers, self.in_flight, self.metrics = app, keys, browsers, in_flight, metrics
        self.limit = in_flight.limits.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        read, started = 0, False

        async def receive_limited() -> Message:
            nonlocal read
            message = await receive()
            piece = len(message.get("body", b""))
            read += piece
            if read > self.limit:
                raise BodyTooLarge(f"at most {self.limit} bytes")
            if "admitted" in scope:
                scope["admitted"].take_body(piece)
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                there = {name for name, _ in message["headers"]}
                ids = scope["own_id"].encode(), scope["request_id"].encode()
                message["headers"] += zip((b"request-id", b"x-request-id"), ids, strict=True)
                message["headers"] += [header for header in ANSWER_HEADERS if header[0] not in there]
                self.metrics.responses.labels(route_of(scope), message["status"]).inc()
            await send(message)

        answer: Response | None = None
        try:
            scope["key"] = self.keys.find(headers) if self.keys else None
            answer = await self.refusal(scope, headers)
            if answer is None and scope["method"] == "POST":
                scope["admitted"] = self.in_flight.admit()
                if self.keys and scope["key"]:
                    scope["admission"] = self.keys.admit(scope["key"])
            await (answer or self.app)(scope, receive_limited, send_with_id)
        except LimitReached as error:
            await limit_response(scope, error)(scope, receive, send_with_id)
        except LimitExceeded as error:
            await self.refused(scope, error)(scope, receive, send_with_id)
        except Exception as error:
            if started:
                raise
            log.exception("%s %s failed", scope["method"], route_of(scope))
            await error_response(scope, 500, f"{type(error).__name__}: {error}")(scope, receive, send_with_id)
        finally:
            for admission in ("admission", "admitted"):
                if admission in scope:
                    scope[admission].end()

    async def refusal(self, scope: Scope, headers: Mapping[bytes, bytes]) -> Response | None:
        """The answer to a request that may not pass; None for one that may."""
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.limit:
            return self.refused(scope, BodyTooLarge(f"at most {self.limit} bytes", f"{int(declared)}"))
        if self.keys and not scope["key"] and scope["path"] not in OPEN_PATHS:
            if secrets_in(headers):
                self.metrics.wrong_keys.inc()
                address = (scope.get("client") or ("an unknown address", 0))[0]
                await asyncio.sleep(self.keys.wrong.delay(address, time.monotonic()))
            return error_response(scope, 401, "invalid x-api-key")
        if refused := self.browsers and self.browsers.refusal(scope, scope["path"]):
            return error_response(scope, *refused)
        return stopping_response(scope)

    def refused(self, scope: Scope, error: LimitExceeded) -> Response:
        """The answer to a request that goes beyond a limit, which is counted."""
        self.metrics.count_refused(error.limit)
        return error_response(scope, error.status, str(error), error.headers)


def limit_response(scope: Scope, error: Exception) -> Response:
    """The answer to a request beyond a limit of its key."""
    assert isinstance(error, LimitReached)
    return error_response(scope, 429, str(error), {"retry-after": str(error.retry_s)})
