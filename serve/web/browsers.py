"""Which requests of browsers a server without a key refuses, since any page that its user opens can send some.

A page reaches a server on loopback by a name of its own that it lets point to 127.0.0.1 (DNS rebinding), which the
`host` header gives away, and by requests that browsers send to other sites unasked, with bodies that are not JSON
(https://fetch.spec.whatwg.org/#cors-safelisted-request-header). Browsers say where a request comes from in `origin`
and `sec-fetch-site` (https://www.w3.org/TR/fetch-metadata/).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Scope

from serve.web.access import OPEN_PATHS
from serve.web.flags import Address, is_loopback, names_in
from serve.web.headers import APPLIED_HEADER, REPORT_HEADER

ANY_ORIGIN = "*"
READING = ("GET", "HEAD")
ELSEWHERE = ("cross-site", "same-site")  # another port of this machine is the same site
EXPOSED_HEADERS = ("request-id", "server-timing", APPLIED_HEADER, REPORT_HEADER)
# Of every answer: no page may embed it, and none may take it for something else than it is.
ANSWER_HEADERS = ((b"x-content-type-options", b"nosniff"), (b"cross-origin-resource-policy", b"same-origin"))


class Refusal(NamedTuple):
    """The answer to a request that is not served."""

    status: int
    message: str


@dataclass(frozen=True)
class BrowserRules:
    """The names under which a server may be called, besides those of loopback, and the pages that may call it."""

    hosts: frozenset[str]
    origins: frozenset[str]

    def refusal(self, scope: Scope, path: str, json_only: bool = True) -> Refusal | None:
        """Why a request to `path` is refused; None if it may pass. With `json_only`, a body has to be JSON."""
        hosts = header_values(scope, b"host")
        for host in map(host_name, hosts):
            if host not in self.hosts and not is_loopback(host):
                return Refusal(403, f"host: expected localhost or a name given by --allow-host, found {host!r:.80}")
        method = scope["method"]
        if not (method in READING and path in OPEN_PATHS) and (page := self.foreign_page(scope, hosts)):
            return Refusal(403, f"{page} may not call this server: see --allow-origin, or give it an --api-key")
        for kind in header_values(scope, b"content-type"):
            if json_only and method not in READING and not is_json(kind):
                return Refusal(415, f"content-type: expected application/json, found {kind!r:.80}")
        return None

    def foreign_page(self, scope: Scope, hosts: Iterable[str]) -> str | None:
        """The page of another site that sends a request, in words; None if it is sent by nobody's page or our own."""
        own = {host.lower() for host in hosts}
        found = header_values(scope, b"origin")
        origins = [origin for origin in found if urlsplit_netloc(origin) not in own]
        if foreign := [origin for origin in origins if not {origin, ANY_ORIGIN} & self.origins]:
            return f"origin: a page of {foreign[0]!r:.80}"
        sites = [site for site in header_values(scope, b"sec-fetch-site") if site in ELSEWHERE]
        return f"sec-fetch-site: a page that is {sites[0]}" if sites and not origins else None


def browser_rules(config: Address, keyed: bool) -> BrowserRules | None:
    """The rules for a server at an address; None if it is `keyed`, since no page has its key."""
    if keyed:
        return None
    hosts = {config.host.lower(), *(host_name(name) for name in names_in(config.allow_host))}
    return BrowserRules(frozenset(hosts), frozenset(names_in(config.allow_origin)))


def cors(config: Address) -> list[Middleware]:
    """What lets pages of `--allow-origin` read answers (https://fetch.spec.whatwg.org/#http-cors-protocol)."""
    if not (origins := names_in(config.allow_origin)):
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    ]


def header_values(scope: Scope, name: bytes) -> list[str]:
    """Every value of a header of a request that is not empty."""
    return [value.decode("latin-1").strip() for key, value in scope["headers"] if key == name and value.strip()]


def host_name(authority: str) -> str:
    """The host of `host:port` in lower case, without the brackets of an IPv6 address."""
    if authority.startswith("["):
        return authority[1:].partition("]")[0].lower()
    return authority.partition(":")[0].rstrip(".").lower()


def urlsplit_netloc(origin: str) -> str:
    """Host and port of an origin, as the `host` header has them; "" for `null` and for what is no URL."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def is_json(content_type: str) -> bool:
    """Whether a `content-type` means JSON."""
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")
