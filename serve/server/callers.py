"""Who sends a request, and what its headers ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.requests import Request

from serve.api.messages import InvalidRequest
from serve.limits.recent import SCOPE
from serve.rules.normalize import parse_rules
from serve.server.config import EVERYTHING, HEADS
from serve.server.context import RequestContext, ServerContext, unrendered
from serve.web.access import given_id
from serve.web.agents import is_final, parent_of, sender_of
from serve.web.headers import RULES_HEADER, SALT_HEADER
from serve.web.keys import Admission, private_salt

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
    )


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
