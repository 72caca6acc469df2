"""What the proxy makes of a chat request: which route its path means, its body decoded and after the rules."""

from __future__ import annotations

from dataclasses import dataclass

from serve.limits.encodings import BodyTooLarge, MalformedBody, UnsupportedEncoding, decode_body
from serve.proxy.prefix import Prompt
from serve.rules.body import FIELDS, EditedBody, Unread, normalize_body
from serve.web.pages import MAX_BODY_BYTES
from serve.web.paths import VERSION, api_path

Body = bytes | bytearray


@dataclass(frozen=True)
class Chat:
    """A chat request after the rules."""

    id: str  # of the report on it
    path: str  # the route that is meant
    agent: str  # the client's name
    sent: Body  # what the engine gets: the body, or the client's own bytes if no rule changed it
    decoded: bool  # whether `sent` lacks the client's `content-encoding`
    body: Body  # without `content-encoding`
    applied: tuple[str, ...]  # the rules that changed it, with their places
    received: float  # when its last byte arrived, by `time.perf_counter`
    held_s: float  # how long decoding and the rules took, and reading the prompt
    salt: str = ""  # the cache salt that its header names
    key: str = ""  # the name of the API key that sent it
    prompt: Prompt | None = None  # to choose an upstream by, where there are several


def chat_route(path: str) -> str | None:
    """The chat route at the end of a decoded path, one of FIELDS; None if there is none.

    Engines and gateways have the routes after prefixes of their own, with the version or without it.
    """
    meant = api_path(path)
    known = (route for route in FIELDS if meant == route or meant.endswith(route.removeprefix(f"/{VERSION}")))
    return max(known, key=len, default=None)


def edit_body(body: Body, encodings: str, route: str, rules: frozenset[str]) -> tuple[EditedBody, bool]:
    """The body after its `content-encoding` was decoded and the rules applied, and whether any rule changed it.

    A body that cannot be decoded is returned as it is, and `unread` says why.
    """
    try:
        plain = decode_body(body, encodings, MAX_BODY_BYTES)
    except BodyTooLarge as error:
        return EditedBody(body, unread=Unread("too_large", str(error))), False
    except (MalformedBody, UnsupportedEncoding) as error:
        return EditedBody(body, unread=Unread("encoding", str(error))), False
    edited = normalize_body(plain, route, rules)
    return edited, edited.body is not plain
