"""The proxy's own metrics and health, where it has several upstreams, in Prometheus' text format.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

from serve.proxy.fleet import Fleet, Member

PREFIX = "tokenzero_proxy_"
# (name, type, what it is); each by upstream.
COUNTERS = (
    ("requests", "Attempts to have a request answered."),
    ("refused", "Attempts that were refused for now, with 429, 503 or 529."),
    ("failed", "Attempts that could not connect, broke off, failed with 500, 502 or 504, or were given up."),
    ("first_tokens", "Streams that have had their first token."),
    ("ttft_ms", "Milliseconds to these first tokens, added up."),
    ("prompt_tokens", "Tokens of prompts, as answers report them."),
    ("cached_tokens", "Of these, tokens that were cached."),
)


def metrics_page(fleet: Fleet, refused: Mapping[str, int]) -> str:
    """The page of `/metrics`, with the counts of what was `refused`, by limit."""
    return "\n".join([*lines(fleet, refused), ""])


def lines(fleet: Fleet, refused: Mapping[str, int]) -> Iterator[str]:
    """The lines of the page."""
    yield from family(
        "beyond_limit_total", "counter", "Requests and connections beyond a limit, by its flag.", refused, "limit"
    )
    for name, text in COUNTERS:
        yield from family(f"{name}_total", "counter", text, {m.name: m.counts[name] for m in fleet.members.values()})
    yield from family(
        "in_flight", "gauge", "Requests that are being answered.", {m.name: m.in_flight for m in fleet.members.values()}
    )
    yield from family(
        "up", "gauge", "Whether it is sent requests.", {m.name: int(is_up(m)) for m in fleet.members.values()}
    )
    held = {name: len(each) for name, each in fleet.balance.holdings.items()}
    yield from family("blocks", "gauge", "Blocks of text that it is believed to hold.", held)


def family(name: str, kind: str, text: str, values: Mapping[str, int], label: str = "upstream") -> Iterator[str]:
    """A metric, and its value for each upstream, or each value of another label."""
    yield f"# HELP {PREFIX}{name} {text}"
    yield f"# TYPE {PREFIX}{name} {kind}"
    for upstream, value in values.items():
        yield f'{PREFIX}{name}{{{label}="{upstream}"}} {value}'


def is_up(member: Member) -> bool:
    """Whether an upstream is sent requests."""
    return member.health.state != "out"


def health_of(fleet: Fleet) -> tuple[int, dict[str, Any]]:
    """The status and the body of `/health`: 200 while an upstream is up."""
    now = asyncio.get_running_loop().time()
    states = {name: member.health.state_at(now) for name, member in fleet.members.items()}
    alive = any(map(is_up, fleet.members.values()))
    return 200 if alive else 503, {"status": "ok" if alive else "out", "upstreams": states}
