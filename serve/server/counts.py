"""Routes that count a prompt's tokens, and say what it would find in the cache."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from serve.api.answers import CacheForecast, TokenCount, encode
from serve.api.messages import CountTokensRequest, decode_count_tokens
from serve.api.openai import input_tokens_body, read_responses
from serve.server.bodies import read_body
from serve.server.callers import in_own_thread, request_context_of
from serve.server.context import ServerContext
from serve.server.expected import ask
from serve.server.limits import decodable, refuse_too_many
from serve.server.prepare import Counted, count_prompt
from serve.web.timing import Phases


async def post_count_tokens(request: Request) -> Response:
    """`POST /v1/messages/count_tokens`: the exact length of the prompt, what it would read of the cache, its TTFT."""
    return await count(
        request,
        decode_count_tokens,
        lambda tokens, cache: encode(TokenCount(tokens, UNSET if cache is None else cache)),
    )


async def post_input_tokens(request: Request) -> Response:
    """`POST /v1/responses/input_tokens`: the same for a body of `/v1/responses`."""
    return await count(request, lambda body: read_responses(body)[0], input_tokens_body)


async def count(
    request: Request,
    read: Callable[[bytes | bytearray], CountTokensRequest],
    write: Callable[[int, CacheForecast | None], bytes],
) -> Response:
    """The answer to a body that `read` reads, as `write` writes it. Raises InvalidRequest."""
    context: ServerContext = request.app.state.context
    body, phases = await read_body(request), Phases()
    request_context = request_context_of(request, context)

    def counted() -> Counted:
        with phases.timed("decode"):
            message = read(decodable(body, context.config))
            refuse_too_many(message, context.config)
        return count_prompt(context, message, request_context, phases)

    found = await in_own_thread(request_context, counted, request.scope["admitted"].threads)
    cache = await ask(context, found.tokens, request_context.salt, found.head, phases.elapsed())
    headers = {"server-timing": phases.header()}
    return Response(write(len(found.tokens), cache), media_type="application/json", headers=headers)
