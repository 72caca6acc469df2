"""Faults that a healthy server does not show: steps that raise, an engine that is stuck, full or gone.

The application runs in this process, over real HTTP; its engine's compiled steps are wrapped where a fault is needed.
Where the clients are at fault, because they are many, read nothing or leave, they meet a server process.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic
import httpx
import jax
import jax.numpy as jnp
import pytest

import serve.server.prepare as prepare_module
from cache.tiers import Tiers
from experiments.harness.client import scrape
from experiments.harness.server import Server, running_server
from model import checkpoint
from model.kernels.dispatch import arranged
from serve.engine.engine import Engine, generate
from serve.engine.request import TokenEvent
from serve.engine.settings import EngineSettings
from serve.prompt.tokenizer import Tokenizer
from serve.server.config import ServerConfig
from serve.server.context import make_context
from tests.helpers.http import (
    FLAGS,
    Json,
    ask,
    error_of,
    eventually,
    is_idle,
    long,
    open_request,
    post,
    prompt_tokens,
    read_until,
    stream,
    text_of,
)
from tests.helpers.scripted_server import listening

MakeEngine = Callable[..., Engine]
SIZES = {
    "num_pages": 64,
    "max_model_len": 512,
    "page_size": 16,
    "max_num_seqs": 2,
    "max_prefill_tokens": 16,
    "max_mixed_prefill_tokens": 16,
}


@pytest.fixture(scope="module")
def make_engine(model_folder: Path) -> MakeEngine:
    """Engines that are not started yet."""
    config, params = checkpoint.load(model_folder, jnp.dtype("float32"))
    params = arranged(params, 16)
    return lambda tiers=None, **sizes: Engine(params, config, EngineSettings(**SIZES | sizes), b"tiny", tiers)


@pytest.fixture
def serve(tokenizer: Tokenizer) -> Callable[..., Any]:
    """`with serve(engine) as client`: the application over an engine, on a port of its own."""

    @contextmanager
    def served(engine: Engine) -> Iterator[httpx.Client]:
        stop_ids = {tokenizer.hf.convert_tokens_to_ids("<|im_end|>")}
        with (
            listening(make_context(engine, tokenizer, stop_ids, ServerConfig(model="in-process"))) as url,
            httpx.Client(base_url=url, timeout=30) as client,
        ):
            yield client

    return served


class Wrapped:
    """The compiled steps of an engine, with a gate that tests can close and faults that tests can order."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.gate = threading.Event()
        self.gate.set()
        self.entered = 0
        self.fault: Callable[[int, Callable, tuple], Any] | None = None  # (sequences, step, its arguments)
        runner = engine.core.runner
        run = {bucket: replace(step, forward=self.wrap(step.forward)) for bucket, step in runner.steps.run.items()}
        runner.steps = replace(runner.steps, run=run)

    def wrap(self, step: Callable) -> Callable:
        def run(*args: Any) -> Any:
            self.entered += 1
            assert self.gate.wait(20), "the gate stayed closed"
            sequences = int((args[2].starts[1:] > args[2].starts[:-1]).sum())
            return self.fault(sequences, step, args) if self.fault else step(*args)

        return run


def raise_before(sequences: int, step: Callable, args: tuple) -> Any:
    raise RuntimeError("a fault of the test")


def raise_after(sequences: int, step: Callable, args: tuple) -> Any:
    step(*args)
    raise RuntimeError("a fault of the test")


def out_of_memory(sequences: int, step: Callable, args: tuple) -> Any:
    step(*args)  # which takes the pool
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate: a fault of the test")


