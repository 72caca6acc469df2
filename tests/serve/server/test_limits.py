"""Requests beyond a limit are refused by its name, and what is in flight is given back."""

from __future__ import annotations

import json
import re
import socket
from typing import Any

import httpx
import pytest

from experiments.harness.client import scrape
from experiments.harness.server import Server
from serve.api.messages import InvalidRequest, decode_request
from serve.api.openai import read_chat, read_responses
from serve.limits.exceeded import LimitExceeded
from serve.server.limits import InFlight, decodable, refuse_too_many
from serve.web.limit_flags import LimitFlags
from tests.helpers.http import ask, error_of, post, text_of

LIMITS = LimitFlags(
    max_json_depth=8,
    max_tools=2,
    max_messages=2,
    max_blocks=2,
    max_stop_sequences=2,
    max_requests=2,
    max_bodies_bytes=100,
    max_tokens_in_flight=100,
)
TOOL = {"name": "t", "input_schema": {}}
FUNCTION = {"type": "function", "function": {"name": "t"}}
TEXT = {"type": "text", "text": "a"}
USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("more", "limit", "text"),
    [
        ({"tools": [TOOL] * 3}, "max_tools", "tools: expected at most 2 tools, got 3"),
        ({"messages": [USER] * 3}, "max_messages", "messages: expected at most 2 messages, got 3"),
        ({"messages": [USER | {"content": [TEXT] * 3}]}, "max_blocks", "messages: expected at most 2 content blocks"),
        ({"stop_sequences": ["a", "b", "c"]}, "max_stop_sequences", "stop_sequences: expected at most 2 stop"),
    ],
)
def test_a_request_of_too_many_parts_is_refused_by_the_flag(more: dict[str, Any], limit: str, text: str) -> None:
    request = decode_request(json.dumps(ask("a") | more).encode())
    with pytest.raises(InvalidRequest, match=re.escape(text)) as refused:
        refuse_too_many(request, LIMITS)
    assert refused.value.limit == limit
    assert f"--{limit.replace('_', '-')}" in str(refused.value)
    refuse_too_many(request, LimitFlags())


def test_the_limits_hold_for_requests_of_all_apis() -> None:
    chat, _ = read_chat(json.dumps({"messages": [USER], "tools": [FUNCTION] * 3}).encode())
    responses, _ = read_responses(json.dumps({"input": [USER, {"role": "assistant", "content": "b"}, USER]}).encode())
    for request, limit in ((chat, "max_tools"), (responses, "max_messages")):
        with pytest.raises(InvalidRequest) as refused:
            refuse_too_many(request, LIMITS)
        assert refused.value.limit == limit


def test_more_stop_sequences_than_there_may_ever_be_are_counted_by_the_same_flag() -> None:
    for read, field in ((decode_request, "stop_sequences"), (read_chat, "stop")):
        with pytest.raises(InvalidRequest, match=f"{field}: expected array of length <= 64, got 65") as refused:
            read(json.dumps(ask("a") | {field: ["a"] * 65}).encode())
        assert refused.value.limit == "max_stop_sequences"


def test_a_body_that_nests_too_deeply_is_not_decoded() -> None:
    for deep in (b"[" * 9 + b"]" * 9, b'{"a":' * 9, b'{"[\\"[": [' * 5):
        with pytest.raises(
            InvalidRequest, match="body: expected at most 8 brackets within each other, got "
        ) as refused:
            decodable(deep, LIMITS)
        assert refused.value.limit == "max_json_depth"
    for body in (b"[" * 8 + b"]" * 8, b"[]" * 100, b'"' + b"[" * 100 + b'"', b'["\\\\"' + b',"[[[\\""' * 9 + b"]"):
        assert decodable(body, LIMITS) is body


@pytest.mark.parametrize("field", ["tools", "messages"])
def test_a_body_of_far_too_many_parts_is_not_decoded(field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{field}: expected at most 2 {field}, got 3") as refused:
        decodable(json.dumps({field: [{}] * 3}).encode(), LIMITS)  # of which no decoder could read one
    assert refused.value.limit == f"max_{field}"
    for body in (json.dumps({field: [{}] * 2, "other": [{}] * 9}), json.dumps({field: {"a": [{}] * 9}}), "[{}, {}, {}"):
        assert decodable(body.encode(), LIMITS) == body.encode()


def test_what_is_in_flight_has_a_limit_and_is_given_back() -> None:
    all = InFlight(LIMITS)
    first, second = all.admit(), all.admit()
    with pytest.raises(LimitExceeded, match="requests: 2 in flight and 1 more, at most 2 may be: try again") as refused:
        all.admit()
    assert (refused.value.limit, refused.value.status, refused.value.headers) == (
        "max_requests",
        529,
        {"retry-after": "1"},
    )
    first.take_body(60)
    with pytest.raises(LimitExceeded, match="bytes of bodies: 60 in flight and 41 more, at most 100 may be"):
        second.take_body(41)
    second.take(70)
    with pytest.raises(LimitExceeded, match="tokens: 70 in flight and 31 more, at most 100 may be"):
        first.take(31)
    with pytest.raises(InvalidRequest, match="expected at most 100 tokens of prompt and max_tokens, got 101"):
        first.take(101)
    first.end()
    second.end()
    assert (all.requests, all.body_bytes, all.tokens) == (0, 0, 0)


def refused_by(client: httpx.Client, limit: str) -> float:
    """How many requests the server has refused by a limit."""
    return scrape(client).get(f'tokenzero_refused_requests_total{{limit="{limit}"}}', 0.0)


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_a_refusal_names_its_flag_and_is_counted(client: httpx.Client, path: str) -> None:
    before = refused_by(client, "max_json_depth")
    body = json.dumps(ask("a", metadata="HERE")).replace('"HERE"', "[" * 600 + "]" * 600)
    text = error_of(client.post(path, content=body), 400, "invalid_request_error")
    assert text == (
        "body: expected at most 512 brackets within each other, got 601: flatten it, or raise --max-json-depth"
    )
    assert refused_by(client, "max_json_depth") == before + 1


def test_a_refusal_of_headers_is_counted_by_the_server(server: Server, client: httpx.Client) -> None:
    before = refused_by(client, "max_header_bytes")
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX-Big: " + b"a" * 2**17)
        assert connection.recv(12) == b"HTTP/1.1 431"
    assert refused_by(client, "max_header_bytes") == before + 1
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_closes_its_sending_side_reads_its_whole_answer(
    server: Server, client: httpx.Client, stream: bool
) -> None:
    body = ask("a client that sends no more", 40, temperature=0)
    expected = text_of(post(client, body))
    payload = json.dumps(body | {"stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=60) as connection:
        head = b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(payload)
        connection.sendall(head + payload)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(2**16):
            answer += piece
    answer = answer.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    assert answer.startswith(b"HTTP/1.1 200")
    if stream:
        deltas = re.findall(rb'^data: (.*"text_delta".*)$', answer, re.MULTILINE)
        assert "".join(json.loads(delta)["delta"]["text"] for delta in deltas) == expected
        assert b"message_stop" in answer
    else:
        assert text_of(json.loads(answer.partition(b"\r\n\r\n")[2])) == expected
