"""What the measuring client makes of a stream, against a scripted server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from experiments.harness.client import Timing, count_tokens, measure

Json = dict[str, Any]
USAGE = {"input_tokens": 1, "cache_creation_input_tokens": 20, "cache_read_input_tokens": 300, "output_tokens": 0}
START = {"type": "message_start", "message": {"usage": USAGE}}
BLOCK = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
END = {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 7}}


def delta(text: str) -> Json:
    return {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}


@contextmanager
def scripted(answer: Callable[[BaseHTTPRequestHandler, Json], None]) -> Iterator[str]:
    """A server that answers every POST by a function of the connection and the body."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            answer(self, json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def measured(*script: Json | float, body: Json | None = None, seen: list[Json] | None = None) -> Timing:
    """What `measure` returns when the server sends these events, with pauses of these seconds between them."""

    def answer(connection: BaseHTTPRequestHandler, got: Json) -> None:
        if seen is not None:
            seen.append(got)
        connection.send_response(200)
        connection.end_headers()
        for item in script:
            if isinstance(item, float):
                time.sleep(item)
            else:
                connection.wfile.write(f"event: {item['type']}\ndata: {json.dumps(item)}\n\n".encode())
                connection.wfile.flush()

    with scripted(answer) as url, httpx.Client() as client:
        return measure(client, url, body or {})


def test_ttft_ends_at_the_first_delta_and_not_at_an_early_start() -> None:
    timing = measured(START, BLOCK, 0.1, delta("a"), 0.5, delta("b"), END)
    assert timing.ttft_ms >= 100
    assert timing.total_ms - timing.ttft_ms > 250


def test_the_counts_are_those_of_the_usage() -> None:
    timing = measured(START, BLOCK, delta("a"), delta("b"), END)
    assert (timing.prompt_tokens, timing.cached_tokens, timing.output_tokens) == (321, 300, 7)
    assert timing.text == "ab"


def test_the_request_is_streamed_whatever_the_body_says() -> None:
    seen: list[Json] = []
    measured(START, delta("a"), END, body={"model": "m", "stream": False}, seen=seen)
    assert seen == [{"model": "m", "stream": True}]


def test_an_error_in_the_stream_is_raised() -> None:
    with pytest.raises(RuntimeError, match="it broke"):
        measured(START, {"type": "error", "error": {"type": "api_error", "message": "it broke"}})


def test_an_answer_without_text_is_raised() -> None:
    with pytest.raises(RuntimeError, match="no text"):
        measured(START, BLOCK, END)


def test_a_refusal_is_raised_with_its_status() -> None:
    def refuse(connection: BaseHTTPRequestHandler, got: Json) -> None:
        connection.send_response(400)
        connection.end_headers()
        connection.wfile.write(b"no such field")

    with scripted(refuse) as url, httpx.Client() as client:
        with pytest.raises(RuntimeError, match="400: no such field"):
            measure(client, url, {})
        with pytest.raises(RuntimeError, match="400: no such field"):
            count_tokens(client, url, {})
