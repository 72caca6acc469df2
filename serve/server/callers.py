"""Who sends a request, and what its headers ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.requests import Request

from serve.api.messages import InvalidRequest
from serve.api.retention import wishes
from serve.limits.recent import SCOPE
from serve.rules.normalize import parse_rules
from serve.server.config import EVERYTHING, HEADS
from serve.server.context import BACKGROUND, INTERACTIVE, RequestContext, ServerContext, unrendered
from serve.web.access import given_id
from serve.web.agents import is_final, own_id, parent_of, sender_of
from serve.web.headers import PRIORITY_HEADER, RULES_HEADER, SALT_HEADER, UNUSED_HEADER
from serve.web.keys import Admission, Keys, private_salt

T = TypeVar("T")


async def in_own_thread(
    request_context: RequestContext, work: Callable[[], T], threads: CapacityLimiter | None = None
) -> T:
    """The result of `work` in one of some `threads`, by default those that all share.

    A named key has a few of its own, so that it waits for no other key's work.
    """
    if request_context.admission is not None and request_context.owner:
        threads = request_context.admission.usage.threads
    return await to_thread.run_sync(work, limiter=threads)


def request_context_of(request: Request, context: ServerContext) -> RequestContext:
    """What the request's headers say. Raises InvalidRequest for rules that cannot be applied."""
    headers = request.headers
    key = headers.get("x-api-key") or headers.get("authorization") or ""
    salt, agent = headers.get(SALT_HEADER, "").encode(), headers.get("user-agent", "")
    admission: Admission | None = request.scope.get("admission")
    if b"\0" in salt:  # with which the salts of keys begin
        raise InvalidRequest(f"{SALT_HEADER}: expected no zero bytes, found one")
    shared, shares_head = context.config.share_prefix, False
    if admission and admission.key.name and shared != EVERYTHING:
        shares_head = shared == HEADS and not salt  # a salt asks to share nothing
        # The name in place of the key, so that a new key of the same name goes on with its sessions.
        key, salt = admission.key.name, private_salt(admission.key.name, salt)
    SCOPE.set(salt.decode("latin-1"))  # of this request's task, and of the threads that work for it
    rules, named = rules_of(request, context), given_id(request.scope)
    return RequestContext(
        rules,
        salt,
        key.encode(),
        agent,
        sender_of(headers),
        parent_of(headers),
        is_final(headers),
        admission,
        shares_head,
        named,
        share_of(request),
        priority_of(request),
    )


def share_of(request: Request) -> float:
    """The part of what may be kept in the cache that is the request's key's: as much as any other's."""
    app = request.scope.get("app")
    keys: Keys | None = app.state.keys if app else None
    return 1 / len(keys.keys) if keys and keys.path else 1.0


def priority_of(request: Request) -> str:
    """What a request's key and header say of its priority: a key that is in the background stays there."""
    admission: Admission | None = request.scope.get("admission")
    if admission and admission.key.background:
        return BACKGROUND
    header = request.headers.get(PRIORITY_HEADER, "").strip().lower()
    return header if header in (INTERACTIVE, BACKGROUND) else INTERACTIVE if header else ""


def wishing(request_context: RequestContext, body: bytes | bytearray) -> RequestContext:
    """The same, with what the body asks of the cache and of the scheduler: header and key say more than it does."""
    found = wishes(body)
    said = {True: BACKGROUND, False: INTERACTIVE, None: ""}[found.background]
    return replace(request_context, wishes=found, priority=request_context.priority or said)


def told_headers(request_context: RequestContext) -> dict[str, str]:
    """The headers that say what was made of a request's hints, if it has any."""
    priority, unused = request_context.priority, request_context.wishes.unused
    return ({PRIORITY_HEADER: priority} if priority else {}) | ({UNUSED_HEADER: ", ".join(unused)} if unused else {})


def rules_of(request: Request, context: ServerContext) -> frozenset[str]:
    """The normaliser's rules for this request: those that its header names, or the server's."""
    header = request.headers.get(RULES_HEADER)
    if header is None:
        return context.rules
    try:
        names = parse_rules(header)
    except ValueError as error:
        raise InvalidRequest(f"{RULES_HEADER}: {error}") from error
    if problem := unrendered(context.tokenizer, names):
        raise InvalidRequest(f"{RULES_HEADER}: {problem}")
    return names


def agent_of(request: Request) -> str:
    """The id of the agent that sends a request, as the engine knows it; "" if no header says so."""
    admission: Admission | None = request.scope.get("admission")
    return own_id(admission.key.name if admission else "", sender_of(request.headers).agent)
