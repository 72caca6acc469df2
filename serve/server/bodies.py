"""The body of a request as bytes: gathered, and decoded."""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from serve.limits.encodings import MalformedBody, compressed_as, decode_body
from serve.server.callers import agent_of
from serve.server.context import ServerContext

LONG_BYTES = 1 << 16  # more to come than this may take a while


async def read_body(request: Request) -> bytes | bytearray:
    """The whole body without its `content-encoding`; raises what `decode_body` raises.

    Raises MalformedBody for a compressed body without that header.
    """
    context: ServerContext = request.app.state.context
    body = bytearray()  # gathered as it arrives: joining its pieces at the end would hold the event loop for long
    async for piece in request.stream():
        if not body and is_long(request, len(piece)) and (agent := agent_of(request)):
            context.engine.expect(agent)
        body += piece
    if encodings := ",".join(request.headers.getlist("content-encoding")):
        return await run_in_threadpool(decode_body, body, encodings, context.config.max_body_bytes)
    if found := compressed_as(body):
        raise MalformedBody(f"body: expected a JSON object, got {found} data: say content-encoding: {found}")
    return body


def is_long(request: Request, begun: int) -> bool:
    """Whether much of a body is still to come after its first bytes; not known without a length."""
    declared = request.headers.get("content-length", "")
    return declared.isdecimal() and int(declared) - begun > LONG_BYTES
