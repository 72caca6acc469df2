"""Prompts that are computed before they are asked for: `POST /v1/cache/warm`, and the files of `--warm` at the start.

What is computed ends where the last user message begins: it is what a request of the same session with another last
message reads. It goes the way of any request, through keys, limits, rules and shares.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from cache.radix_tree import common_prefix
from serve.api.answers import ERROR_STATUS, CacheWarmed, encode
from serve.api.messages import CountTokensRequest, InputMessage, InvalidRequest, TextBlock, ToolResultBlock
from serve.diagnosis.captures import api_of, decode_json, read_capture, read_prompt
from serve.engine.inbox import Overloaded
from serve.engine.request import Failed, GenerationRequest, Started
from serve.prompt.render import too_long
from serve.server.answer_state import reused_by_tier
from serve.server.bodies import read_body
from serve.server.callers import in_own_thread, request_context_of
from serve.server.config import EVERYTHING, HEADS, ServerConfig
from serve.server.context import RequestContext, ServerContext
from serve.server.limits import decodable, refuse_too_many
from serve.server.prepare import count_prompt
from serve.web.access import error_response
from serve.web.agents import own_id
from serve.web.keys import open_keys, private_salt
from serve.web.pages import until_disconnect
from serve.web.timing import Phases

log = logging.getLogger("tokenzero.warm")

LINES = ".jsonl"  # the end of the name of a file with a body on each line


@dataclass(frozen=True)
class Prefix:
    """The part of a prompt that is computed."""

    tokens: np.ndarray  # [tokens] int32
    head: int  # of these, tokens that all keys share
    until: str  # where it ends: the message of the request, after the rules, that it does not have
    prompt_tokens: int  # of the whole prompt


async def post_warm(request: Request) -> Response:
    """`POST /v1/cache/warm`: a body of any of the three APIs is computed up to its last user message; what it cost."""
    context: ServerContext = request.app.state.context
    body, phases = await read_body(request), Phases()
    request_context = request_context_of(request, context)

    def read() -> Prefix:
        with phases.timed("decode"):
            message = read_any(decodable(body, context.config))
            refuse_too_many(message, context.config)
        return prefix_of(context, message, request_context, phases)

    prefix = await in_own_thread(request_context, read, request.scope["admitted"].threads)
    for admission in (request_context.admission, request.scope["admitted"]):
        if admission:
            admission.take(len(prefix.tokens))
    warmed = await until_disconnect(request, warm(context, prefix, request_context, phases))
    if warmed is None:
        return Response(status_code=499)
    if isinstance(warmed, Failed):
        status = ERROR_STATUS["overloaded_error" if warmed.temporary else "api_error"]
        return error_response(request.scope, status, warmed.message)
    if request_context.admission:
        request_context.admission.count(warmed.warmed_tokens, warmed.cache_read_input_tokens, 0)
    return Response(encode(warmed), media_type="application/json", headers={"server-timing": phases.header()})


def read_any(body: bytes | bytearray) -> CountTokensRequest:
    """The request in a body of any of the three APIs. Raises InvalidRequest."""
    try:
        return read_prompt(body, api_of(decode_json(body)))
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"body: expected a JSON object: {error}") from error


def prefix_of(
    context: ServerContext, message: CountTokensRequest, request_context: RequestContext, phases: Phases
) -> Prefix:
    """The prompt of a request up to its last user message; raises InvalidRequest.

    It is what is common to the prompt and to the same one with other words in that message.
    """
    sent = request_context.admission is not None
    counted = count_prompt(context, message, request_context, phases, sent)
    if len(counted.tokens) >= (most := context.engine.settings.max_model_len):
        raise too_long(len(counted.tokens), most - 1)
    last = max((i for i, each in enumerate(message.messages) if each.role == "user"), default=None)
    if last is None:
        return Prefix(counted.tokens, counted.head, "the end", len(counted.tokens))
    asked = replace(message, messages=(*message.messages[:last], with_other_words(message.messages[last])))
    other = count_prompt(context, asked, request_context, phases)
    shared = common_prefix(counted.tokens, other.tokens)
    if counted.head:
        shared = max(shared, counted.head + 1)  # a head is less than a prompt
    return Prefix(counted.tokens[:shared], counted.head, f"messages[{last}]", len(counted.tokens))


def with_other_words(message: InputMessage) -> InputMessage:
    """A user message with other words: results of calls stay results, as the template may want them."""
    words = secrets.token_hex(16)
    if isinstance(message.content, str):
        return InputMessage("user", words)
    results = tuple(replace(each, content=words) for each in message.content if isinstance(each, ToolResultBlock))
    return InputMessage("user", results or (TextBlock(words),))


async def warm(
    context: ServerContext, prefix: Prefix, request_context: RequestContext, phases: Phases
) -> CacheWarmed | Failed:
    """Compute a prefix, unless it is there: what that took, or how it failed. Raises Overloaded and ValueError."""
    count, started = len(prefix.tokens), None
    if count:
        sender = request_context.sender
        request = GenerationRequest(
            tokens=prefix.tokens,
            max_tokens=0,
            salt=request_context.salt,
            head=prefix.head,
            agent=own_id(request_context.owner, sender.agent),
            session=own_id(request_context.owner, sender.session),
            owner=request_context.owner,
            priority=-1,
        )
        async with aclosing(context.engine.generate(request)) as events:
            async for event in events:
                if isinstance(event, Failed):
                    return event
                started = event if isinstance(event, Started) else started
    if started is None:
        return CacheWarmed(prefix.prompt_tokens, 0, prefix.until, 0, 0, {}, {})
    phases.seconds.update(queue=started.queued_s, prefill=started.prefill_s)
    return CacheWarmed(
        input_tokens=prefix.prompt_tokens,
        warmed_tokens=count,
        until=prefix.until,
        cache_read_input_tokens=started.reused_tokens,
        cache_creation_input_tokens=count - started.reused_tokens,
        cache_read_by_tier=reused_by_tier(started),
        phases_ms=phases.ms(),
    )


@dataclass(frozen=True)
class WarmBody:
    """A body of `--warm`: where it stands, and whose requests are to read it."""

    place: str  # file, and line of one with several
    message: CountTokensRequest
    key: str = ""  # the name of a key of --api-key-file


@dataclass
class Warming:
    """How far the start's warming is; one task writes it."""

    bodies: Sequence[WarmBody]
    required: bool  # before `/ready`
    done: list[str] = field(default_factory=list)  # places, also of those that failed

    @property
    def missing(self) -> list[str]:
        """The places of bodies that are not computed yet."""
        return [body.place for body in self.bodies[len(self.done) :]]

    async def run(self, context: ServerContext) -> None:
        """Compute all bodies, one after the other. What fails is logged and left out."""
        for body in self.bodies:
            try:
                await self.one(context, body)
            except (InvalidRequest, Overloaded, ValueError) as error:
                log.warning("--warm: %s: %s", body.place, error)
            except Exception:  # the start goes on without it
                log.exception("--warm: %s: it is left out", body.place)
            self.done.append(body.place)

    async def one(self, context: ServerContext, body: WarmBody) -> None:
        """Compute one body."""
        asked, phases = context_of_key(context, body.key), Phases()
        prefix = await run_in_threadpool(prefix_of, context, body.message, asked, phases)
        warmed = await warm(context, prefix, asked, phases)
        if isinstance(warmed, Failed):
            log.warning("--warm: %s: %s", body.place, warmed.message)
            return
        read, computed = warmed.cache_read_input_tokens, warmed.cache_creation_input_tokens
        log.info("--warm: %s: read=%d computed=%d ms=%.0f", body.place, read, computed, 1e3 * phases.elapsed())


