"""Requests as clients send them: any path that ends in a chat route, compressed, with half a character, with a key."""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterator

import httpx
import pytest
import zstandard

from serve.proxy.chat import chat_route
from serve.proxy.cli import ProxyConfig, parser
from serve.proxy.relay import end_of_events
from serve.proxy.reports import Reports
from serve.proxy.upstream import parse_upstream
from serve.rules.normalize import DEFAULT_RULES
from serve.web.keys import only_key
from serve.web.settings import read_config
from tests.helpers.http import BILLING, Json, ask, encoded, eventually, text_block
from tests.serve.proxy.test_proxy import JSON, echo, engine, proxy_of, reply

MESSAGES = ask("Hi", system=[text_block(BILLING.format(1)), text_block("You help.")])
CHAT = {
    "model": "any",
    "messages": [{"role": "system", "content": f"{BILLING.format(1)}\nYou help."}, {"role": "user", "content": "Hi"}],
}
RESPONSES = {"model": "any", "instructions": f"{BILLING.format(1)}\nYou help.", "input": "Hi"}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
SEARCH = {"type": "web_search_20250305", "name": "web_search"}
USED = {
    "role": "assistant",
    "content": [
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "x"}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
    ],
}
LINE = b"x-anthropic-billing-header"
COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "gzip, zstd": lambda body: zstandard.ZstdCompressor().compress(gzip.compress(body)),
}


@pytest.fixture
def echoing() -> Iterator[httpx.Client]:
    """A client of a proxy, used by nobody else, before an engine that sends back what it gets."""
    with engine(echo) as url, proxy_of(url) as client:
        yield client


def headers_of(answer: httpx.Response) -> dict[str, str]:
    """The headers that the engine has got."""
    _, *lines = bytes.fromhex(answer.headers["x-head"]).decode().split("\r\n")
    return dict(line.lower().split(": ", 1) for line in lines)


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v1/messages", "/v1/messages"),
        ("/v1/messages/", "/v1/messages"),
        ("//v1/messages", "/v1/messages"),
        ("/v1/v1/messages", "/v1/messages"),
        ("/messages", "/v1/messages"),
        ("/anthropic/v1/messages", "/v1/messages"),
        ("/anthropic/messages", "/v1/messages"),
        ("/v1/v1/messages/count_tokens/", "/v1/messages/count_tokens"),
        ("/apps/anthropic/messages/count_tokens", "/v1/messages/count_tokens"),
        ("/openai/v1/chat/completions", "/v1/chat/completions"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/openai/deployments/m/chat/completions", "/v1/chat/completions"),
        ("/api/v1/responses/", "/v1/responses"),
        ("/responses", "/v1/responses"),
        ("/openai/responses/input_tokens", "/v1/responses/input_tokens"),
        ("/v1/completions", None),
        ("/v1/messages/batches", None),
        ("/v1/responses/resp_1/cancel", None),
        ("/v1/mymessages", None),
        ("/", None),
    ],
)
def test_the_route_is_the_end_of_the_path(path: str, route: str | None) -> None:
    assert chat_route(path) == route


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/v1/messages", MESSAGES),
        ("/anthropic/v1/messages/?beta=true", MESSAGES),
        ("/messages/count_tokens", MESSAGES),
        ("/openai/deployments/m/chat/completions?api-version=1", CHAT),
        ("/responses/", RESPONSES),
        ("/responses/input_tokens", RESPONSES),
    ],
)
def test_rules_hold_on_any_such_path_and_the_path_stays(path: str, body: Json, echoing: httpx.Client) -> None:
    answer = echoing.post(path, json=body)
    assert LINE not in answer.content
    assert answer.json()["model"] == "any"
    assert bytes.fromhex(answer.headers["x-head"]).startswith(f"POST {path} HTTP/1.1\r\n".encode())
    if "_tokens" not in path:
        assert echoing.get(f"/v1/requests/{answer.headers['x-tokenzero-report']}").is_success


@pytest.mark.parametrize("encoding", COMPRESSED)
def test_a_compressed_body_is_forwarded_decoded_if_a_rule_changes_it(encoding: str, echoing: httpx.Client) -> None:
    packed = COMPRESSED[encoding](encoded(MESSAGES))
    answer = echoing.post("/v1/messages", content=packed, headers={"content-encoding": encoding})
    assert answer.headers["x-tokenzero-normalized"] == "strip-preamble system[0]"
    assert answer.json() == MESSAGES | {"system": [text_block("You help.")]}
    sent = headers_of(answer)
    assert "content-encoding" not in sent
    assert sent["content-length"] == str(len(answer.content))


