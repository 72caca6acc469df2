"""The line that each request leaves in the log, and the ids by which it is found again."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from experiments.harness.server import Server
from serve.server.request_log import id_in
from tests.helpers.http import ask, error_of, eventually, open_request, post, stream


def line_of(log: Path, id: str) -> str:
    """The only line of the log with an id, which is written after the answer."""
    eventually(lambda: f"{id} " in log.read_text(), "the request is logged")
    (line,) = [line for line in log.read_text().splitlines() if f"{id} " in line]
    return line


def test_an_answers_line_has_its_tokens_times_and_cause(client: httpx.Client, server_log: Path) -> None:
    body = ask("Which line is mine? " * 20, 5)
    first, second = post(client, body), stream(client, body, **{"x-request-id": "mine-0001"})
    usage = second.one("message_start")["message"]["usage"]
    line = line_of(server_log, "mine-0001")
    assert re.search(r"tokenzero\.requests POST /v1/messages status=200 request_id=mine-0001 id=msg_\w+ ", line)
    read = usage["cache_read_input_tokens"]
    assert f" state=done read={read} computed=1 generated=5 ttft_ms=" in line
    assert read > 0
    assert re.search(r" ms=[\d.]+$", line)
    # Which cause it is depends on what the server was asked before.
    assert re.search(r" cause=[a-z_]+ ", line_of(server_log, first["id"]))


def test_the_callers_id_is_kept_and_found_again(client: httpx.Client, server_log: Path) -> None:
    named = {"x-request-id": "call-7f/3:a"}
    answered = client.post("/v1/messages", json=ask("Name"), headers=named)
    assert answered.headers["x-request-id"] == "call-7f/3:a"
    assert answered.headers["request-id"].startswith("req_")
    listed = client.get("/v1/requests").json()["data"]
    assert [each["request_id"] for each in listed if each["id"] == answered.json()["id"]] == ["call-7f/3:a"]
    refused = client.post("/v1/messages", content=b"{", headers={"x-request-id": "call-8"})
    assert refused.json()["request_id"] == "call-8"
    assert "POST /v1/messages status=400 request_id=call-8" in line_of(server_log, "call-8")
    assert error_of(client.post("/v1/messages", content=b"{"), 400, "invalid_request_error")


@pytest.mark.parametrize("given", [b"", b"two words", b"x" * 129, b"caf\xc3\xa9", b"a\tb"])
def test_an_id_that_is_no_short_word_is_not_kept(given: bytes) -> None:
    assert id_in({b"x-request-id": given}) is None


def test_no_words_of_a_client_reach_the_log_or_begin_a_line(
    client: httpx.Client, server: Server, server_log: Path
) -> None:
    before = len(server_log.read_text())
    post(client, ask("zanzibarzanzibar " * 30, system="quetzalquetzal"))
    for path in ("/v1/none%0A2026-01-01 zanzibarzanzibar", "/v1/models/zanzibarzanzibar%0A"):
        client.post(path, json={"zanzibarzanzibar": 1})
        client.get(path)
    client.post("/v1/messages", json={"model": "m", "max_tokens": "zanzibarzanzibar\n2026", "messages": []})
    client.post("/v1/messages", json=ask("x", system=5, stop_sequences=["quetzalquetzal\n2026"]))
    open_request(server.url, {"zanzibarzanzibar": 1}, **{"x-request-id": "zanzibarzanzibar zanzibar"}).close()
    post(client, ask("the last one"), **{"x-request-id": "last-0001"})
    line_of(server_log, "last-0001")
    added = server_log.read_text()[before:]
    assert added.count("\n") >= 7
    assert not re.search("zanzibar|quetzal", added)
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \S+ ", line) for line in added.splitlines())


def test_reads_leave_no_line_unless_they_fail(client: httpx.Client, server_log: Path) -> None:
    before = len(server_log.read_text())
    for path in ("/health", "/ready", "/metrics", "/v1/requests", "/nowhere"):
        client.get(path, headers={"x-request-id": "read-0001"})
    line_of(server_log, "read-0001")
    lines = server_log.read_text()[before:].splitlines()
    assert [re.sub(r".* (GET \S+ status=\d+) .*", r"\1", line) for line in lines] == ["GET other status=404"]
