"""What needs no key, and errors in the form of the API that a request is for."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from serve.api.answers import ERROR_TYPES, Error, ErrorDetail, encode
from serve.api.openai.errors import error_body, is_openai, status_of
from serve.web.assets import ASSETS
from serve.web.paths import api_path

OPEN_PATHS = ("/", "/health", "/ready", "/api/hello", *ASSETS)  # the dashboard asks for the key itself

RETRY_SECONDS = 5  # after which a request that was refused may be sent again
STOPPING = "the server is stopping: send the request again, to another one or later"


def given_id(scope: Scope) -> str | None:
    """The id that a client has given its request by `x-request-id`; None if it has given none that can be kept."""
    id: str | None = scope.get("given_id")
    return id


def error_response(scope: Scope, status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """An error in the form of the API that the request is for."""
    path = scope["path"]
    if is_openai(path, dict(scope["headers"])):
        return Response(error_body(status, message, path), status_of(status), headers, media_type="application/json")
    kind = ERROR_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    body = encode(Error(ErrorDetail(kind, message), given_id(scope)))
    return Response(body, status, headers, media_type="application/json")


def stopping_response(scope: Scope) -> Response | None:
    """The answer to a request that comes while the server stops; None for one that may pass."""
    if not scope.get("stopping"):
        return None
    if api_path(scope["path"]) == "/ready":
        return JSONResponse({"status": "stopping"}, 503)
    if scope["method"] in ("GET", "HEAD"):
        return None
    late = {"retry-after": str(RETRY_SECONDS), "connection": "close"}
    return error_response(scope, 529, STOPPING, late)
