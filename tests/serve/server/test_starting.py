"""A server that starts, and one that stops: what answers before it is ready, what it loads, and how it ends."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from experiments.harness.client import scrape
from experiments.harness.server import free_port, running_server
from serve.server import starting
from serve.server.progress import StartProgress
from serve.server.starting import StartingApp
from tests.helpers.http import FLAGS, ask, ask_for_long, eventually

# Installed here, and of no use to a server.
LEFT_OUT = ("torch", "orbax", "tensorstore", "matplotlib")
TOOL = {"name": "look", "description": "Looks.", "input_schema": {"type": "object", "properties": {}}}


@contextmanager
def starting_server(model: Path, log: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server process that has just been made, and its URL."""
    port = free_port()
    command = [sys.executable, "-m", "serve", "--model", str(model), "--port", str(port), *flags]
    with log.open("w") as output:
        # What a shell runs in the background ignores Ctrl-C, and so do its children; a handler ends with exec.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        finally:
            signal.signal(signal.SIGINT, before)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


def get(url: str) -> httpx.Response:
    """What a URL answers, once the port is open."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return httpx.get(url, timeout=5)
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


class TestBeforeAServerIsReady:
    def test_it_is_alive_and_says_what_it_does_and_a_request_waits_for_its_answer(
        self, model_folder: Path, tmp_path: Path
    ) -> None:
        with starting_server(model_folder, tmp_path / "log", *FLAGS) as (url, _):
            health, ready = get(f"{url}/health"), get(f"{url}/ready/")
            answer = httpx.post(f"{url}/v1/messages", json=ask("Hello"), timeout=120)
            later = get(f"{url}/ready")
        assert (health.status_code, health.json()) == (200, {"status": "starting"})
        assert ready.status_code == 503
        assert ready.headers["retry-after"] == "1"
        assert ready.json()["status"] == "starting"
        assert all(phase["seconds"] >= 0 for phase in ready.json()["phases"])
        assert answer.status_code == 200
        assert later.status_code == 200
        assert later.json()["status"] == "ready"
        assert later.json()["compiled"] <= later.json()["shapes"]
        assert "ready after" in (tmp_path / "log").read_text()

    @pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
    def test_it_can_be_stopped_at_once_and_without_a_trace(
        self, number: signal.Signals, status: int, model_folder: Path, tmp_path: Path
    ) -> None:
        with starting_server(model_folder, tmp_path / "log", *FLAGS) as (url, process):
            get(f"{url}/health")
            process.send_signal(number)
            ended = process.wait(10)
        log = (tmp_path / "log").read_text()
        loaded = "pages of" in log  # it was quicker than the signal
        assert ended == (0 if number == signal.SIGINT and loaded else status)
        assert "Traceback" not in log

    def test_weights_that_cannot_be_read_end_it_with_a_sentence(self, model_folder: Path, tmp_path: Path) -> None:
        broken = tmp_path / "broken"
        broken.mkdir()
        for path in model_folder.iterdir():
            content = path.read_bytes()
            (broken / path.name).write_bytes(content[:-9] if path.suffix == ".safetensors" else content)
        with starting_server(broken, tmp_path / "log", *FLAGS) as (_, process):
            assert process.wait(60) == 1
        log = (tmp_path / "log").read_text()
        assert f"tokenzero: {broken / 'model.safetensors'}" in log
        assert "is not a whole safetensors file" in log
        assert "Traceback" not in log

    def test_a_port_that_is_taken_ends_it_at_once(self, model_folder: Path, tmp_path: Path) -> None:
        with starting_server(model_folder, tmp_path / "log", *FLAGS) as (url, _):
            get(f"{url}/health")
            port = url.rpartition(":")[2]
            again = [sys.executable, "-m", "serve", "--model", str(model_folder), *FLAGS, "--port", port]
            ended = subprocess.run(again, capture_output=True, text=True, timeout=60)
        assert ended.returncode not in (0, -signal.SIGABRT, -signal.SIGSEGV)
        assert "address already in use" in ended.stderr
        assert "Traceback" not in ended.stderr


class TestWhatAServerLoads:
    def test_it_imports_no_torch_and_no_orbax_and_a_first_request_imports_nothing_more(
        self, model_folder: Path, tmp_path: Path
    ) -> None:
        log = tmp_path / "log"
        program = ("-X", "importtime", "-m", "serve")
        with running_server(model_folder, *FLAGS, log=log, program=program) as server:
            before = imported(log)
            body = ask("Hello", tools=[TOOL], tool_choice={"type": "any"})
            answers = [httpx.post(f"{server.url}/v1/messages", json=body | {"stream": s}) for s in (False, True)]
            after = imported(log)
        assert [answer.status_code for answer in answers] == [200, 200]
        assert {"jax", "transformers", "llguidance", "serve.server.app"} <= before
        assert not {name for name in after if name.partition(".")[0] in LEFT_OUT}
        assert not {name for name in after - before if not name.startswith("encodings")}


def imported(log: Path) -> set[str]:
    """The modules that a server with `-X importtime` has imported so far, from its log."""
    return set(re.findall(r"^import time: .*\| +([\w.]+)$", log.read_text(), re.MULTILINE))


class TestTheApplicationBeforeTheServers:
    """With a load that the test ends when it likes."""

    @pytest.fixture
    def loading(self) -> Future[Starlette]:
        return Future()

    @staticmethod
    async def status_of(app: StartingApp, path: str) -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path)

    def test_requests_that_wait_are_served_once_it_is_live(self, loading: Future[Starlette]) -> None:
        lived = []

        async def hello(request: Request) -> PlainTextResponse:
            return PlainTextResponse("served")

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            lived.append("started")
            yield
            lived.append("stopped")

        async def run() -> tuple[list[httpx.Response], httpx.Response]:
            app = StartingApp(loading, StartProgress(), lambda: False)
            async with app.lifespan(app):
                waiting = [asyncio.create_task(self.status_of(app, "/hello")) for _ in range(3)]
                early = await self.status_of(app, "/ready")
                assert not any(task.done() for task in waiting)
                loading.set_result(Starlette(routes=[Route("/hello", hello)], lifespan=lifespan))
                return [await task for task in waiting], early

        served, early = asyncio.run(run())
        assert [response.text for response in served] == ["served"] * 3
        assert early.status_code == 503
        assert lived == ["started", "stopped"]

    @pytest.mark.parametrize("stops", [True, False])
    def test_a_request_is_refused_with_a_time_to_try_again_when_the_server_stops_or_takes_too_long(
        self, stops: bool, loading: Future[Starlette], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(starting, "WAIT_SECONDS", 60.0 if stops else 0.1)
        app = StartingApp(loading, StartProgress(), lambda: stops)
        response = asyncio.run(self.status_of(app, "/v1/messages"))
        assert response.status_code == 503
        assert response.headers["retry-after"] == "5"
        assert response.json()["type"] == "error"
        assert "the server is starting" in response.json()["error"]["message"]

    def test_an_application_that_cannot_be_started_ends_the_server(self, loading: Future[Starlette]) -> None:
        stopped: list[str] = []

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            raise RuntimeError("can't start new thread")
            yield

        async def run() -> httpx.Response:
            app = StartingApp(loading, StartProgress(), lambda: bool(stopped), lambda: stopped.append(str(app.failure)))
            async with app.lifespan(app):
                loading.set_result(Starlette(lifespan=lifespan))
                return await self.status_of(app, "/hello")

        assert asyncio.run(run()).status_code == 503
        assert stopped == ["can't start new thread"]

    def test_ready_names_the_phases_under_way_and_what_each_has_done(self, loading: Future[Starlette]) -> None:
        progress = StartProgress()
        app = StartingApp(loading, progress, lambda: False)
        with progress.phase("imports"):
            pass
        with progress.phase("weights") as on_progress:
            on_progress(3, 12)
            report = asyncio.run(self.status_of(app, "/ready")).json()
        assert [phase["phase"] for phase in report["phases"]] == ["weights"]
        assert (report["phases"][0]["done"], report["phases"][0]["total"]) == (3, 12)
        assert re.fullmatch(r"[\d.]+ s \(imports [\d.]+, weights [\d.]+\)", progress.summary())


class TestTheApplicationThatStops:
    """With requests that end when the test likes; the application says what of the server's end it has seen."""

    @staticmethod
    async def stopped(seconds: float, answered: bool) -> tuple[httpx.Response, httpx.Response, list[str]]:
        """Stop a server with a request under way that is `answered` in time, or else when its application ends."""
        end, seen, loading = asyncio.Event(), list[str](), Future[Starlette]()

        async def ask(request: Request) -> PlainTextResponse:
            if request.scope["stopping"]:
                return PlainTextResponse("refused", 529)
            await end.wait()
            seen.append("answered")
            return PlainTextResponse("done")

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            yield
            seen.append("ended")
            end.set()

        app = StartingApp(loading, StartProgress(), lambda: False, lambda: seen.append("stopped"), seconds)
        loading.set_result(Starlette(routes=[Route("/ask", ask, methods=["POST"])], lifespan=lifespan))
        transport = httpx.ASGITransport(app)
        async with app.lifespan(app), httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            while app.live is None:
                await asyncio.sleep(0.001)
            waiting = asyncio.create_task(client.post("/ask"))
            while not app.answering:
                await asyncio.sleep(0.001)
            app.draining = True
            late = await client.post("/ask")
            if answered:
                end.set()
            first = await waiting
            while seen[-1] != "stopped":
                await asyncio.sleep(0.001)
        return first, late, seen

    def test_an_answer_under_way_ends_and_then_the_server(self) -> None:
        first, late, seen = asyncio.run(self.stopped(60.0, answered=True))
        assert (first.text, late.status_code) == ("done", 529)
        assert seen == ["answered", "ended", "stopped"]

    def test_an_answer_that_takes_too_long_ends_with_the_application(self) -> None:
        first, _, seen = asyncio.run(self.stopped(0.05, answered=False))
        assert first.text == "done"
        assert seen == ["ended", "answered", "stopped"]


