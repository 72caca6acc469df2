"""The routes that pin prefixes, list pins and drop them; for admins, where there are keys."""

from __future__ import annotations

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve.server.bodies import read_body
from serve.server.limits import decodable
from serve.server.pins import Pins, wanted_of
from serve.web.access import error_response
from serve.web.keys import viewer_of

ADMINS_ONLY = "pins are an admin's: expected a key with `admin` in --api-key-file"


async def post_pin(request: Request) -> Response:
    """`POST /v1/cache/pin`: keep tools and system text of the request in the body on the device, over restarts."""
    if viewer_of(request.scope) is not None:
        return error_response(request.scope, 403, ADMINS_ONLY)
    pins: Pins = request.app.state.pins
    body, limits = await read_body(request), pins.context.config
    wanted = await run_in_threadpool(lambda: wanted_of(decodable(body, limits)))
    return answered(await pins.pin(wanted))


async def get_pins(request: Request) -> Response:
    """`GET /v1/cache/pins`: the prefixes that are pinned."""
    if viewer_of(request.scope) is not None:
        return error_response(request.scope, 403, ADMINS_ONLY)
    return answered(request.app.state.pins.listed())


async def delete_pin(request: Request) -> Response:
    """`DELETE /v1/cache/pins/{name}`: no longer keep a prefix; it stays cached as long as there is room."""
    if viewer_of(request.scope) is not None:
        return error_response(request.scope, 403, ADMINS_ONLY)
    name, pins = request.path_params["name"], request.app.state.pins
    if (dropped := await run_in_threadpool(pins.drop, name)) is None:
        return error_response(request.scope, 404, f"no pin has the name {name!r:.80}: GET /v1/cache/pins lists them")
    return answered(dropped)


def answered(result: msgspec.Struct) -> Response:
    """A struct as the body of an answer."""
    return Response(msgspec.json.encode(result), media_type="application/json")


PIN_ROUTES = [
    Route("/v1/cache/pin", post_pin, methods=["POST"]),
    Route("/v1/cache/pins", get_pins, methods=["GET"]),
    Route("/v1/cache/pins/{name}", delete_pin, methods=["DELETE"]),
]