class TestAStepThatRaises:
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("fault", [raise_before, raise_after, out_of_memory])
    def test_before_the_first_token_the_answer_is_a_500(
        self, streaming: bool, fault: Callable, make_engine: MakeEngine, serve: Any
    ) -> None:
        engine = make_engine()
        wrapped = Wrapped(engine)
        with serve(engine) as client:
            wrapped.fault = fault
            response = client.post("/v1/messages", json=ask("Hi", stream=streaming))
            assert "a fault of the test" in error_of(response, 500, "api_error")
            wrapped.fault = None
            assert text_of(post(client, ask("Hi")))
            assert scrape(client)['tokenzero_http_responses_total{path="/v1/messages",status="500"}'] == 1
            eventually(lambda: is_idle(client), "no page is held")
        engine.core.memory.prefix_cache.check()

    @pytest.mark.parametrize("fault", [raise_before, raise_after, out_of_memory])
    def test_those_that_run_end_with_an_error_and_those_that_wait_are_served(
        self, fault: Callable, make_engine: MakeEngine, serve: Any
    ) -> None:
        engine = make_engine()
        wrapped = Wrapped(engine)
        with serve(engine) as client, ThreadPoolExecutor(3) as pool:
            bodies = [ask(f"Number {number}", 60) for number in range(3)]
            expected = text_of(post(client, bodies[2]))

            def both_decode(sequences: int, step: Callable, args: tuple) -> Any:
                if sequences < 2 or args[2].max_chunk > 1:
                    return step(*args)
                wrapped.gate.clear()
                wrapped.fault = first_of_all
                return step(*args)

            def first_of_all(*call: Any) -> Any:
                wrapped.fault = None
                return fault(*call)

            wrapped.fault = both_decode
            streamed, whole = (
                pool.submit(stream, client, bodies[0]),
                pool.submit(client.post, "/v1/messages", json=bodies[1]),
            )
            eventually(lambda: not wrapped.gate.is_set(), "both decode")
            waiting = pool.submit(post, client, bodies[2])
            eventually(lambda: bool(engine.inbox.submissions or engine.waiting), "the third waits")
            wrapped.gate.set()

            assert streamed.result().kinds[0] == "message_start"
            last = streamed.result().events[-1]
            assert (last["type"], last["error"]["type"]) == ("error", "api_error")
            assert "a fault of the test" in last["error"]["message"]
            assert "a fault of the test" in error_of(whole.result(), 500, "api_error")
            assert text_of(waiting.result()) == expected
            assert scrape(client)["tokenzero_failed_requests_total"] == 2
            assert text_of(post(client, bodies[2])) == expected
            eventually(lambda: is_idle(client), "no page is held")
        engine.core.memory.prefix_cache.check()

    def test_what_was_cached_survives_a_step_that_left_the_pool_alone(
        self, make_engine: MakeEngine, serve: Any
    ) -> None:
        engine = make_engine()
        wrapped = Wrapped(engine)
        with serve(engine) as client:
            body = ask("Remember this question well")
            first = post(client, body)
            wrapped.fault = raise_before
            error_of(client.post("/v1/messages", json=ask("Another one")), 500, "api_error")
            wrapped.fault = None
            second = post(client, body)
            assert second["usage"]["cache_read_input_tokens"] == prompt_tokens(first["usage"]) - 1
            assert text_of(second) == text_of(first)

    def test_a_pool_that_was_lost_is_made_again_and_nothing_stale_is_read(
        self, make_engine: MakeEngine, serve: Any
    ) -> None:
        engine = make_engine()
        wrapped = Wrapped(engine)
        with serve(engine) as client:
            body = ask("Remember this question well")
            first = post(client, body)
            wrapped.fault = raise_after
            error_of(client.post("/v1/messages", json=ask("Another one")), 500, "api_error")
            wrapped.fault = None
            second = post(client, body)
            assert second["usage"]["cache_read_input_tokens"] == 0
            assert text_of(second) == text_of(first)
        engine.core.memory.prefix_cache.check()

    def test_a_pool_for_which_there_is_no_memory_is_made_when_there_is(
        self, make_engine: MakeEngine, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = make_engine()
        wrapped, memory = Wrapped(engine), engine.core.memory
        make, attempts = memory.new_pool, []

        def new_pool() -> Any:
            attempts.append(1)
            if len(attempts) < 3:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: a fault of the test")
            return make()

        monkeypatch.setattr(memory, "new_pool", new_pool)
        with serve(engine) as client:
            body = ask("Remember this question well")
            expected = text_of(post(client, body))
            wrapped.fault = out_of_memory
            error_of(client.post("/v1/messages", json=body), 500, "api_error")
            wrapped.fault = None
            for _ in range(2):
                error_of(client.post("/v1/messages", json=body), 500, "api_error")
            assert client.get("/health").status_code == 200
            assert text_of(post(client, body)) == expected
        assert len(attempts) == 3
        engine.core.memory.prefix_cache.check()


class TestOverload:
    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_request_beyond_the_queue_is_told_to_come_back(
        self, streaming: bool, make_engine: MakeEngine, serve: Any
    ) -> None:
        engine = make_engine(max_queue=2)
        wrapped = Wrapped(engine)
        with serve(engine) as client, ThreadPoolExecutor(3) as pool:
            wrapped.gate.clear()
            served = [pool.submit(post, client, ask("Number 0"))]
            eventually(lambda: wrapped.entered > 0, "a step is under way")
            served += [pool.submit(post, client, ask(f"Number {number}")) for number in (1, 2)]
            eventually(lambda: len(engine.inbox.submissions) == 2, "the queue is full")

            response = client.post("/v1/messages", json=ask("One too many", stream=streaming))
            assert "2 requests are waiting" in error_of(response, 529, "overloaded_error")
            assert int(response.headers["retry-after"]) >= 1
            with (
                anthropic.Anthropic(base_url=str(client.base_url), api_key="any", max_retries=0) as sdk,
                pytest.raises(anthropic.APIStatusError) as caught,
            ):
                sdk.messages.create(model="m", max_tokens=1, messages=ask("One too many")["messages"])
            assert (caught.value.status_code, caught.value.body["error"]["type"]) == (529, "overloaded_error")
            assert client.post("/v1/messages/count_tokens", json=ask("Hi")).status_code == 200, "all else goes on"
            assert client.get("/health").status_code == 200

            wrapped.gate.set()
            assert all(text_of(answer.result()) for answer in served)
            assert text_of(post(client, ask("Later")))
            assert scrape(client)['tokenzero_http_responses_total{path="/v1/messages",status="529"}'] == 2


class TestWaiting:
    def test_pings_keep_a_stream_alive_until_its_first_token(
        self, make_engine: MakeEngine, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("serve.server.answer.PING_SECONDS", 0.02)
        engine = make_engine()
        wrapped = Wrapped(engine)
        with serve(engine) as client:
            wrapped.gate.clear()
            connection = open_request(str(client.base_url), ask("Hi", 3, stream=True))
            read_until(connection, b'event: ping\ndata: {"type":"ping"}\n\n', times=3)
            wrapped.gate.set()
            rest = read_until(connection, b"event: message_stop")
            assert rest.count(b"event: message_start") == 1
            connection.close()

    def test_a_client_that_leaves_before_the_first_token_is_noticed_at_once(
        self, make_engine: MakeEngine, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("serve.server.answer.PING_SECONDS", 3600.0)
        engine = make_engine()
        wrapped = Wrapped(engine)
        with serve(engine) as client:
            wrapped.gate.clear()
            for number, streaming in ((1, True), (2, False)):
                connection = open_request(str(client.base_url), ask("Hi", 3, stream=streaming))
                eventually(
                    lambda n=number: engine.submitted == n and wrapped.entered > 0, "it is there, a step under way"
                )
                connection.close()
                eventually(lambda n=number: n in engine.inbox.cancellations, "it is cancelled")
            wrapped.gate.set()
            eventually(lambda: is_idle(client), "nothing runs")
            assert engine.counters.requests == 0


class TestAClientThatIsGone:
    @pytest.mark.parametrize("phase", ["head", "body", "rendering", "queue", "prefill", "answer"])
    def test_in_each_phase_it_leaves_nothing_behind_and_no_trace(
        self,
        phase: str,
        make_engine: MakeEngine,
        serve: Any,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        engine = make_engine()
        wrapped, rendering = Wrapped(engine), threading.Event()
        body = ask("Hello, and " * 10, 400, stream=True)
        with serve(engine) as client, ThreadPoolExecutor(2) as pool:
            expected = text_of(post(client, ask("Say something")))
            before = wrapped.entered
            if phase == "rendering":
                original = prepare_module.prompt

                def slow(*args: Any) -> Any:
                    rendering.set()
                    assert wrapped.gate.wait(20)
                    return original(*args)

                monkeypatch.setattr(prepare_module, "prompt", slow)
            if phase != "answer":
                wrapped.gate.clear()
            others = []
            if phase == "queue":  # of a batch of two
                others = [pool.submit(post, client, ask(f"Number {number}")) for number in range(2)]
                eventually(lambda: len(engine.running) + len(engine.inbox.submissions) == 2, "two are before it")
            if phase in ("head", "body"):
                connection = socket.create_connection((client.base_url.host, client.base_url.port))
                head = b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: 999\r\n"
                connection.sendall(head if phase == "head" else head + b'\r\n{"model"')
            else:
                connection = open_request(str(client.base_url), body)
            if phase == "rendering":
                assert rendering.wait(20)
            elif phase == "answer":
                read_until(connection, DELTA)
            elif phase in ("queue", "prefill"):
                eventually(lambda: engine.submitted == 2 + len(others) and wrapped.entered > before, "it is there")
            connection.close()
            wrapped.gate.set()
            assert all(text_of(other.result()) for other in others)
            assert text_of(post(client, ask("Say something"))) == expected
            eventually(lambda: is_idle(client), "nothing runs or waits, and no page is held")
            assert scrape(client)["tokenzero_failed_requests_total"] == 0
        engine.core.memory.prefix_cache.check()
        assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


class TestAClockThatIsSet:
    @pytest.mark.parametrize("days", [-1, 1])
    def test_a_day_forward_or_back_costs_no_answer_and_no_page(
        self, days: int, make_engine: MakeEngine, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def tiers() -> Tiers:
            return Tiers(str(tmp_path / "store"), 10**8, 0, 0.02, 10**8)

        old, new = ask("A question before. " * 10), ask("A question after. " * 10)
        with serve(make_engine(tiers=tiers())) as client:
            before = post(client, old)
            with monkeypatch.context() as clock:
                seconds, ns = time.time, time.time_ns
                clock.setattr(time, "time", lambda: seconds() + 86_400 * days)
                clock.setattr(time, "time_ns", lambda: ns() + 86_400 * days * 10**9)
                again, after = post(client, old), post(client, new)
                assert again["usage"]["cache_read_input_tokens"] == prompt_tokens(before["usage"]) - 1
                eventually(lambda: scrape(client)["tokenzero_write_queue_bytes"] == 0, "all is written")
            assert post(client, new)["usage"]["cache_read_input_tokens"] == prompt_tokens(after["usage"]) - 1
            figures = scrape(client)
            assert figures['tokenzero_tier_errors_total{tier="disk"}'] == 0
            assert figures['tokenzero_tier_evicted_total{tier="disk"}'] == 0
        with serve(make_engine(tiers=tiers())) as client:  # the next start finds what was written at either time
            for body, answer in ((old, before), (new, after)):
                found = post(client, body)
                assert text_of(found) == text_of(answer)
                assert found["usage"]["cache_read_by_tier"].get("disk", 0) > 0


class TestLeaving:
    @pytest.mark.parametrize("turns", range(8))
    def test_a_cancellation_is_not_lost_to_a_token_that_comes_at_the_same_time(self, turns: int) -> None:
        class OneToken:
            """An engine that samples one token at each request of the test, and no more."""

            cancelled: int | None = None

            def submit(self, request: Any, emit: Callable) -> int:
                self.emit = emit
                return 7

            def cancel(self, number: int) -> None:
                self.cancelled = number

        async def leave(engine: Any) -> bool:
            seen = []

            async def listen() -> None:
                async with aclosing(generate(engine, None, 60)) as events:
                    async for event in events:
                        seen.append(event)  # noqa: PERF401

            listening = asyncio.ensure_future(listen())
            for _ in range(5):
                await asyncio.sleep(0)
            engine.emit(TokenEvent(1))
            for _ in range(turns):
                await asyncio.sleep(0)
            listening.cancel()
            await asyncio.wait({listening}, timeout=1)
            return listening.cancelled()

        engine = OneToken()
        assert asyncio.run(leave(engine))
        assert engine.cancelled == 7


class TestTheServersOwnFaults:
    def test_a_fault_outside_the_engine_is_a_500_of_the_apis_form_that_is_counted(
        self, make_engine: MakeEngine, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*args: Any) -> None:
            raise KeyError("a fault of the test")

        with serve(make_engine()) as client:
            with monkeypatch.context() as patch:
                patch.setattr("serve.server.prepare.prompt", broken)
                for path in ("/v1/messages", "/v1/messages/count_tokens"):
                    text = error_of(client.post(path, json=ask("Hi")), 500, "api_error")
                    assert "a fault of the test" in text
            samples = scrape(client)
            assert samples['tokenzero_http_responses_total{path="/v1/messages",status="500"}'] == 1
            assert samples['tokenzero_http_responses_total{path="/v1/messages/count_tokens",status="500"}'] == 1
            assert text_of(post(client, ask("Hi")))

    @pytest.mark.parametrize("path", ["/health", "/ready"])
    def test_health_and_ready_tell_when_the_engine_has_stopped(
        self, path: str, make_engine: MakeEngine, serve: Any
    ) -> None:
        engine = make_engine()
        with serve(engine) as client:
            assert client.get(path).status_code == 200
            engine.stop()
            response = client.get(path)
            assert (response.status_code, response.json()) == (503, {"status": "engine stopped"})

    def test_what_runs_when_the_engine_stops_ends_with_an_error(self, make_engine: MakeEngine, serve: Any) -> None:
        engine = make_engine()
        wrapped = Wrapped(engine)
        with serve(engine) as client, ThreadPoolExecutor(3) as pool:
            wrapped.gate.clear()
            first = pool.submit(client.post, "/v1/messages", json=ask("One"))
            eventually(lambda: wrapped.entered > 0, "a step is under way")
            second = pool.submit(client.post, "/v1/messages", json=ask("Two", stream=True))
            eventually(lambda: bool(engine.inbox.submissions), "another waits")
            stopping = pool.submit(engine.stop)
            eventually(lambda: engine.inbox.stopping, "it shall stop")
            wrapped.gate.set()
            stopping.result(30)
            for response in (first.result(), second.result()):
                assert "engine has stopped" in error_of(response, 529, "overloaded_error")


# Little is on its way to a client that does not read, as over a slow line: segments and receive buffer are small.
NARROW = (
    (socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536),
    (socket.SOL_SOCKET, socket.SO_RCVBUF, 2048),
)
DELTA = b"event: content_block_delta"


@pytest.fixture(scope="module")
def endless(server: Server) -> Json:
    """A streaming request whose answer has 4,000 tokens, more than the way to a client that does not read can hold."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        bodies = (ask(f"Talk without end, {number}", 4000) for number in range(4, 30))
        return next(body for body in bodies if post(client, body)["stop_reason"] == "max_tokens") | {"stream": True}


class TestManyClients:
    def test_a_full_queue_refuses_and_then_serves_all_that_it_took(self, model_folder: Path) -> None:
        with (
            running_server(model_folder, *FLAGS, "--max-num-seqs", "1", "--max-queue", "2") as server,
            httpx.Client(base_url=server.url, timeout=60) as client,
            ThreadPoolExecutor(2) as pool,
        ):
            running = open_request(server.url, ask(long(1), 1))
            eventually(lambda: scrape(client)["tokenzero_num_requests_running"] == 1, "one runs, and for long")
            queued = [pool.submit(post, client, ask(f"Number {number}")) for number in range(2)]
            eventually(lambda: scrape(client)["tokenzero_num_requests_waiting"] == 2, "the queue is full")
            for streaming in (False, True):
                response = client.post("/v1/messages", json=ask("One too many", stream=streaming))
                assert "2 requests are waiting" in error_of(response, 529, "overloaded_error")
                assert int(response.headers["retry-after"]) >= 1
            assert scrape(client)["tokenzero_num_requests_waiting"] == 2
            read_until(running, b'"output_tokens"')
            running.close()
            assert all(text_of(answer.result()) for answer in queued)
            assert text_of(post(client, ask("One too many")))
            eventually(lambda: is_idle(client), "nothing runs or waits, and no page is held")
            assert scrape(client)['tokenzero_http_responses_total{path="/v1/messages",status="529"}'] == 2


class TestClientsThatDoNotListen:
    def test_one_that_reads_nothing_delays_no_other_and_holds_no_page(
        self, client: httpx.Client, server: Server, endless: Json
    ) -> None:
        other = ask("Meanwhile, say something", 60)
        alone = stream(client, other).text

        deaf = open_request(server.url, endless, *NARROW)
        begun = read_until(deaf, DELTA)
        message = json.loads(begun.split(b"data: ")[1].split(b"\n")[0])["message"]["id"]

        def state() -> str:
            return client.get(f"/v1/requests/{message}").json().get("state", "running")

        assert stream(client, other).text == alone, "while both decode"
        eventually(lambda: is_idle(client), "the engine is done with it")
        assert state() == "running", "and its client has not got all of it"
        assert stream(client, other).text == alone, "while it has more to say than its client reads"
        assert state() == "running"

        rest = read_until(deaf, b"event: message_stop")
        assert b'"output_tokens":4000' in rest
        eventually(lambda: state() == "done", "its client has read all")
        deaf.close()

    def test_one_that_leaves_takes_no_token_from_those_beside_it(
        self, client: httpx.Client, server: Server, endless: Json
    ) -> None:
        others = [ask(long(number, 6000), 30) for number in (70, 71)]
        alone = [text_of(post(client, body, **{"x-tokenzero-cache-salt": "alone"})) for body in others]
        before = scrape(client)["tokenzero_generated_tokens_total"]

        leaving = open_request(server.url, endless)
        read_until(leaving, DELTA, times=3)
        with ThreadPoolExecutor(2) as pool:
            salted = [pool.submit(stream, client, body, **{"x-tokenzero-cache-salt": "beside"}) for body in others]
            eventually(lambda: scrape(client)["tokenzero_num_requests_running"] == 3, "all three run")
            leaving.close()
            eventually(
                lambda: scrape(client)["tokenzero_num_requests_running"] == 2, "one has left, and the others go on"
            )
            assert [answer.result().text for answer in salted] == alone
        eventually(lambda: is_idle(client), "no page is held")
        assert scrape(client)["tokenzero_generated_tokens_total"] - before < 4000
