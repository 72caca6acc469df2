"""The proxy before several engines, which are sockets here: where requests go, and what a bad engine costs."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from serve.proxy.app import create_proxy
from serve.proxy.cli import ProxyConfig, main, parser
from serve.proxy.errors import error_status
from serve.proxy.relay import FIRST_TEXT
from serve.proxy.upstream import parse_upstream
from serve.web.settings import read_config
from tests.helpers.http import Json, ask, encoded, eventually
from tests.helpers.scripted_server import answering
from tests.serve.proxy.test_proxy import EVENTS, JSON, Script, chunk, engine, reply

TEXT = "A sentence of a prompt that is long enough to fill a few blocks of text, and says nothing. " * 20
FIXED_S, CHARACTER_S = 0.005, 5e-5  # of a request, and of a character that is not cached
PING = b'event: ping\ndata: {"type": "ping"}\n\n'
DELTA = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"type":"text_delta","text":"Hi"}}\n\n'
)
STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
END = b"0\r\n\r\n"


def shared(one: str, other: str) -> int:
    """Characters from the start on that two texts have in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def started(usage: Json) -> bytes:
    """The first event of an answer."""
    body = {"type": "message_start", "message": {"id": "msg_0", "usage": usage}}
    return b"event: message_start\ndata: " + json.dumps(body).encode() + b"\n\n"


@dataclass
class Engine:
    """An engine that answers as it is told at the time."""

    name: str
    does: Script | None = None  # with chat requests, in place of an answer
    health: Script | None = None  # with questions how it is
    prompts: list[Json] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    url: str = ""
    cached: list[str] = field(default_factory=list)

    def __call__(self, connection: socket.socket, head: bytes, body: bytes) -> None:
        path = head.split(b" ")[1].decode()
        self.paths.append(path)
        if path == "/health":
            (self.health or (lambda connection, *_: connection.sendall(reply(b"{}", JSON))))(connection, head, body)
        elif not re.search(rb"messages|responses", head.split(b"\r\n")[0]):
            connection.sendall(reply(self.name.encode()))
        else:
            self.prompts.append(json.loads(body))
            (self.does or self.answer)(connection, head, body)

    def answer(self, connection: socket.socket, head: bytes, body: bytes) -> None:
        """Compute what is not cached, which takes its time, and answer."""
        request = json.loads(body)
        prompt = json.dumps(request["messages"])[:-1]
        cached = max((shared(prompt, other) for other in self.cached), default=0)
        time.sleep(FIXED_S + CHARACTER_S * (len(prompt) - cached))
        self.cached.append(prompt)
        usage = {
            "input_tokens": (len(prompt) - cached) // 4,
            "cache_read_input_tokens": cached // 4,
            "output_tokens": 1,
        }
        if request.get("stream"):
            named = DELTA.replace(b"Hi", self.name.encode())
            connection.sendall(EVENTS + b"".join(map(chunk, (started(usage), named, STOP))) + END)
        else:
            answer = {"content": [{"type": "text", "text": self.name}], "usage": usage}
            connection.sendall(reply(json.dumps(answer).encode(), JSON))


@dataclass
class Fleet:
    """A client of a proxy before engines."""

    client: httpx.Client
    engines: list[Engine]

    def ask(self, text: str, stream: bool = True, headers: dict[str, str] | None = None, **more: Any) -> str:
        """The name of the engine that answers."""
        response = self.client.post("/v1/messages", json=ask(text, stream=stream, **more), headers=headers)
        assert response.status_code == 200, response.text
        return self.named(response.text)

    def named(self, answer: str) -> str:
        """The only engine that is in an answer."""
        [name] = {each.name for each in self.engines if f'"{each.name}"' in answer}
        return name

    def by_name(self, name: str) -> Engine:
        return next(each for each in self.engines if each.name == name)

    def other(self, name: str) -> Engine:
        return next(each for each in self.engines if each.name != name)

    def state(self, one: Engine) -> str:
        return self.client.get("/health").json()["upstreams"][one.url]

    def metric(self, name: str, one: Engine) -> int:
        return int(
            re.search(
                rf'^tokenzero_proxy_{name}{{upstream="{one.url}"}} (\d+)$', self.client.get("/metrics").text, re.M
            )[1]
        )  # type: ignore[index]

    def reports(self) -> list[Json]:
        return self.client.get("/v1/requests").json()["data"]


