"""The proxy, before the real server and before engines that break HTTP's rules, which are sockets here."""

from __future__ import annotations

import json
import re
import socket
import socketserver
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.harness.server import Server, running_server
from serve.proxy import relay
from serve.proxy.app import create_proxy
from serve.proxy.cli import main
from serve.proxy.reports import MAX_WAITING, Reports
from serve.proxy.upstream import parse_upstream
from serve.rules.body import FIELDS
from serve.rules.normalize import DEFAULT_RULES
from serve.web.keys import only_key
from tests.helpers.http import BILLING, FLAGS, Json, ask, eventually, is_idle, open_request, read_until, text_block
from tests.helpers.scripted_server import answering

STREAM = anthropic.Stream[anthropic.types.RawMessageStreamEvent]
KEEP = {"x-tokenzero-normalize": "none"}  # the upstream server strips nothing
CACHED = ("cache_creation_", "cache_read_")
CHATS = ("/v1/messages", "/v1/chat/completions", "/v1/responses")


@contextmanager
def proxy_of(
    url: str, rules: frozenset[str] = DEFAULT_RULES, timeout: float = 30, key: str | None = None, **more: Any
) -> Iterator[httpx.Client]:
    """A client of a proxy in this process; `key` is its own for the engine."""
    app = create_proxy([parse_upstream(url, rules, timeout, key)], rules, **more)
    with answering(app) as own, httpx.Client(base_url=own, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def proxied(server: Server, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a proxy process before the real server; the proxy counts in the model's tokens."""
    log = tmp_path_factory.mktemp("proxy") / "proxy.log"
    flags = ("--upstream", server.url)
    with (
        running_server(model_folder, *flags, log=log, program=("-m", "serve", "proxy")) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        yield client
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def keeping(server: Server) -> Iterator[httpx.Client]:
    """A client of a proxy without rules."""
    with proxy_of(server.url, frozenset()) as client:
        yield client


def asked(path: str, text: str, stream: bool, **more: Any) -> Json:
    """A greedy request to one of the chat routes."""
    if path == "/v1/responses":
        return {"model": "any", "input": text, "max_output_tokens": 8, "temperature": 0, "stream": stream} | more
    return ask(text, stream=stream, **more)


def anonymous(answer: bytes) -> bytes:
    """An answer without ids and time."""
    answer = re.sub(rb"(msg|toolu|resp|rs|chatcmpl)[-_][0-9a-f]{24}", b"ID", answer)
    return re.sub(rb'"created(_at)?":\d+', b'"created":0', answer)


def with_header(number: int, said: str) -> Json:
    """A request whose system text begins with a header of its own."""
    return ask(said, max_tokens=1, system=[text_block(BILLING.format(number)), text_block(f"You help. {said} " * 9)])


def reports_on(client: httpx.Client, count: int) -> list[Json]:
    """The proxy's reports, the latest first, once there are so many."""
    eventually(lambda: len(client.get("/v1/requests").json()["data"]) >= count, f"{count} reports are made")
    return client.get("/v1/requests").json()["data"]


class TestInFrontOfOurServer:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("path", CHATS)
    def test_an_answer_is_the_same_but_for_ids_and_time(
        self, path: str, stream: bool, client: httpx.Client, proxied: httpx.Client
    ) -> None:
        body = asked(path, f"Say it {path} {stream}", stream)
        client.post(path, json=body)  # what is cached must be the same, too
        direct, through = (each.post(path, json=body) for each in (client, proxied))
        assert direct.status_code == through.status_code == 200
        assert anonymous(direct.content) == anonymous(through.content) != b""
        assert ("event-stream" in through.headers["content-type"]) is stream
        assert {*through.headers} - {"x-tokenzero-report"} == {*direct.headers}

    def test_refusals_and_other_routes_are_the_upstreams(self, client: httpx.Client, proxied: httpx.Client) -> None:
        for method, path, body in (
            ("POST", "/v1/messages", b'{"model": 1}'),
            ("POST", "/v1/nowhere?a=%2f", b"\0"),
            ("GET", "/v1/models", None),
            ("PUT", "/v1/models", b"{}"),
            ("GET", "/health", None),
        ):
            direct, through = (each.request(method, path, content=body) for each in (client, proxied))
            assert (through.status_code, through.content) == (direct.status_code, direct.content)
        counts = [each.post("/v1/messages/count_tokens", json=ask("How long?")).json() for each in (client, proxied)]
        for count in counts:  # each as of its time
            count["cache"].pop("predicted_ttft_ms")
        assert counts[0] == counts[1]
        assert client.head("/").status_code == proxied.head("/").status_code == 200

    def test_a_fresh_header_costs_nothing(self, client: httpx.Client, proxied: httpx.Client) -> None:
        first, second = (proxied.post("/v1/messages", json=with_header(n, "Fresh?"), headers=KEEP) for n in (1, 2))
        usage = second.json()["usage"]
        assert second.headers["x-tokenzero-normalized"] == "strip-preamble system[0]"
        assert (usage["cache_creation_input_tokens"], usage["input_tokens"]) == (0, 1)
        assert first.json()["usage"]["cache_read_input_tokens"] < 50
        assert usage["cache_read_input_tokens"] > 100

    def test_without_rules_the_header_stays_and_is_named(self, client: httpx.Client, keeping: httpx.Client) -> None:
        first, second = (keeping.post("/v1/messages", json=with_header(n, "Kept?"), headers=KEEP) for n in (1, 0xFFFFF))
        assert second.json()["usage"]["cache_creation_input_tokens"] > 100
        assert "x-tokenzero-normalized" not in second.headers
        latest, earlier = reports_on(keeping, 2)
        assert (latest["cause"], latest["section"], latest["unit"]) == ("preamble", "system[0]", "characters")
        assert latest["position"] == latest["reused_by_tier"]["expected"] == BILLING.index("{")
        assert (latest["prompt_text"][:5], latest["nearest_text"][:5]) == ("fffff", "00001")
        assert (latest["id"], earlier["id"]) == tuple(r.headers["x-tokenzero-report"] for r in (second, first))
        assert keeping.get(f"/v1/requests/{latest['id']}").json()["sections"][0]["section"] == "system[0]"

    def test_a_record_names_the_session_and_the_engine_lists_it(self, keeping: httpx.Client) -> None:
        headers = {"x-claude-code-session-id": "proxied", "x-claude-code-agent-id": "scout"}
        answer = keeping.post("/v1/messages", json=ask("Whose?", 1), headers=headers)
        path = f"/v1/requests/{answer.headers['x-tokenzero-report']}"
        eventually(lambda: keeping.get(path).status_code == 200, "the report is made")
        record = keeping.get(path).json()
        assert [record[name] for name in ("session", "agent", "parent")] == ["proxied", "scout", "proxied"]

        def listed() -> bool:
            return "proxied" in [each["session"] for each in keeping.get("/v1/sessions").json()["data"]]

        eventually(listed, "the session is listed")

    @pytest.mark.parametrize("place", ["header", "body"])
    def test_a_prompt_of_another_salt_is_in_no_report(self, place: str, keeping: httpx.Client) -> None:
        def reported(salt: str, pin: str) -> Json:
            body = ask(f"The PIN of {place} {'and so on ' * 30}is {pin}", 1)
            headers = {"x-tokenzero-cache-salt": salt} if place == "header" else {}
            body |= {} if headers else {"cache_salt": salt}
            answer = keeping.post("/v1/messages", json=body, headers=headers)
            path = f"/v1/requests/{answer.headers['x-tokenzero-report']}"
            eventually(lambda: keeping.get(path).status_code == 200, "the report is made")
            latest = keeping.get(path).json()
            return {name: latest.get(name) for name in ("cause", "position", "lost_tokens", "nearest", "reused_tokens")}

        assert reported("victim", "4711")["cause"] == "new_content"
        guesses = [reported(f"guess {pin}", pin) for pin in ("0000", "4700", "4711")]
        assert guesses == [guesses[0]] * 3
        assert reported("victim", "4712")["reused_tokens"] > 300, "within its salt, it is compared"

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("path", CHATS)
    def test_how_a_request_went_is_told(
        self, path: str, stream: bool, client: httpx.Client, keeping: httpx.Client
    ) -> None:
        before = len(reports_on(keeping, 0))
        keeping.post(path, json=asked(path, f"How did it go? {path} {stream}", stream))
        latest = reports_on(keeping, before + 1)[0]
        assert latest["state"] == "done"
        assert ("ttft_ms" in latest) is stream
        assert 0 < latest.get("generated_tokens", 0) <= 8 or (stream and path == "/v1/chat/completions")

    def test_a_browser_sees_the_dashboard_and_others_the_engine(
        self, client: httpx.Client, proxied: httpx.Client
    ) -> None:
        page = proxied.get("/", headers={"accept": "text/html,*/*"})
        assert page.content == client.get("/", headers={"accept": "text/html"}).content
        assert page.text.lower().startswith("<!doctype html>")
        assert proxied.get("/").json() == client.get("/").json()
        assert proxied.get("/dashboard/main.js").content == client.get("/dashboard/main.js").content

    def test_with_a_model_positions_are_its_tokens(self, client: httpx.Client, proxied: httpx.Client) -> None:
        before = len(reports_on(proxied, 0))
        answers = [proxied.post("/v1/messages", json=ask(f"Count {n}", max_tokens=1)) for n in (1, 2)]
        usage = answers[1].json()["usage"]
        latest = reports_on(proxied, before + 2)[0]
        assert latest.get("unit", "tokens") == "tokens"
        assert latest["prompt_tokens"] == sum(usage[f"{kind}input_tokens"] for kind in ("", *CACHED))
        assert latest["reused_by_tier"] == {"expected": usage["cache_read_input_tokens"]}

    def test_a_turn_that_extends_the_one_before_breaks_nothing(
        self, client: httpx.Client, keeping: httpx.Client
    ) -> None:
        before = len(reports_on(keeping, 0))
        first = ask("Tell me one.", system="You tell stories.")
        said = keeping.post("/v1/messages", json=first).json()["content"]
        again = [*first["messages"], {"role": "assistant", "content": said}, {"role": "user", "content": "Another."}]
        keeping.post("/v1/messages", json=first | {"messages": again})
        latest, earlier = reports_on(keeping, before + 2)[:2]
        assert "cause" not in latest
        assert latest["position"] == earlier["prompt_tokens"]

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_client_that_goes_away_ends_its_request(
        self, stream: bool, client: httpx.Client, proxied: httpx.Client
    ) -> None:
        connection = open_request(str(proxied.base_url), ask("Go on for long", max_tokens=5000, stream=stream))
        eventually(lambda: not is_idle(client), "the request runs")
        if stream:
            read_until(connection, b"content_block_delta")
        connection.close()
        eventually(lambda: is_idle(client), "the request has ended")

    def test_the_server_killed_in_mid_stream_gives_an_error_event(self, model_folder: Path) -> None:
        with running_server(model_folder, *FLAGS) as victim, proxy_of(victim.url) as client:
            caller = anthropic.Anthropic(base_url=str(client.base_url), api_key="any", max_retries=0)
            request = ask("Go on for long", max_tokens=5000, stream=True)
            answer = caller.post("/v1/messages", body=request, cast_to=object, stream=True, stream_cls=STREAM)
            while next(answer).type != "content_block_delta":
                pass
            victim.process.kill()
            with pytest.raises(anthropic.APIError, match="upstream failed"):
                list(answer)
            assert "upstream failed" in client.post("/v1/messages", json=request).json()["error"]["message"]


Script = Callable[[socket.socket, bytes, bytes], None]  # connection, head and body of a request


@contextmanager
def engine(script: Script) -> Iterator[str]:
    """An engine that does what the script says with each request; its URL."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while message := whole_request(self.request):
                script(self.request, *message)

    class Engine(socketserver.ThreadingTCPServer):
        daemon_threads = allow_reuse_address = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            if not isinstance(sys.exception(), OSError):  # the proxy or the script has closed the connection
                raise

    with Engine(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}).start()
        try:
            yield f"http://127.0.0.1:{running.server_address[1]}"
        finally:
            running.shutdown()


def whole_request(connection: socket.socket) -> tuple[bytes, bytes] | None:
    """Head and body of the next request; None at the connection's end."""
    seen = b""
    while b"\r\n\r\n" not in seen:
        piece = connection.recv(2**16)
        if not piece:
            return None
        seen += piece
    head, _, body = seen.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    chunked = b"transfer-encoding: chunked" in head.lower()
    while len(body) < int(length[1]) if length else chunked and not body.endswith(b"0\r\n\r\n"):
        body += connection.recv(2**16)
    return head, unchunked(body) if chunked else body


def unchunked(data: bytes) -> bytes:
    """A body without the sizes of its chunks."""
    size, _, rest = data.partition(b"\r\n")
    end = int(size, 16)
    return rest[:end] + unchunked(rest[end + 2 :]) if end else b""


def reply(body: bytes, *headers: str, status: str = "200 OK", length: int | None = None) -> bytes:
    """An answer with a content length, which may be a lie."""
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body) if length is None else length}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


JSON = "content-type: application/json"
EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def echo(connection: socket.socket, head: bytes, body: bytes) -> None:
    connection.sendall(reply(body, f"x-head: {head.hex()}"))


@pytest.fixture(scope="module")
def echoing() -> Iterator[httpx.Client]:
    """A client of a proxy before an engine that sends back what it gets."""
    with engine(echo) as url, proxy_of(url) as client:
        yield client


NO_CHAT = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["system", "tools", "model", "a"]) | st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=8,
).filter(lambda value: not (isinstance(value, dict) and {"messages", "input"} & {*value}))
HEADERED = {"system": BILLING.format(1), "messages": [{"role": "user", "content": "x"}]}