class TestAServerThatIsTold:
    def test_it_refuses_what_is_new_ends_what_takes_too_long_in_order_and_exits_with_0(
        self, model_folder: Path, tmp_path: Path
    ) -> None:
        flags = (*FLAGS, "--shutdown-timeout", "1", "--store", str(tmp_path / "store"), "--log-format", "json")
        with (
            starting_server(model_folder, tmp_path / "log", *flags) as (url, process),
            httpx.Client(base_url=url, timeout=60) as client,
            ThreadPoolExecutor(3) as pool,
        ):
            get(f"{url}/health")
            client.post("/v1/messages", json=ask("Hello"))
            long = ask_for_long("Say")
            form = {"type": "json_schema", "json_schema": {"name": "x"} | long["output_config"]["format"]}
            streamed = [
                pool.submit(client.post, path, json=long | {"stream": True, "response_format": form})
                for path in ("/v1/messages", "/v1/chat/completions")
            ]
            whole = pool.submit(client.post, "/v1/messages", json=long)
            eventually(lambda: scrape(client)["tokenzero_num_requests_running"] == 3, "all three run")
            process.send_signal(signal.SIGTERM)
            eventually(lambda: client.get("/ready").status_code == 503, "it is not ready any more")
            refused = client.post("/v1/messages", json=ask("Late"), headers={"x-request-id": "late-1"})
            assert process.wait(20) == 0
            answers = [future.result() for future in (*streamed, whole)]
        assert refused.status_code == 529
        assert refused.headers["retry-after"]
        assert refused.json()["request_id"] == "late-1"
        assert [answer.status_code for answer in answers] == [200, 200, 529]
        assert answers[0].text.rstrip().rpartition("\n\n")[2].startswith("event: error\ndata: ")
        assert "server_is_overloaded" in answers[1].text.rstrip().rpartition("\n\n")[2]
        assert answers[2].json()["error"]["type"] == "overloaded_error"
        lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        by_id = {line["request_id"]: line for line in lines if line["logger"] == "tokenzero.requests"}
        assert by_id["late-1"]["status"] == 529
        assert {line["level"] for line in lines} <= {"info", "warning"}

    def test_the_second_interrupt_ends_it_at_once(self, model_folder: Path, tmp_path: Path) -> None:
        with (
            starting_server(model_folder, tmp_path / "log", *FLAGS) as (url, process),
            httpx.Client(base_url=url, timeout=60) as client,
            ThreadPoolExecutor(1) as pool,
        ):
            get(f"{url}/health")
            client.post("/v1/messages", json=ask("Hello"))
            running = pool.submit(client.post, "/v1/messages", json=ask_for_long("Say"))
            eventually(lambda: scrape(client)["tokenzero_num_requests_running"] == 1, "it runs")
            process.send_signal(signal.SIGINT)
            eventually(lambda: client.get("/ready").status_code == 503, "it is not ready any more")
            process.send_signal(signal.SIGINT)
            assert process.wait(5) == 130
            assert isinstance(running.exception(), httpx.TransportError)
        assert "Traceback" not in (tmp_path / "log").read_text()