@contextmanager
def fleet_of(*engines: Engine, timeout: float = 30) -> Iterator[Fleet]:
    """A proxy in this process before these engines."""
    with ExitStack() as stack:
        for one in engines:
            one.url = one.url or stack.enter_context(engine(one))
        upstreams = [parse_upstream(one.url, frozenset(), timeout) for one in engines]
        own = stack.enter_context(answering(create_proxy(upstreams, frozenset())))
        yield Fleet(stack.enter_context(httpx.Client(base_url=own, timeout=30)), list(engines))


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """A proxy before two engines that it has measured: each has answered while the other one refused."""
    with fleet_of(Engine("one"), Engine("two")) as made:
        with monkeypatch.context() as patch:
            patch.setattr("serve.proxy.health.REFUSAL_SECONDS", (0.0, 30.0))
            for each in made.engines:
                made.other(each.name).does = lambda c, *_: c.sendall(reply(b"{}", JSON, status="503 Busy"))
                assert made.ask(f"For {each.name}: {TEXT}") == each.name
                made.other(each.name).does = None
        for each in made.engines:
            each.prompts.clear()
        yield made


def unused_url() -> str:
    """Where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def turns(session: str, count: int) -> list[Json]:
    """A conversation's messages, `count` of the user's."""
    said = [{"role": "user", "content": f"{session}: {TEXT} {n}"} for n in range(count)]
    return [each for one in said for each in (one, {"role": "assistant", "content": "Hi"})][:-1]


class TestChoice:
    def test_a_conversation_goes_on_where_it_was(self, fleet: Fleet) -> None:
        def busy(connection: socket.socket, head: bytes, body: bytes) -> None:
            assert released.wait(20)
            fleet.by_name("one").answer(connection, head, body)

        released = threading.Event()
        first = fleet.ask("", messages=turns("a", 1))
        fleet.by_name(first).does = busy
        waiting = threading.Thread(target=fleet.ask, args=("", False), kwargs={"messages": turns("a", 2)})
        waiting.start()
        eventually(lambda: len(fleet.by_name(first).prompts) == 2, "the second turn follows the first")
        second = fleet.ask("", messages=turns("b", 1))
        released.set()
        waiting.join()
        assert second != first, "a new conversation goes where nothing waits"
        fleet.by_name(first).does = None
        for count in (2, 3, 4):
            assert fleet.ask("", messages=turns("a", count + 1)) == first
            assert fleet.ask("", messages=turns("b", count)) == second

    def test_the_report_says_where_and_why(self, fleet: Fleet) -> None:
        first = fleet.ask("", messages=turns("a", 1))
        fleet.ask("", messages=turns("a", 2))
        eventually(lambda: len(fleet.reports()) == 4, "all reports are made")
        latest = fleet.reports()[0]
        here, there = fleet.by_name(first).url, fleet.other(first).url
        assert latest["upstream"] == here
        assert 0 < latest["expected_ttft_ms"][here] < latest["expected_ttft_ms"][there]
        assert latest["expected_cached_tokens"] > 300

    def test_a_response_is_continued_where_it_was_given(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("serve.proxy.health.REFUSAL_SECONDS", (0.0, 30.0))

        def respond(id: str, text: str, refuses: Engine | None = None, **more: Any) -> Engine:
            """The engine that gives a response with this id."""
            body = {"id": id, "usage": {"input_tokens": 500}}
            for each in fleet.engines:
                status = "503 Busy" if each is refuses else "200 OK"
                each.does = lambda c, *_, status=status: c.sendall(reply(encoded(body), JSON, status=status))
                each.prompts.clear()
            assert fleet.client.post("/v1/responses", json={"model": "m", "input": text} | more).status_code == 200
            return next(each for each in fleet.engines if each.prompts and each is not refuses)

        warm = respond("resp_1", TEXT)
        assert respond("resp_2", TEXT) is warm
        other = respond("resp_3", TEXT, refuses=warm)
        assert other is not warm
        for id in ("resp_3", "resp_1", "resp_3"):
            assert respond("resp_4", TEXT, previous_response_id=id) is (other if id == "resp_3" else warm)

    def test_a_response_is_continued_nowhere_else_while_its_engine_refuses(self, fleet: Fleet) -> None:
        def respond(**more: Any) -> httpx.Response:
            return fleet.client.post("/v1/responses", json={"model": "m", "input": TEXT} | more)

        for each in fleet.engines:
            answer = encoded({"id": f"resp_{each.name}", "usage": {"input_tokens": 500}})
            each.does = lambda c, *_, answer=answer: c.sendall(reply(answer, JSON))
        name = respond().json()["id"].removeprefix("resp_")
        fleet.by_name(name).does = lambda c, *_: c.sendall(reply(b"{}", JSON, "retry-after: 9", status="429 Busy"))
        fleet.other(name).prompts.clear()
        for _ in range(2):
            refused = respond(previous_response_id=f"resp_{name}")
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "9")
        assert not fleet.other(name).prompts

    def test_counts_of_tokens_and_other_requests_go_to_any(self, fleet: Fleet) -> None:
        assert fleet.client.get("/v1/models").text in ("one", "two")
        count = fleet.client.post("/v1/messages/count_tokens", json=ask("Hi"))
        assert count.status_code == 200
        assert len([each for each in fleet.reports() if "upstream" in each]) == 2, "those before the test"


@contextmanager
def preferring(fleet: Fleet) -> Iterator[tuple[Engine, Engine, list[Json]]]:
    """An engine that holds a conversation, the other one, and the conversation's next turn."""
    name = fleet.ask("", messages=turns("a", 1))
    yield fleet.by_name(name), fleet.other(name), turns("a", 2)


