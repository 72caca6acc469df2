"""The engine that the proxy forwards to: its address, the headers in both directions, and its faults."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpcore

VENDOR = "anthropic.com"
# Headers of one connection, which are not forwarded: https://www.rfc-editor.org/rfc/rfc9110#section-7.6.1.
# The proxy's HTTP server has answered `expect`.
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade expect".split()
)
REFUSALS = (429, 503, 529)  # statuses with which an engine refuses what it could take at another time
FAILURES = (500, 502, 504)  # statuses with which an engine, or what is before it, says that it has failed
KEYS = (b"x-api-key", b"authorization")  # the headers with a client's key
Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Upstream:
    """The address of the engine."""

    scheme: bytes
    host: bytes
    port: int | None
    path: bytes = b""  # prefix of every path
    timeout: float = 600.0  # seconds without a byte after which a request is given up
    api_key: str | None = field(default=None, repr=False)  # that replaces the clients' keys

    @property
    def authority(self) -> bytes:
        """The value of the `host` header."""
        host = b"[%b]" % self.host if b":" in self.host else self.host
        return host if self.port is None else b"%b:%d" % (host, self.port)

    @property
    def url(self) -> str:
        """Its URL, which names it."""
        return (self.scheme + b"://" + self.authority + self.path).decode()

    @property
    def is_vendor(self) -> bool:
        """Whether it is the vendor's own API."""
        host = self.host.decode()
        return host == VENDOR or host.endswith(f".{VENDOR}")

    def keyed(self, headers: Headers) -> Headers:
        """A request's headers with the key for the engine in place of the client's.

        Engines read it from `authorization` on every route, or as the Messages API has it, from `x-api-key`. The
        vendor's own API would take the first for another kind of credential.
        """
        if not self.api_key:
            return headers
        kept = [(name, value) for name, value in headers if name.lower() not in KEYS]
        key = self.api_key.encode()
        bearer = [] if self.is_vendor else [(b"authorization", b"Bearer " + key)]
        return [*kept, (b"x-api-key", key), *bearer]


class UpstreamFault(Exception):
    """The engine cannot be reached or breaks HTTP's rules; `status` is 502, or 504 if it is too slow.

    `unsent` if there was no connection on which anything could be sent.
    """

    def __init__(self, status: int, text: str, unsent: bool = False) -> None:
        super().__init__(text)
        self.status, self.unsent = status, unsent


class Refused(Exception):
    """The engine has answered with an error that another one might not have: one of REFUSALS or FAILURES.

    `status`, `headers` and `body` are its answer, which for an error within a stream is the stream so far.
    """

    def __init__(self, error: int, status: int, headers: Headers, body: bytes) -> None:
        super().__init__(f"the upstream answered with status {error}")
        self.error, self.status, self.headers, self.body = error, status, headers, body

    @property
    def is_stream(self) -> bool:
        """Whether the answer has events."""
        return any(name.lower() == b"content-type" and is_events(value) for name, value in self.headers)


def is_events(content_type: bytes) -> bool:
    """Whether a `content-type` is that of a stream of events."""
    return content_type.partition(b";")[0].strip().lower() == b"text/event-stream"


def retry_after(headers: Headers) -> float | None:
    """Seconds after which to ask again, if an answer says so: https://www.rfc-editor.org/rfc/rfc9110#section-10.2.3."""
    given = next((value for name, value in headers if name.lower() == b"retry-after"), b"").strip()
    return float(given) if given.isdigit() else None


def parse_upstream(url: str, rules: frozenset[str], timeout: float, api_key: str | None = None) -> Upstream:
    """The engine at a URL. Raises ValueError for an invalid URL, timeout or key, and for rules that it forbids."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--upstream: expected a URL such as http://127.0.0.1:8000, got {url!r:.80}")
    host = parts.hostname.rstrip(".")
    if not timeout > 0:
        raise ValueError(f"--timeout: expected more than 0 seconds, got {timeout}")
    if api_key and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise ValueError(f"--upstream-api-key: expected printable ASCII without spaces, got {len(api_key)} others")
    path = parts.path.rstrip("/").encode()
    upstream = Upstream(parts.scheme.encode(), host.encode(), parts.port, path, timeout, api_key)
    if rules and upstream.is_vendor:
        refused = "needs the billing header that strip-preamble removes"
        if "strip-preamble" not in rules:
            refused = f"expects prompts as its clients wrote them, not as {', '.join(sorted(rules))} changes them"
        raise ValueError(f"{host} {refused}: add --normalize none")
    if "tools-first" in rules:
        raise ValueError(
            "--normalize: the proxy cannot apply tools-first, which needs the chat template; use the server"
        )
    return upstream


@contextmanager
def faults() -> Iterator[None]:
    """Turn the HTTP client's exceptions into UpstreamFault."""
    try:
        yield
    except httpcore.TimeoutException as error:
        unsent = isinstance(error, httpcore.ConnectTimeout)
        raise UpstreamFault(504, f"the upstream is too slow: {type(error).__name__}", unsent) from error
    except (httpcore.NetworkError, httpcore.ProtocolError) as error:
        unsent = isinstance(error, httpcore.ConnectError)
        raise UpstreamFault(502, f"the upstream failed: {type(error).__name__}: {error}", unsent) from error


async def pieces(answer: httpcore.Response) -> AsyncIterator[bytes]:
    """The body of an answer as it arrives; raises UpstreamFault if it breaks off."""
    with faults():
        async for piece in answer.aiter_stream():
            yield piece


def request_headers(given: Headers, upstream: Upstream, length: int | None, decoded: bool = False) -> Headers:
    """A client's headers for the engine; `length` is that of the body, or None if the client's own header is kept.

    With `decoded`, the body has no `content-encoding` any more.
    """
    dropped = [b"host", *([] if length is None else [b"content-length"]), *([b"content-encoding"] if decoded else [])]
    kept = upstream.keyed(end_to_end(given, *dropped))
    if length is not None:
        kept.append((b"content-length", str(length).encode()))
    elif any(name == b"transfer-encoding" for name, _ in given):
        kept.append((b"transfer-encoding", b"chunked"))
    return [(b"host", upstream.authority), *kept]


def end_to_end(headers: Headers, *without: bytes) -> Headers:
    """The headers that are forwarded: all except those of one connection and those in `without`."""
    named = b",".join(value for name, value in headers if name.lower() == b"connection")
    dropped = HOP_BY_HOP.union(without, (name.strip().lower() for name in named.split(b",")))
    return [(name, value) for name, value in headers if name.lower() not in dropped]
