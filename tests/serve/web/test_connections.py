"""Connections that send too much, too slowly or nothing are refused by name, and none of the others notices."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve.web import connection as connection_module
from serve.web.connection import limited
from serve.web.connections import Connections
from serve.web.limit_flags import ConnectionFlags
from tests.helpers.http import eventually

LIMITS = ConnectionFlags(
    max_connections=12,
    max_connections_per_address=10,
    max_header_line_bytes=256,
    max_header_bytes=1024,
    header_seconds=60,
    body_seconds=60,
    stall_seconds=60,
)
IMPATIENT = replace(LIMITS, header_seconds=0.3, body_seconds=0.3, stall_seconds=0.3)
HEAD = b"POST /v1/messages HTTP/1.1\r\nHost: x\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n"
LONG = b"X-A: " + b"a" * 300 + b"\r\n"
LONG_PATH = b"a" * 300 + b" HTTP/1.1\r\n"


class Running:
    """A small application on a real port, and what became of its requests."""

    def __init__(self) -> None:
        self.refused: Counter[str] = Counter()
        self.connections: Connections[Any] = Connections(LIMITS, lambda limit: self.refused.update([limit]))
        self.left = threading.Event()  # a client has gone before its answer
        self.port = 0

    async def answer(self, request: Request) -> Response:
        """The number of bytes of the body, at once or after a while."""
        if "unread" in request.query_params:
            return JSONResponse({})
        try:
            body = await request.body()
        except ClientDisconnect:
            self.left.set()
            return Response(status_code=499)
        if "late" in request.query_params:
            waiting = asyncio.create_task(asyncio.sleep(float(request.query_params["late"])))
            gone = asyncio.ensure_future(request.receive())
            await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                self.left.set()
            waiting.cancel()
            gone.cancel()
        if "silent" in request.query_params:
            return StreamingResponse(self.one_piece())
        if "long" in request.query_params:
            return StreamingResponse(self.pieces())
        named = {"headers": [*request.headers]} if "headers" in request.query_params else {}
        return JSONResponse({"read": len(body)} | named)

    async def one_piece(self) -> Any:
        """The beginning of an answer, of which nothing else comes."""
        try:
            yield b"x"
            await asyncio.sleep(30)
        finally:
            self.left.set()

    async def pieces(self) -> Any:
        """Far more than a client's buffers hold."""
        try:
            for _ in range(400):
                yield b"x" * 2**18
        finally:
            self.left.set()

    def connect(self) -> socket.socket:
        """A connection of our own."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)


@pytest.fixture
def running(app: Running) -> Iterator[Running]:
    """The application, whose connections have all ended after the test."""
    app.refused.clear()
    app.left.clear()
    app.connections.limits = LIMITS
    yield app
    eventually(lambda: not app.connections.count, "every connection is given back")
    assert not app.connections.addresses
    assert not app.connections.waiting


@pytest.fixture
def impatient(running: Running) -> Running:
    """The same with short times, for what takes longer."""
    running.connections.limits = IMPATIENT
    return running


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    """What changes the module for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def app(patch: pytest.MonkeyPatch) -> Iterator[Running]:
    """The application in a thread."""
    patch.setattr(connection_module, "PROBE_AFTER_SECONDS", 0.05)
    patch.setattr(connection_module, "LINGER_SECONDS", 60.0)
    running = Running()
    routes = Starlette(routes=[Route("/{path:path}", running.answer, methods=["GET", "POST"])])
    config = uvicorn.Config(
        routes, port=0, log_level="warning", timeout_keep_alive=1, http=limited(running.connections), lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: server.started, "the server listens")
        running.port = server.servers[0].sockets[0].getsockname()[1]
        yield running
    finally:
        server.should_exit = True
        thread.join(20)


def read_all(connection: socket.socket) -> bytes:
    """What the server sends until it closes."""
    read = b""
    while piece := connection.recv(2**16):
        read += piece
    return read


def exchange(running: Running, data: bytes, half_closed: bool = False) -> bytes:
    """What the server answers to bytes, until it closes."""
    with running.connect() as connection:
        connection.sendall(data)
        if half_closed:
            connection.shutdown(socket.SHUT_WR)
        return read_all(connection)


