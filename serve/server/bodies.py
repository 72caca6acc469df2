"""The body of a request as bytes: gathered, and decoded."""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from serve.limits.encodings import MalformedBody, compressed_as, decode_body
from serve.server.context import ServerContext


async def read_body(request: Request) -> bytes | bytearray:
    """The whole body without its `content-encoding`; raises what `decode_body` raises.

    Raises MalformedBody for a compressed body without that header.
    """
    body = bytearray()  # gathered as it arrives: joining its pieces at the end would hold the event loop for long
    async for piece in request.stream():
        body += piece
    if encodings := ",".join(request.headers.getlist("content-encoding")):
        context: ServerContext = request.app.state.context
        return await run_in_threadpool(decode_body, body, encodings, context.config.max_body_bytes)
    if found := compressed_as(body):
        raise MalformedBody(f"body: expected a JSON object, got {found} data: say content-encoding: {found}")
    return body