class TestBadEngines:
    @pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable", "529 Overloaded"])
    @pytest.mark.parametrize("stream", [False, True])
    def test_one_that_refuses_is_left_alone_for_a_while(self, status: str, stream: bool, fleet: Fleet) -> None:
        with preferring(fleet) as (bad, good, messages):
            bad.does = lambda connection, *_: connection.sendall(reply(b"{}", JSON, "retry-after: 20", status=status))
            refusals = fleet.metric("refused_total", bad)
            for _ in range(3):
                assert fleet.ask("", stream, messages=messages) == good.name
            assert len(bad.prompts) == 2
            assert fleet.state(bad) == "refusing"
            assert (fleet.metric("refused_total", bad), fleet.metric("up", bad)) == (refusals + 1, 1)

    def test_where_all_refuse_the_client_gets_the_refusal(self, fleet: Fleet) -> None:
        for each in fleet.engines:
            each.does = lambda connection, *_: connection.sendall(
                reply(b'{"why": "full"}', JSON, "retry-after: 7", status="529 Overloaded")
            )
        for _ in range(2):
            answer = fleet.client.post("/v1/messages", json=ask("Hi"))
            assert (answer.status_code, answer.headers["retry-after"]) == (529, "7")
            assert answer.json() == {"why": "full"}

    def test_an_error_of_the_request_is_not_tried_again(self, fleet: Fleet) -> None:
        for each in fleet.engines:
            each.does = lambda connection, *_: connection.sendall(reply(b'{"bad": 1}', JSON, status="400 Bad Request"))
        assert fleet.client.post("/v1/messages", json=ask("Hi")).status_code == 400
        assert sum(len(each.prompts) for each in fleet.engines) == 1
        assert {fleet.state(each) for each in fleet.engines} == {"up"}

    def test_one_that_is_down_costs_nothing_and_is_asked_until_it_is_back(self) -> None:
        down = Engine("one", url=unused_url())
        with fleet_of(down, Engine("two")) as fleet:
            for n in range(4):
                assert fleet.ask(f"{n} {TEXT}", stream=bool(n % 2)) == "two"
            assert fleet.client.get("/v1/models").text == "two"
            assert fleet.state(down) == "out"
            assert fleet.metric("failed_total", down) == 1
            port = int(down.url.rpartition(":")[2])
            with socket.create_server(("127.0.0.1", port)) as listener:
                listener.settimeout(20)
                connection, _ = listener.accept()
                assert connection.recv(2**16).startswith(b"GET /health HTTP/1.1\r\n")
                connection.sendall(reply(b"{}", JSON))
                eventually(lambda: fleet.state(down) == "up", "it is back")
                connection.close()

    def test_where_all_are_down_the_client_gets_a_502(self) -> None:
        with fleet_of(Engine("one", url=unused_url()), Engine("two", url=unused_url())) as fleet:
            for _ in range(2):
                answer = fleet.client.post("/v1/messages", json=ask("Hi"))
                assert answer.status_code == 502
                assert "ConnectError" in answer.json()["error"]["message"]
            assert fleet.client.get("/health").status_code == 503

    @pytest.mark.parametrize("before", [b"", EVENTS, EVENTS + chunk(started({}))], ids=["nothing", "head", "start"])
    def test_a_stream_that_breaks_before_its_first_token_is_anothers(self, before: bytes, fleet: Fleet) -> None:
        def breaking(connection: socket.socket, head: bytes, body: bytes) -> None:
            connection.sendall(before)
            connection.close()

        with preferring(fleet) as (bad, good, messages):
            bad.does = breaking
            response = fleet.client.post("/v1/messages", json=ask("", stream=True, messages=messages))
            assert fleet.named(response.text) == good.name
            assert response.text.count("message_start") == 2, "the event and its type, once"
            assert "error" not in response.text

    def test_a_stream_that_breaks_after_its_first_token_ends_with_an_error(self, fleet: Fleet) -> None:
        def breaking(connection: socket.socket, head: bytes, body: bytes) -> None:
            connection.sendall(EVENTS + chunk(started({})) + chunk(DELTA))
            connection.close()

        with preferring(fleet) as (bad, good, messages):
            bad.does = breaking
            response = fleet.client.post("/v1/messages", json=ask("", stream=True, messages=messages))
            assert response.text.startswith("event: message_start")
            assert "the upstream failed" in response.text
            assert not good.prompts

    def test_pings_pass_while_another_can_still_answer(self, fleet: Fleet) -> None:
        pinged = threading.Event()

        def pinging(connection: socket.socket, head: bytes, body: bytes) -> None:
            connection.sendall(EVENTS + chunk(PING))
            assert pinged.wait(20), "the client has the ping"
            connection.close()

        with preferring(fleet) as (bad, good, messages):
            bad.does = pinging
            whole = b""
            body = ask("", stream=True, messages=messages)
            with fleet.client.stream("POST", "/v1/messages", json=body) as response:
                for piece in response.iter_bytes():
                    whole += piece
                    pinged.set()
            assert whole.startswith(PING)
            assert fleet.named(whole.decode()) == good.name

    @pytest.mark.parametrize("is_well", [False, True])
    def test_one_that_is_silent_is_asked_how_it_is(
        self, is_well: bool, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("serve.proxy.health.PATIENCE_SECONDS", 0.1)
        asked = threading.Event()

        def health(connection: socket.socket, head: bytes, body: bytes) -> None:
            asked.set()
            connection.sendall(reply(b"{}", JSON, status="200 OK" if is_well else "503 Dead"))

        def silent(connection: socket.socket, head: bytes, body: bytes) -> None:
            assert asked.wait(20)
            if is_well:
                bad.answer(connection, head, body)
            else:
                connection.recv(1)  # until the proxy gives up

        with preferring(fleet) as (bad, good, messages):
            bad.does, bad.health = silent, health
            assert fleet.ask("", messages=messages) == (bad if is_well else good).name
            assert fleet.state(bad) == ("up" if is_well else "out")

    def test_a_request_that_breaks_engines_breaks_two_at_most(self) -> None:
        def breaking(connection: socket.socket, head: bytes, body: bytes) -> None:
            connection.close()

        engines = [Engine(name, breaking) for name in ("one", "two", "three", "four")]
        with fleet_of(*engines) as fleet:
            answer = fleet.client.post("/v1/messages", json=ask("Poison"))
            assert answer.status_code == 502
            assert sum(bool(each.prompts) for each in engines) == 2

    def test_it_breaks_two_at_most_even_if_they_are_gone_then(self) -> None:
        listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
        broken: list[int] = []

        def die(number: int) -> None:
            """Take a request, and end before it is answered."""
            with suppress(OSError):
                connection, _ = listeners[number].accept()
                listeners[number].close()
                read = b""
                while b"Poison" not in read:
                    read += connection.recv(2**16)
                broken.append(number)
                connection.close()

        for number in range(4):
            threading.Thread(target=die, args=(number,), daemon=True).start()
        engines = [Engine(f"{n}", url=f"http://127.0.0.1:{each.getsockname()[1]}") for n, each in enumerate(listeners)]
        with fleet_of(*engines) as fleet:
            assert fleet.client.post("/v1/messages", json=ask("Poison")).status_code == 502
        for each in listeners:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        assert len(broken) == 2

    @pytest.mark.parametrize("stream", [False, True])
    def test_one_that_fails_is_replaced_and_asked_and_that_costs_others_nothing(
        self, stream: bool, fleet: Fleet
    ) -> None:
        with preferring(fleet) as (bad, good, messages):
            failing = reply(b'{"error": "CUDA"}', JSON, status="500 Internal Server Error")
            bad.does = lambda connection, *_: connection.sendall(failing)
            assert fleet.ask("", stream, messages=messages) == good.name
            assert fleet.state(bad) == "up"
            eventually(lambda: "/health" in bad.paths, "it is asked how it is")
            good.does = bad.does
            answer = fleet.client.post("/v1/messages", json=ask("Hi", stream=stream))
            assert (answer.status_code, answer.json()) == (500, {"error": "CUDA"})
            assert {fleet.state(each) for each in fleet.engines} == {"up"}

    def test_a_refusal_is_not_ended_by_an_answer_that_began_before_it(self, fleet: Fleet) -> None:
        released = threading.Event()

        def late(connection: socket.socket, head: bytes, body: bytes) -> None:
            assert released.wait(20)
            bad.answer(connection, head, body)

        with preferring(fleet) as (bad, good, messages):
            bad.does = late
            waiting = threading.Thread(target=fleet.ask, args=("",), kwargs={"messages": messages})
            waiting.start()
            eventually(lambda: len(bad.prompts) == 2, "it is at work")
            bad.does = lambda c, *_: c.sendall(reply(b"{}", JSON, "retry-after: 20", status="503 Busy"))
            good.does = bad.does
            assert fleet.client.post("/v1/messages", json=ask("Hi")).status_code == 503
            assert {fleet.state(each) for each in fleet.engines} == {"refusing"}
            released.set()
            waiting.join()
            assert fleet.state(bad) == "refusing"

    def test_a_question_has_a_limit_however_its_answer_trickles(
        self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("serve.proxy.health.PATIENCE_SECONDS", 0.1)
        monkeypatch.setattr("serve.proxy.forward.QUESTION_SECONDS", 0.5)
        over = threading.Event()

        def trickling(connection: socket.socket, head: bytes, body: bytes) -> None:
            with suppress(OSError):
                for byte in b"HTTP/1.1 200 OK\r\n" + b"x-filling: more\r\n" * 50:
                    connection.sendall(bytes([byte]))
                    if over.wait(0.1):
                        break

        def silent(connection: socket.socket, head: bytes, body: bytes) -> None:
            connection.recv(1)

        with preferring(fleet) as (bad, good, messages):
            bad.does, bad.health = silent, trickling
            try:
                assert fleet.ask("", messages=messages) == good.name
            finally:
                over.set()

    def test_who_goes_away_leaves_nothing_in_flight(self, fleet: Fleet) -> None:
        gone = threading.Event()
        for each in fleet.engines:
            each.does = lambda connection, *_: (connection.recv(1), gone.set())  # type: ignore[func-returns-value]
        with pytest.raises(httpx.ReadTimeout):
            fleet.client.post("/v1/messages", json=ask("Hi"), timeout=0.2)
        assert gone.wait(20)
        eventually(lambda: all(fleet.metric("in_flight", each) == 0 for each in fleet.engines), "nothing is in flight")
        assert {fleet.state(each) for each in fleet.engines} == {"up"}


def event(data: Json) -> bytes:
    """An event of a stream that is an error."""
    return f"event: error\ndata: {json.dumps(data)}\n\n".encode()


def of_kind(kind: str) -> Json:
    """An error of the Messages API."""
    return {"type": "error", "error": {"type": kind, "message": "no"}}


class TestErrorsInStreams:
    """An engine that has begun a stream has only an `error` event left to refuse with."""

    @pytest.mark.parametrize("kind", ["overloaded_error", "api_error"])
    def test_one_before_the_first_token_is_anothers(self, kind: str, fleet: Fleet) -> None:
        with preferring(fleet) as (bad, good, messages):
            refusing = EVENTS + chunk(PING + started({})) + chunk(event(of_kind(kind))) + END
            bad.does = lambda connection, *_: connection.sendall(refusing)
            answer = fleet.client.post("/v1/messages", json=ask("", stream=True, messages=messages))
            assert fleet.named(answer.text) == good.name
            assert "error" not in answer.text
            assert fleet.state(bad) == ("refusing" if kind == "overloaded_error" else "up")

    def test_one_that_the_request_has_earned_is_passed_on(self, fleet: Fleet) -> None:
        with preferring(fleet) as (bad, good, messages):
            events = started({}) + event(of_kind("invalid_request_error"))
            bad.does = lambda connection, *_: connection.sendall(EVENTS + chunk(events) + END)
            answer = fleet.client.post("/v1/messages", json=ask("", stream=True, messages=messages))
            assert answer.content == events
            assert not good.prompts
            assert fleet.state(bad) == "up"

    @pytest.mark.parametrize("before", [b"", PING])
    def test_where_all_have_one_the_client_gets_the_last(self, before: bytes, fleet: Fleet) -> None:
        events = (chunk(before) if before else b"") + chunk(started({})) + chunk(event(of_kind("overloaded_error")))
        for each in fleet.engines:
            each.does = lambda connection, *_: connection.sendall(EVENTS + events + END)
        answer = fleet.client.post("/v1/messages", json=ask("Hi", stream=True))
        assert answer.content.replace(PING, b"") == started({}) + event(of_kind("overloaded_error"))
        assert {fleet.state(each) for each in fleet.engines} == {"refusing"}

    @pytest.mark.parametrize(
        ("data", "status"),
        [
            (of_kind("overloaded_error"), 529),
            (of_kind("rate_limit_error"), 429),
            (of_kind("invalid_request_error"), None),
            ({"error": {"code": 500, "message": "no", "type": "server_error"}}, 500),
            ({"error": {"code": 400, "message": "no", "type": "BadRequestError"}}, 400),
            ({"error": {"object": "error", "message": "no", "type": "InternalServerError"}}, 500),
            ({"object": "error", "message": "no", "type": "x", "code": 503}, 503),
            ({"type": "error", "code": "rate_limit_exceeded", "message": "no"}, 429),
            ({"type": "response.failed", "response": {"error": {"code": "server_error", "message": "no"}}}, 500),
            ({"type": "response.created", "response": {"error": None}}, None),
            ({"choices": [{"delta": {"content": '"error": {"code": 500}'}}]}, None),
        ],
    )
    def test_the_status_of_each_engines_errors(self, data: Json, status: int | None) -> None:
        assert error_status(started({}) + event(data)) == status
        compact = b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\r\n\r\n"
        assert error_status(compact) == status


class TestFirstToken:
    @pytest.mark.parametrize(
        ("delta", "is_text"),
        [
            ('{"role":"assistant","content":""}', False),
            ('{"role":"assistant","content":"","reasoning_content":null,"tool_calls":null}', False),
            ('{"role":"assistant","content":null}', False),
            ("{}", False),
            ('{"role":"assistant","content":"Hi"}', True),
            ('{"content":"}"}', True),
            ('{"content":"\\""}', True),
            ('{"content":"","reasoning_content":"Hm"}', True),
            ('{"tool_calls":[{"index":0,"id":"a"}]}', True),
        ],
    )
    def test_a_chunk_without_text_is_none(self, delta: str, is_text: bool) -> None:
        for written in (delta, json.dumps(json.loads(delta))):
            event = f'data: {{"choices":[{{"index":0,"delta":{written},"finish_reason":null}}]}}\n\n'
            assert bool(FIRST_TEXT.search(event.encode())) is is_text


class TestCommand:
    def test_each_upstream_is_named_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["--upstream", "http://a:1", "--upstream", "http://b", "--upstream", "http://a:1/"])
        assert "--upstream: http://a:1 is given more than once: name each engine once" in capsys.readouterr().err

    def test_they_share_one_timeout_and_key(self) -> None:
        given = ["--upstream", "http://a", "--upstream", "http://b/x", "--upstream-api-key", "k", "--timeout", "9"]
        engines = read_config(ProxyConfig, parser().parse_args(given)).engines
        assert [(each.url, each.api_key, each.timeout) for each in engines] == [
            ("http://a", "k", 9.0),
            ("http://b/x", "k", 9.0),
        ]
