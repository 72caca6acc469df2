"""The flags that limit what clients may send and hold: those of connections, which the proxy has as well, and the rest.

Each refusal names its flag, and `tokenzero_refused_requests_total` counts it by that name.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

from cache.sizes import parse_bytes
from serve.api.stops import MAX_STOPS
from serve.limits.bounds import GRAMMAR_CHARS
from serve.web.flags import flag

LIMITS = "limits"


def size_limit(help: str, default: str, least: int = 1) -> Any:
    """A field for a limit in bytes, whose default is written with its unit."""
    return flag(help, LIMITS, parse_bytes(default), metavar="SIZE", parse=parse_bytes, shown=default, least=least)


def count_limit(help: str, default: int, most: float = inf) -> Any:
    """A field for a limit that is a number."""
    return flag(help, LIMITS, default, metavar="N", least=1, most=most)


def time_limit(help: str, default: float) -> Any:
    """A field for a limit in seconds."""
    return flag(help, LIMITS, default, metavar="S", least=0.001)


@dataclass(frozen=True, kw_only=True)
class ConnectionFlags:
    """The limits of connections."""

    max_connections: int = count_limit(
        "open connections; one more takes the place of one that waits for a request, or gets 529", 4096
    )
    max_connections_per_address: int = count_limit("of these, of one address; one more gets 429", 1024)
    max_header_line_bytes: int = size_limit("a longer header gets 431, a longer path 414", "16KiB", 64)
    max_header_bytes: int = size_limit("all headers of a request; more get 431", "64KiB", 256)
    header_seconds: float = time_limit("time limit for the headers of a request; later ones get 408", 10.0)
    body_seconds: float = time_limit("time limit for the body of a request; a later one gets 408", 60.0)
    stall_seconds: float = time_limit(
        "a client that takes less than 48 KiB of a waiting answer in this time is given up", 60.0
    )


@dataclass(frozen=True, kw_only=True)
class LimitFlags(ConnectionFlags):
    """The limits of the server."""

    max_body_bytes: int = size_limit("a longer body gets 413, compressed or not", "32MiB")
    max_bodies_bytes: int = size_limit("all bodies of requests in flight; one more gets 529", "1GiB")
    max_requests: int = count_limit("requests of all keys that are read, wait or run; one more gets 529", 1024)
    max_tokens_in_flight: int | None = flag(
        "tokens of prompts and of max_tokens in flight, of all keys; a request beyond them gets 529",
        LIMITS,
        None,
        metavar="TOKENS",
        parse=int,
        least=1,
        shown="no limit besides --max-queue",
    )
    max_json_depth: int = count_limit("brackets within brackets of a body; more get 400", 512)
    max_tools: int = count_limit("tools of a request; more get 400", 10_000)
    max_messages: int = count_limit("messages of a request; more get 400", 50_000)
    max_blocks: int = count_limit("content blocks of a request; more get 400", 50_000)
    max_stop_sequences: int = count_limit(
        "stop sequences of a request, of 256 characters each; more get 400", MAX_STOPS, most=MAX_STOPS
    )
    max_grammar_chars: int = count_limit(
        "characters of the schemas that one answer has to obey; more get 400", GRAMMAR_CHARS, most=GRAMMAR_CHARS
    )
    grammar_seconds: float = time_limit(
        "processor time to compile the schemas that one answer has to obey; what takes longer gets 400", 5.0
    )