def context_of_key(context: ServerContext, key: str) -> RequestContext:
    """The context of a request that a key's client would send."""
    shared = context.config.share_prefix
    if not key or shared == EVERYTHING:
        return RequestContext(context.rules)
    return RequestContext(context.rules, private_salt(key, b""), key.encode(), shares_head=shared == HEADS)


def read_warm(config: ServerConfig) -> list[WarmBody]:
    """The bodies in the files of `--warm`. Raises ValueError with the file, the field, what it has and should have."""
    if not config.warm:
        return []
    keys = open_keys(config.api_key, config.api_key_file)
    names = {key.name for key in keys.keys if key.name} if keys else set()
    needed = bool(names) and config.share_prefix != EVERYTHING
    bodies = []
    for place, content in (each for path in config.warm.split(",") for each in contents(Path(path.strip()))):
        body = read_warm_body(place, content)
        if needed and body.key not in names:
            found = f"{body.key!r:.80}" if body.key else "none"
            raise ValueError(f"--warm: {place}: key: expected one of {', '.join(sorted(names))!s:.200}, found {found}")
        bodies.append(body)
    return bodies


def contents(path: Path) -> list[tuple[str, bytes]]:
    """The bodies in a file, or in a folder of files, with their places. Raises ValueError."""
    try:
        if path.is_dir():
            return [each for file in sorted(path.iterdir()) if file.is_file() for each in contents(file)]
        if path.suffix != LINES:
            return [(str(path), path.read_bytes())]
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"--warm: {path}: expected a file of request bodies: {error.strerror}") from error
    return [(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def read_warm_body(place: str, content: bytes) -> WarmBody:
    """The body that stands at a place: as a request has it, or in the field `body` of an object that names a `key`."""
    try:
        message, value = read_capture(content), decode_json(content)
    except (InvalidRequest, ValueError, RecursionError) as error:
        expected = "expected the body of a request to one of the three APIs"
        raise ValueError(f"--warm: {place}: {expected}: {str(error) or type(error).__name__}") from error
    key: Any = value.get("key", "") if isinstance(value, dict) and "messages" not in value else ""
    if not isinstance(key, str):
        raise ValueError(f"--warm: {place}: key: expected the name of a key, found {msgspec.json.encode(key)[:80]!r}")
    return WarmBody(place, message, key)
