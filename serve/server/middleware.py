"""The middleware before every route: its path, the API key, the body's size, and errors in the form of its API."""

from __future__ import annotations

import logging
import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.limits.encodings import BodyTooLarge
from serve.server.metrics import ServerMetrics
from serve.web.access import OPEN_PATHS, admits, error_response
from serve.web.paths import api_path

log = logging.getLogger("tokenzero.app")


class RequestGuardMiddleware:
    """Check the key and the body's size before a route; after it, add a request id, count, answer 500 for a fault."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int, metrics: ServerMetrics) -> None:
        self.app, self.key, self.limit, self.metrics = app, api_key, max_body_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope = {**scope, "path": api_path(scope["path"])}
        headers = dict(scope["headers"])
        read, started = 0, False

        async def receive_limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.limit:
                raise BodyTooLarge(f"request body: expected at most {self.limit} bytes, got more")
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                id = f"req_{secrets.token_hex(12)}".encode()
                message["headers"] += [(b"request-id", id), (b"x-request-id", id)]
                # Unknown paths share one label: a client must not be able to grow the metrics.
                path = scope["path"] if scope.get("endpoint") else "other"
                for name, value in scope.get("path_params", {}).items():
                    path = path.removesuffix(value) + f"{{{name}}}"
                self.metrics.responses.labels(path, message["status"]).inc()
            await send(message)

        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.limit:
            text = f"request body: expected at most {self.limit} bytes, got {int(declared)}"
            await error_response(scope, 413, text)(scope, receive, send_with_id)
        elif self.key and scope["path"] not in OPEN_PATHS and not admits(self.key, headers):
            await error_response(scope, 401, "invalid x-api-key")(scope, receive, send_with_id)
        else:
            try:
                await self.app(scope, receive_limited, send_with_id)
            except Exception as error:
                if started:
                    raise
                log.exception("%s %s failed", scope["method"], scope["path"])
                await error_response(scope, 500, f"{type(error).__name__}: {error}")(scope, receive, send_with_id)