def error_in(answer: bytes) -> tuple[int, Any]:
    """The status and the error of an answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize(
    ("sent", "status", "limit", "text"),
    [
        (
            HEAD + LONG + b"X-B: b\r\n",
            431,
            "max_header_line_bytes",
            "header X-A: expected at most 256 bytes",
        ),
        (
            b"GET /" + LONG_PATH,
            414,
            "max_header_line_bytes",
            "the path: expected at most 256 bytes",
        ),
        (HEAD + b"X-A: " + b"a" * 2000, 431, "max_header_bytes", "headers: expected at most 1024 bytes, got more"),
        (HEAD + b"a:b\r\n" * 400, 431, "max_header_bytes", "headers: expected at most 1024 bytes, got more"),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400, "http", "the request is not HTTP/1.1"),
        (b"GET http://x:99999999/ HTTP/1.1\r\nHost: x\r\n\r\n", 400, "http", "the request is not HTTP/1.1"),
        (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", 400, "http", "expected a request to this server"),
        (CHUNKED + b"0\r\nX-A: " + b"a" * 2000, 431, "max_header_bytes", "trailers: expected at most 1024 bytes"),
        (CHUNKED + b"2;" + b"a" * 2000, 431, "max_header_bytes", "chunk extensions and trailers: expected at most"),
    ],
)
def test_what_is_too_long_is_refused_by_its_flag(
    running: Running, sent: bytes, status: int, limit: str, text: str
) -> None:
    found, body = error_in(exchange(running, sent))
    assert (found, body["type"]) == (status, "error")
    assert text in body["error"]["message"]
    assert limit == "http" or f"--{limit.replace('_', '-')}" in body["error"]["message"]
    assert running.refused == {limit: 1}


@pytest.mark.parametrize(
    ("sent", "limit", "text"),
    [
        (b"X-A: a", "header_seconds", "headers: expected all within 0.3 s, got a part"),
        (b"Content-Length: 9\r\n\r\n1", "body_seconds", "body: expected all within 0.3 s, got a part"),
    ],
)
def test_what_is_too_slow_is_refused_by_its_flag(impatient: Running, sent: bytes, limit: str, text: str) -> None:
    status, body = error_in(exchange(impatient, HEAD + sent))
    assert (status, body["type"]) == (408, "error")
    assert body["error"]["message"].startswith(text)
    assert f"--{limit.replace('_', '-')}" in body["error"]["message"]
    assert impatient.refused == {limit: 1}


def test_a_client_that_goes_on_sending_after_its_refusal_is_cut_off(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(HEAD + b"X-A: " + b"a" * 2000)
        eventually(lambda: not drip(connection, b"a" * 2**16), "it is cut off")
    assert running.refused == {"max_header_bytes": 1}


def test_a_refusal_has_the_form_of_the_api_that_was_called(running: Running) -> None:
    _, body = error_in(exchange(running, b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + b"a:b\r\n" * 400))
    assert body["error"]["type"] == "invalid_request_error"
    assert "param" in body["error"]


def test_a_client_that_drips_a_body_after_its_answer_is_closed(impatient: Running) -> None:
    with impatient.connect() as connection:
        connection.sendall(b"GET /v1/models?unread HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 200"
        eventually(lambda: not drip(connection), "it is closed")


def test_a_connection_whose_request_was_answered_before_it_was_read_is_closed_as_any_other(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(b"GET /v1/models?unread HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n1")
        assert connection.recv(12) == b"HTTP/1.1 200"
        connection.sendall(b"2")
        assert read_all(connection).endswith(b"{}")
    assert not running.refused


def drip(connection: socket.socket, data: bytes = b"a") -> bool:
    """Send a little more; whether the server still takes it."""
    try:
        connection.sendall(data)
    except OSError:
        return False
    return True


def test_a_connection_that_sends_nothing_is_closed(impatient: Running) -> None:
    with impatient.connect() as connection:
        assert read_all(connection) == b""
    assert not impatient.refused


def test_connections_without_a_request_make_place_for_new_ones(running: Running) -> None:
    with ExitStack() as opened:
        idle = [opened.enter_context(running.connect()) for _ in range(10)]
        eventually(lambda: running.connections.count == 10, "all are open")
        for _ in range(20):
            assert exchange(running, HEAD + b"Connection: close\r\nContent-Length: 2\r\n\r\nhi").endswith(b'{"read":2}')
        assert idle[0].recv(1) == b""
    assert set(running.refused) == {"max_connections_per_address"}


def test_one_connection_more_than_an_address_may_have_is_told_so(running: Running) -> None:
    with ExitStack() as opened:
        for _ in range(10):
            busy = opened.enter_context(running.connect())
            busy.sendall(b"POST /v1/messages?late=20 HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi")
        eventually(lambda: not running.connections.waiting, "all wait for their answers")
        status, body = error_in(exchange(running, HEAD + b"Content-Length: 2\r\n\r\nhi"))
        assert (status, body["error"]["type"]) == (429, "rate_limit_error")
        assert body["error"]["message"].startswith("connections: 127.0.0.1 has 10, at most 10 may be open")
    assert running.refused == {"max_connections_per_address": 1}


@pytest.mark.parametrize("query", [b"", b"?late=0.3"])
def test_a_client_that_closes_its_sending_side_gets_its_answer(running: Running, query: bytes) -> None:
    request = b"POST /v1/messages%b HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi" % query
    answer = exchange(running, request, half_closed=True)
    assert b"HTTP/1.1 200 OK\r\n" in answer
    assert answer.endswith(b'{"read":2}')
    assert answer.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"").startswith(b"HTTP/1.1 200 OK")
    assert not running.left.is_set()


def test_a_client_that_is_gone_is_noticed_before_its_answer(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(b"POST /v1/messages?late=20 HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi")
    assert running.left.wait(10)


def test_a_client_that_is_gone_is_noticed_after_the_beginning_of_its_answer(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(b"GET /v1/messages?silent HTTP/1.1\r\nHost: x\r\n\r\n")
        while not connection.recv(2**12).endswith(b"x\r\n"):
            pass
    assert running.left.wait(10)


def test_a_client_that_does_not_read_its_answer_is_given_up(impatient: Running) -> None:
    with impatient.connect() as connection:
        connection.sendall(b"GET /v1/messages?long HTTP/1.1\r\nHost: x\r\n\r\n")
        assert impatient.left.wait(10)
    assert impatient.refused == {"stall_seconds": 1}


def test_a_request_right_behind_another_is_answered_after_it(running: Running) -> None:
    one = HEAD + b"Content-Length: 2\r\n\r\nhi"
    last = HEAD + b"Connection: close\r\nContent-Length: 2\r\n\r\nhi"
    assert exchange(running, one * 20 + last).count(b'{"read":2}') == 21


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
@pytest.mark.parametrize(
    "rest", [b"Content-Length: 2\r\n\r\nhi", b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"]
)
def test_a_request_that_wishes_for_another_protocol_is_answered_with_its_body(
    running: Running, protocol: bytes, rest: bytes
) -> None:
    wishing = HEAD + b"Connection: Upgrade\r\nUpgrade: %b\r\n" % protocol + rest
    last = HEAD + b"Connection: close\r\nContent-Length: 3\r\n\r\nlow"
    answers = exchange(running, wishing * 20 + last)
    assert (answers.count(b'{"read":2}'), answers.count(b'{"read":3}')) == (20, 1)
    with running.connect() as connection:
        head, _, body = wishing.partition(b"\r\n\r\n")
        for piece in (head, b"\r\n\r\n", body, last):
            connection.sendall(piece)
        answers = read_all(connection)
    assert (answers.count(b'{"read":2}'), answers.count(b'{"read":3}')) == (1, 1)
    assert not running.refused


def test_what_follows_a_body_is_no_header(running: Running) -> None:
    request = CHUNKED.replace(b"messages", b"messages?headers") + b"0\r\nX-API-Key: k\r\n\r\n"
    last = HEAD + b"Connection: close\r\nContent-Length: 3\r\n\r\nlow"
    answers = exchange(running, request + last)
    assert b'{"read":2,"headers":["host","transfer-encoding"]}' in answers
    assert answers.endswith(b'{"read":3}')


def test_a_long_body_of_small_chunks_is_read_whole(running: Running) -> None:
    request = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1;a=b\r\nx\r\n" * 20_000
    assert exchange(running, request + b"0\r\n\r\n").endswith(b'{"read":20000}')


def test_a_connection_that_waits_for_a_second_answer_is_not_closed_for_a_new_one(running: Running) -> None:
    with running.connect() as connection:
        second = b"POST /v1/messages?late=20 HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi"
        connection.sendall(HEAD + b"Content-Length: 2\r\n\r\nhi" + second)
        assert connection.recv(12) == b"HTTP/1.1 200"
        assert not running.connections.waiting


def test_a_usual_client_keeps_its_connection(running: Running) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{running.port}") as client:
        for _ in range(30):
            assert client.post("/v1/messages", content=b"x" * 3000).json() == {"read": 3000}
            assert running.connections.count == 1
    assert not running.refused
