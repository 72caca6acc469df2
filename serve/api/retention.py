"""What a request asks of the cache: how long prefixes are to stay, and how urgent it is. Changes no token of a prompt.

Read beside the request itself, since markers move from turn to turn and must not be part of what turns are compared by:

- `cache_control` with a `ttl`, on tools, on system text, on blocks of messages, or of the request as a whole:
  https://platform.claude.com/docs/en/build-with-claude/prompt-caching
- `prompt_cache_retention`: https://platform.openai.com/docs/guides/prompt-caching
- `service_tier: flex`: https://platform.openai.com/docs/guides/flex-processing
- `nvext.cache_control` and `nvext.agent_hints`:
  https://docs.nvidia.com/dynamo/latest/additional-resources/nvidia-request-extensions-nvext

What cannot be done is told in the answer (`Asked.instead`), and never refuses a request.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from msgspec import Raw, Struct

HEAD = 0  # the place of tools and system text; any other place is a message's, counted from the last one, which is 1
LAST = 1
DAY = 86_400.0
MOST_SECONDS = DAY
MOST_ASKED = 4  # markers of a request that count, as the Messages API has it
DEFAULT_SECONDS = 300.0  # of a `cache_control` without `ttl`
DURATION = re.compile(r"([0-9]{1,9})\s*([smhd])")
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": DAY}
RETENTIONS = {"in_memory": 300.0, "in-memory": 300.0, "24h": DAY}  # of OpenAI's
MARKER = b"cache_control"
FIELDS = (MARKER, b"prompt_cache_retention", b"nvext", b"service_tier")
UNUSED_HINTS = ("osl", "iat", "speculative_prefill", "latency_sensitivity", "prefix_id", "total_requests")


@dataclass(frozen=True)
class Asked:
    """A prefix that a request asks to be kept."""

    field: str  # that asks, as the answer names it
    place: int  # of the last message in it, see HEAD
    seconds: float  # after each use; 0 if nothing is kept
    ttl: str  # as it was written
    instead: str = ""  # what is done in place of what was asked


@dataclass(frozen=True)
class Wishes:
    """All that a request asks of the cache and of the scheduler."""

    asked: tuple[Asked, ...] = ()
    background: bool | None = None  # None if it does not say
    unused: tuple[str, ...] = ()  # hints that nothing here reads


class WithContent(Struct, frozen=True):
    """A message."""

    content: Raw = Raw()


class MarkedBody(Struct, frozen=True):
    """The fields of a body that ask for something; the long ones are decoded only where they hold a marker."""

    tools: Raw = Raw()
    system: Raw = Raw()
    messages: Raw = Raw()
    cache_control: Any = None
    prompt_cache_retention: Any = None
    service_tier: Any = None
    nvext: Any = None


_DECODER = msgspec.json.Decoder(MarkedBody)


def wishes(body: bytes | bytearray) -> Wishes:
    """What the body of a request of any API asks for; nothing where it is no such body."""
    if not any(field in body for field in FIELDS):
        return Wishes()
    try:
        marked = _DECODER.decode(body)
    except (ValueError, RecursionError):  # it is refused elsewhere, or mended
        return Wishes()
    nvext = marked.nvext if isinstance(marked.nvext, dict) else {}
    hints = nvext.get("agent_hints")
    hints = hints if isinstance(hints, dict) else {}
    unused = tuple(f"nvext.agent_hints.{name}" for name in UNUSED_HINTS if name in hints)
    return Wishes(tuple(counted(markers(marked, nvext))), in_background(marked.service_tier, hints), unused)


def in_background(service_tier: Any, hints: dict[str, Any]) -> bool | None:
    """Whether others come first: for `flex`, and for a priority below 0, as higher ones are more urgent."""
    priority = hints.get("priority")
    if isinstance(priority, int | float):
        return priority < 0
    return True if service_tier == "flex" else None


def markers(body: MarkedBody, nvext: dict[str, Any]) -> Iterator[Asked]:
    """All that a body asks to be kept, in the order of the prompt."""
    for name, items in (("tools", body.tools), ("system", body.system)):
        for i, marker in cache_controls(items):
            yield asked(f"{name}[{i}].cache_control", HEAD, marker)
    messages = elements(body.messages)
    for i, message in enumerate(messages):
        for n, marker in cache_controls(content_of(message)):
            yield asked(f"messages[{i}].content[{n}].cache_control", len(messages) - i, marker)
    if body.cache_control is not None:
        yield asked("cache_control", LAST, body.cache_control)
    if "cache_control" in nvext:
        yield asked("nvext.cache_control", LAST, nvext["cache_control"])
    if body.prompt_cache_retention is not None:
        yield retention("prompt_cache_retention", body.prompt_cache_retention)


def cache_controls(items: Raw) -> Iterator[tuple[int, Any]]:
    """The markers of items, with their places in the list."""
    for i, item in enumerate(elements(items)) if MARKER in bytes(items) else ():
        found = msgspec.json.decode(item) if MARKER in bytes(item) else None
        if isinstance(found, dict) and found.get("cache_control") is not None:
            yield i, found["cache_control"]


def elements(items: Raw) -> list[Raw]:
    """The elements of a list; none of anything else."""
    try:
        return msgspec.json.decode(items, type=list[Raw]) if items else []
    except msgspec.ValidationError:
        return []


def content_of(message: Raw) -> Raw:
    """The content of a message with a marker in it; empty for any other."""
    if MARKER not in bytes(message):
        return Raw()
    try:
        return msgspec.json.decode(message, type=WithContent).content
    except msgspec.ValidationError:
        return Raw()


def asked(field: str, place: int, marker: Any) -> Asked:
    """What a marker asks for."""
    if not isinstance(marker, dict):
        return Asked(
            field, place, 0.0, "", f"expected an object, found {marker!r:.80}: it is cached as all prompts are"
        )
    ttl = marker.get("ttl")
    if ttl is None:
        return Asked(field, place, DEFAULT_SECONDS, "5m")
    found = DURATION.fullmatch(ttl) if isinstance(ttl, str) else None
    if found is None:
        problem = f"ttl: expected a time such as 5m or 1h, found {ttl!r:.80}: kept for 5m"
        return Asked(field, place, DEFAULT_SECONDS, "5m", problem)
    seconds = int(found[1]) * UNITS[found[2]]
    if not 0 < seconds <= MOST_SECONDS:
        kept = min(max(seconds, DEFAULT_SECONDS), MOST_SECONDS)
        return Asked(field, place, kept, str(ttl), f"ttl: expected 1s to 24h, found {ttl:.80}: kept for {kept:.0f} s")
    return Asked(field, place, seconds, str(ttl))


def retention(field: str, value: Any) -> Asked:
    """What OpenAI's field asks for."""
    seconds = RETENTIONS.get(value) if isinstance(value, str) else None
    if seconds is None:
        problem = f"expected in_memory or 24h, found {value!r:.80}: kept for 5m, as in_memory is"
        return Asked(field, LAST, DEFAULT_SECONDS, "5m", problem)
    return Asked(field, LAST, seconds, str(value))


def counted(found: Iterable[Asked]) -> list[Asked]:
    """The last marker of each place and time, as earlier ones ask for a part of the same; of more, the last few."""
    latest: dict[tuple[int, float, bool], Asked] = {}
    for each in found:
        latest[each.place, each.seconds, bool(each.instead)] = each
    every = list(latest.values())
    left_out = len(every) - MOST_ASKED
    if left_out <= 0:
        return every
    kept = every[left_out:]
    note = f"{left_out} markers before it are left out: the last {MOST_ASKED} count"
    return [replace(kept[0], instead="; ".join(part for part in (kept[0].instead, note) if part)), *kept[1:]]