@pytest.mark.parametrize("encoding", COMPRESSED)
def test_a_compressed_body_that_no_rule_changes_arrives_as_it_came(encoding: str, echoing: httpx.Client) -> None:
    packed = COMPRESSED[encoding](encoded(ask("Hi")))
    answer = echoing.post("/v1/messages", content=packed, headers={"content-encoding": encoding})
    assert answer.content == packed
    assert headers_of(answer)["content-encoding"] == encoding
    assert echoing.get(f"/v1/requests/{answer.headers['x-tokenzero-report']}").is_success


@pytest.mark.parametrize(
    ("body", "encoding", "reason", "text"),
    [
        (b"\x1f\x8bno gzip", "gzip", "encoding", "expected gzip data"),
        (gzip.compress(encoded(MESSAGES))[:-20], "gzip", "encoding", "expected gzip data"),
        (b"\x1f\x9d\x90 packed", "compress", "encoding", "got 'compress'"),
        (gzip.compress(bytes(40 * 2**20)), "gzip", "too_large", "bytes after gzip"),
        (encoded(MESSAGES)[:-1], "", "malformed", "truncated"),
        (encoded(MESSAGES).replace(b"You help", b"\xed\xa0\xbd"), "", "malformed", "utf-8"),
        (encoded(MESSAGES).decode().encode("utf-16"), "", "malformed", "malformed"),
    ],
)
def test_what_no_rule_can_be_applied_to_passes_is_counted_and_logged_once(
    body: bytes, encoding: str, reason: str, text: str, echoing: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "tokenzero.proxy"):
        for _ in range(3):
            answer = echoing.post("/v1/messages", content=body, headers={"content-encoding": encoding})
            assert answer.content == body
            assert headers_of(answer).get("content-encoding", "") == encoding
            assert "x-tokenzero-report" not in answer.headers
    logged = [record.getMessage() for record in caplog.records if "no rule was applied" in record.getMessage()]
    assert len(logged) == 1
    assert text in logged[0]
    counts = echoing.get("/v1/requests").json()
    assert counts["without_rules"] == {reason: 3}
    assert counts["without_report"] == {"unread": 3}


def test_a_body_beyond_the_limit_is_counted_too(monkeypatch: pytest.MonkeyPatch, echoing: httpx.Client) -> None:
    monkeypatch.setattr("serve.proxy.forward.MAX_BODY_BYTES", 100)
    assert echoing.post("/v1/messages", content=encoded(MESSAGES)).content == encoded(MESSAGES)
    assert echoing.get("/v1/requests").json()["without_rules"] == {"too_large": 1}


def test_without_rules_nothing_is_missed() -> None:
    with engine(echo) as url, proxy_of(url, frozenset()) as client:
        client.post("/v1/messages", content=b"{")
        assert "without_rules" not in client.get("/v1/requests").json()


@pytest.mark.parametrize("half", [b"\\ud83d", b"\\uDE00 and more", b"a\\\\\\ud83d"])
@pytest.mark.parametrize("place", ["user", "system", "result"])
def test_half_a_character_stays_and_the_header_goes(half: bytes, place: str, echoing: httpx.Client) -> None:
    system, user = ("HALF" if place == it else "You help." for it in ("system", "user"))
    turns = [{"role": "user", "content": user}]
    if place == "result":
        turns[0]["content"] = [{"type": "tool_result", "tool_use_id": "t", "content": "HALF"}]  # type: ignore[assignment]
    made = {"model": "m", "max_tokens": 1, "messages": turns}
    body = encoded({"system": [text_block(BILLING.format(1)), text_block(system)]} | made).replace(b"HALF", half)
    answer = echoing.post("/v1/messages", content=body)
    assert answer.content == encoded({"system": [text_block(system)]} | made).replace(b"HALF", half)
    assert echoing.get(f"/v1/requests/{answer.headers['x-tokenzero-report']}").is_success


def test_a_stream_with_cr_line_ends_is_not_held() -> None:
    assert end_of_events(b"data: 1\r\rdata: 2\r") == len(b"data: 1\r\r")


