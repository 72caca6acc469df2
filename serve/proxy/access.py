"""Who may use the proxy, and for what: keys are checked before every route, or without one what browsers may do."""

from __future__ import annotations

import asyncio
import hashlib
import time
from contextlib import ExitStack

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.proxy.chat import chat_route
from serve.web.access import OPEN_PATHS, error_response, stopping_response
from serve.web.browsers import BrowserRules, Refusal
from serve.web.headers import SALT_HEADER
from serve.web.keys import Key, Keys, LimitReached, secrets_in
from serve.web.paths import api_path

REQUESTS = "/v1/requests"  # the proxy's own; an engine's may show what others have sent
SHARED_PATHS = ("/v1/models", "/v1/completions", "/v1/embeddings", "/health", "/ready")


class AccessMiddleware:
    """Refuses a request, or passes it on, one of a named key with a cache salt of the key's own."""

    def __init__(self, app: ASGIApp, keys: Keys | None, browsers: BrowserRules | None) -> None:
        self.app, self.keys, self.browsers = app, keys, browsers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        form = {**scope, "path": chat_route(scope["path"]) or scope["path"]}
        headers = dict(scope["headers"])
        key = self.keys.find(headers) if self.keys else None
        scope = {**scope, "key": key}
        if refused := self.refusal(scope, key):
            if self.keys and not key and secrets_in(headers):
                address = (scope.get("client") or ("an unknown address", 0))[0]
                await asyncio.sleep(self.keys.wrong.delay(address, time.monotonic()))
            await error_response(form, *refused)(scope, receive, send)
            return
        if late := stopping_response({**scope, "path": form["path"]}):
            await late(scope, receive, send)
            return
        if key and key.name:
            scope["headers"] = salted(scope["headers"], key.name)
        with ExitStack() as ending:
            if self.keys and key and scope["method"] == "POST":
                try:
                    ending.callback(self.keys.admit(key).end)
                except LimitReached as error:
                    after = {"retry-after": str(error.retry_s)}
                    await error_response(form, 429, str(error), after)(scope, receive, send)
                    return
            await self.app(scope, receive, send)

    def refusal(self, scope: Scope, key: Key | None) -> Refusal | None:
        """Why a request may not pass."""
        path, method = scope["path"], scope["method"]
        if self.keys and not key:
            # Some engines generate at `POST /`.
            return None if path in OPEN_PATHS and method in ("GET", "HEAD") else Refusal(401, "invalid x-api-key")
        if key and not key.admin and not is_for_all(path):
            return Refusal(403, f"{path}: expected a key with admin, since engines show what others send there")
        # Files are sent to other routes in other forms. Some engines generate at `POST /`.
        json_only = path == "/" or chat_route(path) is not None
        return self.browsers.refusal(scope, path, json_only) if self.browsers else None


def is_for_all(path: str) -> bool:
    """Whether keys without `admin` may use a path; it is decoded."""
    if ".." in path.split("/"):
        return False
    meant = api_path(path)
    own = meant == REQUESTS or meant.startswith((f"{REQUESTS}/", "/v1/models/"))
    return own or meant in (*SHARED_PATHS, *OPEN_PATHS) or chat_route(path) is not None


def salted(headers: list[tuple[bytes, bytes]], name: str) -> list[tuple[bytes, bytes]]:
    """The headers with a cache salt that belongs to the key of this name, and hashes the client's own salt."""
    given = b"\0".join(value for header, value in headers if header == SALT_HEADER.encode())
    salt = hashlib.blake2b(name.encode() + b"\0" + given, digest_size=16).hexdigest()
    kept = [(header, value) for header, value in headers if header != SALT_HEADER.encode()]
    return [*kept, (SALT_HEADER.encode(), salt.encode())]
