"""The server's records of the requests of a session, and what each read of the prompt before."""

from __future__ import annotations

from typing import Any

import httpx
from rich.table import Table

from experiments.harness.server import Server

Json = dict[str, Any]


def requests_of(server: Server) -> list[Json]:
    """The server's records of its latest requests, the newest first."""
    return list(httpx.get(f"{server.url}/v1/requests", timeout=30).json()["data"])


def table(title: str, records: list[Json]) -> Table:
    """What each request read."""
    shown = Table("request", "prompt tokens", "read", "of the prompt before", title=title)
    for i, (before, record) in enumerate(zip([None, *records], records, strict=False), 1):
        share = f"{record['reused_tokens'] / before['prompt_tokens']:.2%}" if before else ""
        shown.add_row(str(i), f"{record['prompt_tokens']:,}", f"{record['reused_tokens']:,}", share)
    return shown