class TestReportHeader:
    @pytest.mark.parametrize(
        "more",
        [
            {"messages": [{"role": "user", "content": [IMAGE, text_block("What is it?")]}]},
            {"tools": [SEARCH], "tool_choice": {"type": "tool", "name": "web_search"}},
            {"tools": [SEARCH, {"name": "f", "input_schema": {}}]},
            {"messages": [USED, {"role": "user", "content": "And?"}]},
            {"max_tokens": -1, "stop_sequences": 7},
        ],
        ids=["image", "search alone", "search", "history", "options"],
    )
    def test_what_this_package_would_refuse_is_reported_all_the_same(self, more: Json, echoing: httpx.Client) -> None:
        answer = echoing.post("/v1/messages", json=MESSAGES | more)
        found = echoing.get(f"/v1/requests/{answer.headers['x-tokenzero-report']}").json()
        assert found["sections"][0]["section"] == "system[0]"

    def test_it_is_sent_only_where_the_report_will_be_found(self, echoing: httpx.Client) -> None:
        for body, readable in (
            (ask("Hi"), True),
            ({"model": "m", "messages": 1}, False),
            (ask("Hi", messages=[{"role": "nobody"}]), False),
            (ask("Again"), True),
        ):
            id = echoing.post("/v1/messages", json=body).headers.get("x-tokenzero-report")
            assert bool(id) is readable
            assert id is None or echoing.get(f"/v1/requests/{id}").is_success

    def test_nothing_is_remembered_of_requests_that_are_answered(self) -> None:
        reports = Reports()
        with engine(echo) as url, proxy_of(url, reports=reports) as client:
            for n in range(5):
                client.post("/v1/messages", json=ask(f"Hi {n}"))
            eventually(lambda: not reports.reports, "the reports of answered requests are forgotten")


class TestUpstreamKey:
    @pytest.mark.parametrize("sent", [{}, {"x-api-key": "mine"}, {"Authorization": "Bearer mine"}])
    @pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions", "/v1/other"])
    def test_it_replaces_the_clients(self, path: str, sent: dict[str, str]) -> None:
        with engine(echo) as url, proxy_of(url) as client:
            plain = headers_of(client.post(path, json=MESSAGES, headers=sent))
        assert [plain.get(name) for name in ("x-api-key", "authorization")] == [
            sent.get("x-api-key"),
            sent.get("Authorization", "").lower() or None,
        ]
        with engine(echo) as url, proxy_of(url, key="theirs") as client:
            keyed = headers_of(client.post(path, json=MESSAGES, headers=sent))
        assert (keyed["x-api-key"], keyed["authorization"]) == ("theirs", "bearer theirs")
        assert "mine" not in keyed.values()

    def test_the_vendor_gets_one_form_of_it(self) -> None:
        vendor = parse_upstream("https://api.anthropic.com", frozenset(), 1, "secret")
        assert vendor.keyed([(b"Authorization", b"Bearer a"), (b"x-b", b"c")]) == [
            (b"x-b", b"c"),
            (b"x-api-key", b"secret"),
        ]

    def test_it_is_never_shown(self, caplog: pytest.LogCaptureFixture) -> None:
        assert "secret" not in repr(parse_upstream("http://a", DEFAULT_RULES, 1, "secret"))
        with pytest.raises(ValueError, match="--upstream-api-key: expected printable ASCII") as refused:
            parse_upstream("http://a", DEFAULT_RULES, 1, "secret\n")
        assert "secret" not in str(refused.value)

        def refusing(connection, head: bytes, body: bytes) -> None:  # type: ignore[no-untyped-def]
            connection.sendall(reply(b"{", JSON))

        with (
            caplog.at_level(logging.DEBUG),
            engine(refusing) as url,
            proxy_of(url, key="secret") as client,
        ):
            assert client.post("/v1/messages", json=MESSAGES).status_code == 502
        assert "secret" not in caplog.text

    def test_it_comes_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TOKENZERO_UPSTREAM_API_KEY", "secret")
        cli = parser()
        config = read_config(ProxyConfig, cli.parse_args(["--upstream", "http://a"]))
        assert config.engines[0].api_key == "secret"
        assert "secret" not in cli.format_help()


def test_a_refusal_has_the_form_of_the_api_that_is_meant() -> None:
    with engine(echo) as url, proxy_of(url, keys=only_key("k")) as client:
        refused = client.post("/openai/chat/completions", json=CHAT).json()
        assert refused["error"]["code"] == "invalid_api_key"
    with proxy_of("http://127.0.0.1:9") as client:
        assert client.post("/v1/v1/responses", json=RESPONSES).json()["error"]["type"] == "server_error"
        assert json.loads(client.post("/x/v1/messages", json=MESSAGES).content)["type"] == "error"