class TestUntouched:
    LIMITS = settings(
        max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )

    @LIMITS
    @given(
        body=st.binary(max_size=200) | NO_CHAT.map(lambda value: json.dumps(value, indent=1).encode()),
        path=st.sampled_from([*FIELDS, "/v1/embeddings", "/"]),
        method=st.sampled_from(["POST", "PUT", "PATCH", "DELETE", "SEARCH"]),
    )
    def test_what_is_no_chat_request_arrives_byte_for_byte(
        self, body: bytes, path: str, method: str, echoing: httpx.Client
    ) -> None:
        answer = echoing.request(method, path, content=body)
        assert answer.content == body
        assert bytes.fromhex(answer.headers["x-head"]).startswith(f"{method} {path} HTTP/1.1\r\n".encode())

    @pytest.mark.parametrize(
        "body",
        [
            json.dumps(HEADERED).encode()[:-1],
            b"\xef\xbb\xbf" + json.dumps(HEADERED).encode(),
            json.dumps(HEADERED | {"messages": "none"}).encode(),
            json.dumps(HEADERED | {"messages": [1]}).encode(),
            json.dumps([HEADERED]).encode(),
            json.dumps(HEADERED).encode("utf-16"),
            b'{"system":' + b"[" * 10**5 + b"]" * 10**5 + b',"messages":[]}',
            b"",
        ],
    )
    def test_what_is_nearly_one_does_too(self, body: bytes, echoing: httpx.Client) -> None:
        assert echoing.post("/v1/messages", content=body).content == body

    def test_a_chat_request_on_another_route_is_none(self, echoing: httpx.Client) -> None:
        body = json.dumps(HEADERED).encode()
        assert echoing.post("/v1/messages/batches", content=body).content == body
        assert echoing.put("/v1/messages", content=body).content == body
        assert echoing.post("/v1/messages", content=body).content != body

    def test_a_chat_request_that_no_rule_changes_arrives_byte_for_byte(self, echoing: httpx.Client) -> None:
        body = b' {"messages" : [ {"role":"user" , "content":"\\u00e9 x-anthropic-billing-header: a=b;"}], "n":1.0e0}\n'
        assert echoing.post("/v1/messages", content=body).content == body

    def test_target_and_headers_arrive_but_for_those_of_the_connection(self, echoing: httpx.Client) -> None:
        sent = {"x-api-key": "k", "connection": "x-mine, keep-alive", "x-mine": "1", "te": "trailers", "x-Odd": "a;b"}
        answer = echoing.post("/v1/messages?beta=true&x=%2F%20", json=HEADERED, headers=sent)
        line, *rest = bytes.fromhex(answer.headers["x-head"]).decode().lower().split("\r\n")
        assert line == "post /v1/messages?beta=true&x=%2f%20 http/1.1"
        headers = dict(header.split(": ", 1) for header in rest)
        assert headers.keys().isdisjoint({"connection", "x-mine", "te", "transfer-encoding"})
        assert (headers["x-api-key"], headers["x-odd"]) == ("k", "a;b")
        assert headers["content-length"] == str(len(answer.content)) != str(len(json.dumps(HEADERED)))
        assert headers["host"] != echoing.base_url.netloc.decode()

    @pytest.mark.parametrize("path", ["/v1/messages", "/upload"])
    def test_a_body_in_chunks_arrives(self, path: str, echoing: httpx.Client) -> None:
        assert echoing.post(path, content=iter([b"one", b"two" * 9])).content == b"one" + b"two" * 9

    def test_a_body_is_sent_on_while_it_comes(self) -> None:
        seen = threading.Event()

        class Slow:
            def __iter__(self) -> Iterator[bytes]:
                yield b"first"
                assert seen.wait(10), "the first part arrives before the second is sent"
                yield b"second"

        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"

            def accept() -> None:
                connection, _ = listener.accept()
                with connection:
                    read_until(connection, b"first")
                    seen.set()
                    read_until(connection, b"0\r\n\r\n")
                    connection.sendall(reply(b"done"))

            thread = threading.Thread(target=accept)
            thread.start()
            with proxy_of(url) as client:
                assert client.put("/file", content=Slow()).content == b"done"
            thread.join()

    @pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified", "404 Not Found", "529 Overloaded"])
    def test_the_status_is_the_upstreams(self, status: str) -> None:
        def answering_so(connection: socket.socket, head: bytes, body: bytes) -> None:
            empty = status[:3] in ("204", "304")
            connection.sendall(reply(b"" if empty else b"{}", JSON, "x-own: 1", status=status, length=2))

        with engine(answering_so) as url, proxy_of(url) as client:
            for answer in (client.get("/file"), client.post("/v1/messages", json=ask("Hi")), client.get("/file")):
                assert (answer.status_code, answer.headers["x-own"]) == (int(status[:3]), "1")

    def test_the_upstreams_path_stands_in_front(self) -> None:
        with engine(echo) as url, proxy_of(f"{url}/engines/a/") as client:
            head = bytes.fromhex(client.get("/v1/models").headers["x-head"])
        assert head.startswith(b"GET /engines/a/v1/models HTTP/1.1\r\n")


