"""A proxy that is told to stop: answers under way go on for a while, then they end in the form of their API."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from experiments.harness.server import free_port
from serve.proxy.relay import error_event
from tests.helpers.http import ask, eventually
from tests.serve.proxy.test_proxy import EVENTS, Script, chunk, engine

PING = b'event: ping\ndata: {"type":"ping"}\n\n'
DELTA = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0}\n\n'
LAST = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
HALF = b"event: content_block_delta\ndata: {"


@contextmanager
def stopping_proxy(engines: list[str], *flags: str) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    """A proxy process before engines, and a client of it."""
    port = free_port()
    named = [each for url in engines for each in ("--upstream", url)]
    process = subprocess.Popen([sys.executable, "-m", "serve", "proxy", *named, "--port", str(port), *flags])
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            eventually(lambda: is_open(client), "the port is open")
            yield client, process
    finally:
        process.kill()
        process.wait()


def is_open(client: httpx.Client) -> bool:
    try:
        return client.get("/v1/requests").is_success
    except httpx.TransportError:
        return False


def waiting(arrived: threading.Semaphore, go_on: threading.Event) -> Script:
    """An engine that begins each stream, and ends it when it is told to; whole answers it only promises."""

    def script(connection, head: bytes, body: bytes) -> None:
        if b'"stream":true' not in body.replace(b" ", b""):
            arrived.release()
            go_on.wait(30)
            return
        connection.sendall(EVENTS + chunk(PING + DELTA) + chunk(HALF))
        arrived.release()
        if go_on.wait(30):
            connection.sendall(chunk(b"}\n\n" + LAST) + b"0\r\n\r\n")

    return script


def asked(client: httpx.Client, path: str, stream: bool, pool: ThreadPoolExecutor) -> Future[httpx.Response]:
    return pool.submit(client.post, path, json=ask("Hello", stream=stream))


@pytest.mark.parametrize("several", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_takes_too_long_ends_in_its_apis_form_and_what_is_new_is_refused(several: bool) -> None:
    arrived, go_on = threading.Semaphore(0), threading.Event()
    with engine(waiting(arrived, go_on)) as one, engine(waiting(arrived, go_on)) as other:
        with (
            stopping_proxy([one, other] if several else [one], "--shutdown-timeout", "1") as (client, process),
            ThreadPoolExecutor(4) as pool,
        ):
            paths = ("/v1/messages", "/v1/chat/completions")
            streamed = [asked(client, path, True, pool) for path in paths]
            whole = [asked(client, path, False, pool) for path in paths]
            for _ in range(4):
                assert arrived.acquire(timeout=20)
            process.send_signal(signal.SIGTERM)
            eventually(lambda: client.get("/ready").status_code == 503, "it is not ready any more")
            refused = client.post("/v1/messages", json=ask("Late"))
            assert process.wait(20) == 0
            text = "the server is stopping: send the request again, to another one or later"
            for path, future in zip(paths, streamed, strict=True):
                events = future.result().content
                assert DELTA in events
                assert events.endswith(error_event(path, text, b"", 529))
                assert HALF not in events.replace(DELTA, b"")
            assert [future.result().status_code for future in whole] == [529, 503]
        go_on.set()
    assert b"overloaded_error" in streamed[0].result().content
    assert (refused.status_code, refused.json()["error"]["type"]) == (529, "overloaded_error")
    assert refused.headers["retry-after"] == "5"


@contextmanager
def stopped_in_mid_stream() -> Iterator[tuple[Future[httpx.Response], subprocess.Popen[bytes], threading.Event]]:
    """A stream that has begun, the proxy that was told to stop meanwhile, and the event that lets the engine go on."""
    arrived, go_on = threading.Semaphore(0), threading.Event()
    with (
        engine(waiting(arrived, go_on)) as url,
        stopping_proxy([url]) as (client, process),
        ThreadPoolExecutor(1) as pool,
    ):
        streamed = asked(client, "/v1/messages", True, pool)
        assert arrived.acquire(timeout=20)
        process.send_signal(signal.SIGTERM)
        eventually(lambda: client.get("/ready").status_code == 503, "it is not ready any more")
        yield streamed, process, go_on


def test_an_answer_under_way_comes_to_its_end() -> None:
    with stopped_in_mid_stream() as (streamed, process, go_on):
        go_on.set()
        assert streamed.result().content.endswith(LAST)
        assert process.wait(20) == 0


@pytest.mark.slow
def test_the_second_interrupt_ends_it_at_once() -> None:
    with stopped_in_mid_stream() as (streamed, process, go_on):
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130
        with pytest.raises(httpx.TransportError):
            streamed.result()
        go_on.set()
