"""The limits of one request, and of all that are in flight."""

from __future__ import annotations

from collections.abc import Iterator

from anyio import CapacityLimiter

from serve.api.messages import CountTokensRequest, InvalidRequest, MessagesRequest
from serve.limits.bodies import depth, lists_in
from serve.limits.exceeded import RETRY_SECONDS, LimitExceeded
from serve.web.flags import option
from serve.web.limit_flags import LimitFlags

OVERLOADED = 529
LARGE_BYTES = 2**20  # bodies beyond it are read and tokenised by a few threads of their own, so that others never wait
LARGE_THREADS = 4


def decodable(body: bytes | bytearray, limits: LimitFlags) -> bytes | bytearray:
    """The body, before it is decoded. Raises InvalidRequest for one that nests too deeply, or has too many of anything.

    To decode tens of thousands of tools would hold the interpreter for too long.
    """
    if (found := depth(body, limits.max_json_depth)) > limits.max_json_depth:
        raise InvalidRequest(
            f"body: expected at most {limits.max_json_depth} brackets within each other, got {found}: flatten it, or "
            "raise --max-json-depth",
            "max_json_depth",
        )
    lists = lists_in(body, min(limits.max_tools, limits.max_messages))
    refuse_beyond(limits, "max_tools", "tools", "tools", len(lists.tools))
    refuse_beyond(limits, "max_messages", "messages", "messages", len(lists.messages))
    return body


def refuse_too_many(request: CountTokensRequest, limits: LimitFlags) -> None:
    """Raise InvalidRequest for a request with too many of anything, before any of it is rendered."""
    for limit, field, things, found in counts(request):
        refuse_beyond(limits, limit, field, things, found)


def refuse_beyond(limits: LimitFlags, limit: str, field: str, things: str, found: int) -> None:
    """Raise InvalidRequest if there are more things in a field than a limit allows."""
    if found > (most := getattr(limits, limit)):
        raise InvalidRequest(
            f"{field}: expected at most {most} {things}, got {found}: send fewer, or raise {option(limit)}", limit
        )


def counts(request: CountTokensRequest) -> Iterator[tuple[str, str, str, int]]:
    """(limit, field, what is counted, how many there are) of each count that is limited."""
    yield "max_tools", "tools", "tools", len(request.tools or ())
    yield "max_messages", "messages", "messages", len(request.messages)
    blocks = sum(len(message.content) for message in request.messages if not isinstance(message.content, str))
    yield "max_blocks", "messages", "content blocks", blocks
    if isinstance(request, MessagesRequest):
        yield "max_stop_sequences", "stop_sequences", "stop sequences", len(request.stop_sequences or ())


class InFlight:
    """What all requests together have in flight. Only the event loop's thread calls it."""

    def __init__(self, limits: LimitFlags) -> None:
        self.limits = limits
        self.requests = self.tokens = self.body_bytes = 0
        self.large_threads = CapacityLimiter(LARGE_THREADS)

    def admit(self) -> Admitted:
        """Count one more request. Raises LimitExceeded."""
        self.refuse_beyond("max_requests", "requests", self.requests, 1)
        self.requests += 1
        return Admitted(self)

    def refuse_beyond(self, limit: str, what: str, now: int, more: int) -> None:
        """Raise LimitExceeded if so much more does not fit."""
        most = getattr(self.limits, limit)
        if most is not None and now + more > most:
            text = f"{what}: {now} in flight and {more} more, at most {most} may be"
            raise LimitExceeded(f"{text}: try again, or raise {option(limit)}", limit, OVERLOADED, RETRY_SECONDS)


class Admitted:
    """One request, from its admission to its end, and what it has in flight."""

    def __init__(self, all: InFlight) -> None:
        self.all, self.tokens, self.body_bytes = all, 0, 0

    def take_body(self, count: int) -> None:
        """Count a piece of the body. Raises LimitExceeded."""
        self.all.refuse_beyond("max_bodies_bytes", "bytes of bodies", self.all.body_bytes, count)
        self.all.body_bytes += count
        self.body_bytes += count

    def take(self, count: int) -> None:
        """Count the tokens of the prompt and of the answer that is asked for.

        Raises LimitExceeded, and InvalidRequest for more than may ever be in flight.
        """
        most = self.all.limits.max_tokens_in_flight
        if most is not None and count > most:
            raise InvalidRequest(
                f"max_tokens: expected at most {most} tokens of prompt and max_tokens, got {count}: ask for fewer, or "
                "raise --max-tokens-in-flight",
                "max_tokens_in_flight",
            )
        self.all.refuse_beyond("max_tokens_in_flight", "tokens", self.all.tokens, count)
        self.all.tokens += count
        self.tokens += count

    @property
    def threads(self) -> CapacityLimiter | None:
        """The threads that read and tokenise the body, which has arrived; None for the usual ones."""
        return self.all.large_threads if self.body_bytes > LARGE_BYTES else None

    def end(self) -> None:
        """Give back what it has in flight."""
        self.all.requests -= 1
        self.all.tokens -= self.tokens
        self.all.body_bytes -= self.body_bytes
