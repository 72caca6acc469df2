"""Requests that the tests send to a server, and readers of its answers."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import httpx

from experiments.harness.client import scrape
from experiments.workloads.demo_model import TINY

Json = dict[str, Any]

# Its end-of-turn token is a little less likely than the demo model's: some greedy answers end soon, some never.
MODEL = replace(TINY, positions=16_384, end_scale=1.25)
CONTEXT = 12_288
BODY_LIMIT = 256 * 1024
# Few compiled shapes, so that the server starts soon; small chunks, so that a long prompt takes a while.
FLAGS = (
    *("--max-model-len", str(CONTEXT), "--kv-pool-bytes", "16MiB", "--page-size", "16"),
    *("--max-num-seqs", "4", "--max-prefill-tokens", "32", "--max-body-bytes", str(BODY_LIMIT)),
)
BILLING = "x-anthropic-billing-header: cc_version=2.1.179.471; cc_entrypoint=sdk-cli; cch={:05x};"


def encoded(body: object) -> bytes:
    """A request's body."""
    return json.dumps(body).encode()


def ask(text: str, max_tokens: int = 8, **more: Any) -> Json:
    """A greedy request of one user message."""
    message = {"role": "user", "content": text}
    return {"model": "any", "max_tokens": max_tokens, "temperature": 0, "messages": [message]} | more


def ask_for_long(text: str) -> Json:
    """A request whose answer cannot end before its thousands of tokens: a long array, by its schema."""
    schema = {"type": "array", "items": {"enum": [0, 1]}, "minItems": 10_000}
    return ask(text, 12_000, output_config={"format": {"type": "json_schema", "schema": schema}})


def text_block(text: str) -> Json:
    """A block of text."""
    return {"type": "text", "text": text}


def long(number: int, tokens: int = 11_000) -> str:
    """Text of `tokens` tokens, one a digit; texts of different numbers below 100 share at most one digit."""
    return f"{number:02}" + "7" * (tokens - 2)


def post(client: httpx.Client, body: Json, **headers: str) -> Json:
    """The answer to a request that succeeds."""
    response = client.post("/v1/messages", json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


def text_of(message: Json) -> str:
    """All text of an answer."""
    return "".join(block["text"] for block in message["content"])


def prompt_tokens(usage: Json) -> int:
    """The sum of the three input counts of a usage."""
    return usage["input_tokens"] + usage["cache_creation_input_tokens"] + usage["cache_read_input_tokens"]


def error_of(response: httpx.Response, status: int, kind: str) -> str:
    """The message of an error in the API's form; asserts its status and type."""
    assert response.status_code == status, response.text
    answer = response.json()
    assert answer == {"type": "error", "error": {"type": kind, "message": answer["error"]["message"]}}
    assert response.headers["request-id"].startswith("req_")
    return answer["error"]["message"]


@dataclass(frozen=True)
class Streamed:
    """A stream of server-sent events, read to its end."""

    events: list[Json]
    headers: httpx.Headers

    @property
    def kinds(self) -> list[str]:
        """The events' types, pings left out."""
        return [event["type"] for event in self.events if event["type"] != "ping"]

    @property
    def text(self) -> str:
        """All text of the deltas."""
        return "".join(e["delta"]["text"] for e in self.events if e["type"] == "content_block_delta")

    def one(self, kind: str) -> Json:
        """The only event of a type."""
        (event,) = [event for event in self.events if event["type"] == kind]
        return event


def stream(client: httpx.Client, body: Json, **headers: str) -> Streamed:
    """The answer to a streaming request that succeeds; asserts that `event:` and the data's `type` agree."""
    with client.stream("POST", "/v1/messages", json=body | {"stream": True}, headers=headers) as response:
        raw = response.read().decode()
    assert response.status_code == 200, raw
    assert raw.endswith("\n\n")
    events = []
    for part in raw.removesuffix("\n\n").split("\n\n"):
        name, data = part.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return Streamed(events, response.headers)


def is_idle(client: httpx.Client) -> bool:
    """Whether nothing runs, nothing waits and no page is in use."""
    now = scrape(client)
    return (
        now["tokenzero_num_requests_running"]
        == now["tokenzero_num_requests_waiting"]
        == now['tokenzero_pages{state="in_use"}']
        == 0
    )


def eventually(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.005)


def open_request(url: str, body: Json, *options: tuple[int, int, int], **headers: str) -> socket.socket:
    """A connection with these socket options, on which the whole request was sent and nothing was read yet."""
    payload = json.dumps(body).encode()
    lines = {"host": "localhost", "content-length": str(len(payload))} | headers
    head = "POST /v1/messages HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
    connection = socket.socket()
    connection.settimeout(60)
    for option in options:
        connection.setsockopt(*option)
    connection.connect((urlsplit(url).hostname, urlsplit(url).port))
    connection.sendall(head.encode() + payload)
    return connection


def read_until(connection: socket.socket, text: bytes, times: int = 1) -> bytes:
    """The bytes that arrive until `text` has arrived `times` times."""
    seen = b""
    while seen.count(text) < times:
        piece = connection.recv(65536)
        assert piece, f"the connection ended before {text!r}: {seen[-500:]!r}"
        seen += piece
    return seen