class TestFaults:
    """Errors have the form of the API that the request is for."""

    @staticmethod
    def error_in(answer: Json, path: str) -> tuple[str, str]:
        """Type and message of an error's body."""
        assert answer.get("type") == (None if path in CHATS[1:] else "error")
        return answer["error"]["type"], answer["error"]["message"]

    @pytest.mark.parametrize("path", [*CHATS, "/v1/nowhere"])
    def test_an_upstream_that_refuses_is_a_502(self, path: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        with proxy_of(f"http://127.0.0.1:{port}") as client:
            answer = client.post(path, json=asked(path, "Hi", False))
            kind, text = self.error_in(answer.json(), path)
        assert answer.status_code == 502
        assert kind == ("server_error" if path in CHATS[1:] else "api_error")
        assert text.startswith("the upstream failed: ConnectError")

    @pytest.mark.parametrize("path", CHATS)
    def test_an_upstream_that_is_too_slow_is_a_504(self, path: str) -> None:
        with (
            engine(lambda connection, head, body: connection.recv(1)) as url,  # until the proxy gives up
            proxy_of(url, timeout=0.2) as client,
        ):
            answer = client.post(path, json=asked(path, "Hi", False))
            kind, text = self.error_in(answer.json(), path)
        assert answer.status_code == 504
        assert kind == ("server_error" if path in CHATS[1:] else "timeout_error")
        assert text == "the upstream is too slow: ReadTimeout"

    @pytest.mark.parametrize("path", CHATS)
    @pytest.mark.parametrize("length", [5, 500])
    def test_a_wrong_content_length_is_a_502_and_costs_no_other_request_anything(self, length: int, path: str) -> None:
        def lying(connection: socket.socket, head: bytes, body: bytes) -> None:
            lies = b"lie" in body
            connection.sendall(reply(b'{"an": "answer"}', JSON, length=length if lies else None))
            if lies and length == 500:
                connection.close()

        with engine(lying) as url, proxy_of(url) as client:
            for _ in range(2):
                answer = client.post(path, json=asked(path, "lie", False))
                assert answer.status_code == 502
                assert "the upstream failed" in self.error_in(answer.json(), path)[1]
                assert client.post(path, json=asked(path, "Hi", False)).json() == {"an": "answer"}

    @pytest.mark.parametrize("path", CHATS)
    def test_no_http_at_all_is_a_502(self, path: str) -> None:
        with engine(lambda connection, head, body: connection.sendall(b"+OK\r\n\r\n")) as url, proxy_of(url) as client:
            answer = client.post(path, json=asked(path, "Hi", False))
        assert answer.status_code == 502
        assert "RemoteProtocolError" in self.error_in(answer.json(), path)[1]

    @pytest.mark.parametrize("path", CHATS)
    @pytest.mark.parametrize("end", ["closed", "reset", "silent", "malformed", "endless"])
    def test_a_stream_that_breaks_off_ends_with_an_error_event(
        self, end: str, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(relay, "MAX_EVENT_BYTES", 2**16)
        whole = b'event: x\ndata: {"type":"x","sequence_number":6}\n\n'

        def breaking(connection: socket.socket, head: bytes, body: bytes) -> None:
            connection.sendall(EVENTS + chunk(whole) + chunk(whole[:20]))
            assert received.wait(30), "the client has read the whole event"
            if end == "silent":
                connection.recv(1)  # until the proxy gives up
            elif end == "malformed":
                connection.sendall(b"no chunk\r\n")
            elif end == "endless":
                connection.sendall(chunk(b"x" * 2**17))
            elif end == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()

        received, raw = threading.Event(), b""
        with (
            engine(breaking) as url,
            proxy_of(url, timeout=0.5) as client,
            client.stream("POST", path, json=asked(path, "Hi", True)) as response,
        ):
            for piece in response.iter_raw():
                raw += piece
                if raw.startswith(whole):
                    received.set()
        assert raw.startswith(whole)
        last = raw.removeprefix(whole)
        assert last.endswith(b"\n\n")
        assert last.count(b"\n\n") == 1, "half an event is not sent"
        name, _, data = last.decode().strip().rpartition("\n")
        error = json.loads(data.removeprefix("data: "))
        assert "the upstream" in (error["message"] if path == "/v1/responses" else error["error"]["message"])
        if path == "/v1/responses":
            assert (name, error["type"], error["sequence_number"]) == ("event: error", "error", 7)
        else:
            assert name == ("event: error" if path == "/v1/messages" else "")
            self.error_in(error, path)

    @pytest.mark.parametrize("ends", [True, False])
    def test_a_compressed_stream_passes_as_it_comes(self, ends: bool) -> None:
        events = b'data: {"a": 1}\n\n' * 9
        read = threading.Event()

        def compressing(connection: socket.socket, head: bytes, body: bytes) -> None:
            packer = zlib.compressobj(wbits=31)
            first = packer.compress(events) + packer.flush(zlib.Z_SYNC_FLUSH)
            connection.sendall(EVENTS.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n") + chunk(first))
            assert read.wait(10), "the first events arrive before the others are sent"
            if ends:
                connection.sendall(chunk(packer.compress(events) + packer.flush()) + b"0\r\n\r\n")
            connection.close()

        def received(client: httpx.Client) -> bytes:
            whole = b""
            with client.stream("POST", "/v1/messages", json=ask("Hi", stream=True)) as answer:
                for piece in answer.iter_bytes():
                    whole += piece
                    read.set()
            return whole

        with engine(compressing) as url, proxy_of(url) as client:
            if ends:
                assert received(client) == events * 2
            else:
                with pytest.raises(httpx.RemoteProtocolError):
                    received(client)

    def test_openais_client_raises_what_the_event_says(self) -> None:
        def breaking(connection: socket.socket, head: bytes, body: bytes) -> None:
            connection.sendall(EVENTS + chunk(b'data: {"choices":[]}\n\n'))
            connection.close()

        with engine(breaking) as url, proxy_of(url) as client:
            caller = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="any", max_retries=0)
            chat = {"model": "any", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
            with pytest.raises(openai.APIError, match="upstream failed"):
                list(caller.chat.completions.create(**chat))

    def test_another_answer_that_breaks_off_breaks_off(self) -> None:
        def breaking(connection: socket.socket, head: bytes, body: bytes) -> None:
            connection.sendall(reply(b"half", length=500))
            connection.close()

        with engine(breaking) as url, proxy_of(url) as client, pytest.raises(httpx.RemoteProtocolError):
            client.get("/file")

    def test_a_connection_that_was_closed_while_idle_is_replaced(self) -> None:
        def closing(connection: socket.socket, head: bytes, body: bytes) -> None:
            echo(connection, head, body)
            connection.close()

        with engine(closing) as url, proxy_of(url) as client:
            for _ in range(20):
                assert client.post("/v1/messages", json=ask("Hi")).status_code == 200

    def test_reports_that_cannot_be_made_cost_nothing(self) -> None:
        class Broken(Reports):
            def __init__(self) -> None:
                super().__init__(render=lambda request, tools_first: 1 / 0)  # type: ignore[arg-type,return-value]

        with engine(echo) as url, proxy_of(url, reports=Broken()) as client:
            for _ in range(2 * MAX_WAITING):
                assert client.post("/v1/messages", json=ask("Hi")).json() == ask("Hi")
            found = client.get("/v1/requests").json()
        assert found.pop("without_report") == {"failed": 2 * MAX_WAITING}
        assert found | {"causes": {}} == {"data": [], "volatile": [], "causes": {}}

    def test_a_field_that_is_no_utf_8_passes_and_its_request_has_no_report(self) -> None:
        body = json.dumps(ask("Hi") | {"other": "?"}).encode().replace(b"?", b"\xff")
        with engine(echo) as url, proxy_of(url) as client:
            assert client.post("/v1/messages", content=body).content == body
            assert client.get("/v1/requests").json()["without_report"] == {"unread": 1}

    def test_browsers_see_the_dashboard_and_clients_the_engine(self) -> None:
        with engine(echo) as url, proxy_of(url, keys=only_key("k")) as client:
            page = client.get("/", headers={"accept": "text/html"})
            assert page.headers["content-type"].startswith("text/html")
            assert client.get("/dashboard/main.js").is_success
            assert "<html" not in client.get("/").text

    def test_images_and_the_vendors_tools_pass(self, echoing: httpx.Client) -> None:
        image = {"type": "image", "source": {"type": "url", "url": "x"}}
        tools = [{"type": "web_search_20250305", "name": "web_search"}]
        body = HEADERED | {"messages": [{"role": "user", "content": [image]}], "tools": tools}
        assert echoing.post("/v1/messages", json=body).json() == body | {"system": ""}


class TestCommand:
    @pytest.mark.parametrize("host", ["api.anthropic.com", "API.Anthropic.com.", "eu.api.anthropic.com:443"])
    def test_it_refuses_to_strip_towards_the_vendor(self, host: str, capsys: pytest.CaptureFixture[str]) -> None:
        for rules, reason in (
            ((), "needs the billing header that strip-preamble removes"),
            (("--normalize", "sort-tools"), "not as sort-tools changes them"),
        ):
            line = self.refusal(capsys, "--upstream", f"https://{host}", *rules)
            assert reason in line
            assert "--normalize none" in line

    def test_without_rules_the_vendor_is_an_upstream_like_any_other(self) -> None:
        assert parse_upstream("https://api.anthropic.com", frozenset(), 1).host == b"api.anthropic.com"
        assert parse_upstream("https://notanthropic.com", DEFAULT_RULES, 1).host == b"notanthropic.com"

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (("--upstream", "127.0.0.1:8000"), "expected a URL such as"),
            (("--upstream", "ftp://a"), "expected a URL such as"),
            (("--upstream", "http://a:x"), "Port"),
            (("--upstream", "http://a", "--normalize", "sort"), "expected some of"),
            (
                ("--upstream", "http://a", "--normalize", "tools-first"),
                "the proxy cannot apply tools-first",
            ),
            (("--upstream", "http://a", "--timeout", "0"), "--timeout: expected more than 0"),
            (("--upstream", "http://a", "--host", "0.0.0.0"), "give an --api-key"),
        ],
    )
    def test_bad_flags_are_named(self, flags: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert words in self.refusal(capsys, *flags)

    @staticmethod
    def refusal(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
        """The last line that the command prints when it refuses its arguments."""
        with pytest.raises(SystemExit) as ended:
            main(flags)
        assert ended.value.code == 2
        shown = capsys.readouterr().err.strip().splitlines()
        assert len(shown) == 2, "a line of usage and a line that says what is wrong"
        return shown[-1]

    def test_the_key_is_asked_for(self) -> None:
        with engine(echo) as url, proxy_of(url, keys=only_key("k")) as client:
            assert client.get("/v1/requests").status_code == 401
            refused = client.post("/v1/chat/completions", json=HEADERED, headers={"x-api-key": "wrong"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert client.post("/v1/messages", json=HEADERED, headers={"authorization": "Bearer k"}).is_success
            assert client.head("/").is_success
            assert client.post("/", json=HEADERED).status_code == 401  # where some engines generate, too
