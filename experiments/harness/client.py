"""A client that measures an endpoint of the Messages API: TTFT, usage, counts and metrics.

TTFT runs from the last byte of the request to the first `content_block_delta` (README, Glossary).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families


class NoText(RuntimeError):
    """The answer has no text, so no first token to time: the model ended its turn at once."""


@dataclass(frozen=True)
class Timing:
    """One measured request."""

    ttft_ms: float
    total_ms: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    text: str
    usage: dict[str, Any] = field(default_factory=dict)  # as the endpoint reported it


def timed_events(
    client: httpx.Client, url: str, body: dict[str, Any], headers: dict[str, str] | None = None
) -> Iterator[tuple[float, dict[str, Any]]]:
    """POST a body and yield the answer's server-sent events, each with the ms since the request's last byte.

    Raises RuntimeError if the answer is an error.
    """
    payload = json.dumps(body).encode()
    sent = 0.0

    def content() -> Iterator[bytes]:
        nonlocal sent
        yield payload
        sent = time.perf_counter()

    sizes = {"content-length": str(len(payload)), "content-type": "application/json"}
    with client.stream("POST", url, content=content(), headers=sizes | (headers or {})) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {response.read().decode()[:500]}")
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield (time.perf_counter() - sent) * 1e3, json.loads(line[6:])


def measure(client: httpx.Client, url: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> Timing:
    """Send one streaming request to a Messages endpoint and time it.

    Raises RuntimeError if the answer is an error, NoText if it has no `content_block_delta` to time.
    """
    first, usage, parts, at = None, {}, [], 0.0
    for at, event in timed_events(client, f"{url}/v1/messages", body | {"stream": True}, headers):
        if event["type"] == "content_block_delta":
            first = first or at
            parts.append(event["delta"].get("text", ""))
        elif event["type"] == "message_start":
            usage = event["message"]["usage"]
        elif event["type"] == "message_delta":
            usage = usage | event["usage"]
        elif event["type"] == "error":
            raise RuntimeError(event["error"]["message"])
    if first is None:
        raise NoText("the answer has no text: the model ended its turn at once")
    prompt, cached = prompt_counts(usage)
    return Timing(
        ttft_ms=first,
        total_ms=at,
        prompt_tokens=prompt,
        cached_tokens=cached,
        output_tokens=usage.get("output_tokens", 0),
        text="".join(parts),
        usage=usage,
    )


def prompt_counts(usage: Mapping[str, Any]) -> tuple[int, int]:
    """The prompt's tokens and cached tokens by a Messages endpoint's usage, in which fields may be missing."""
    written, read = (usage.get(f"cache_{kind}_input_tokens") or 0 for kind in ("creation", "read"))
    return (usage.get("input_tokens") or 0) + written + read, read


def count_tokens(client: httpx.Client, url: str, body: dict[str, Any]) -> int:
    """The server's count of a request's prompt."""
    response = client.post(f"{url}/v1/messages/count_tokens", json=body)
    if response.status_code != 200:
        raise RuntimeError(f"{response.status_code}: {response.text[:500]}")
    return int(response.json()["input_tokens"])


def scrape(client: httpx.Client, url: str = "") -> dict[str, float]:
    """All samples of a server's metrics page: see `samples_of`."""
    return samples_of(client.get(f"{url}/metrics").text)


def samples_of(page: str) -> dict[str, float]:
    """All samples of a Prometheus page, keyed like `tokenzero_pages{state="in_use"}`."""
    samples = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            samples[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return samples
