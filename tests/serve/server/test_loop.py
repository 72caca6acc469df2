"""The event loop is never blocked, by no request and no disk: other threads do what may take long.

How long it stands still in figures is measured by `experiments.bench.loop_lag`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jax.numpy as jnp
import pytest

import serve.formats.readers
import serve.formats.stream
import serve.server.app
import serve.server.counts
import serve.server.prepare
from model import checkpoint
from model.kernels.dispatch import arranged
from serve.diagnosis.divergence import Divergences
from serve.prompt.tokenizer import Tokenizer
from serve.server.context import ServerContext
from serve.server.heartbeat import PERIOD_SECONDS, heartbeat
from serve.server.metrics import EngineCollector
from tests.helpers.http import ask, eventually, post
from tests.helpers.scripted_server import context_over, listening


@pytest.fixture(scope="module")
def context(model_folder: Path, tokenizer: Tokenizer) -> ServerContext:
    """What serves the tiny model in this process."""
    config, params = checkpoint.load(model_folder, jnp.dtype("float32"))
    return context_over((config, arranged(params, 16)), tokenizer)[1]


@pytest.fixture(scope="module")
def url(context: ServerContext) -> Iterator[str]:
    """Where it listens."""
    with listening(context) as url:
        yield url


class Held:
    """A function that waits until it is let go; it may be asked from any thread."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.reached, self.let_go = threading.Event(), threading.Event()

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Say that it was reached, wait, and do what it is for."""
        self.reached.set()
        assert self.let_go.wait(30)
        return self.function(*args, **options)


def posted(path: str, **more: Any) -> Callable[[httpx.Client], httpx.Response]:
    return lambda client: client.post(path, json=ask("Hi", 1) | more)


def got(path: str) -> Callable[[httpx.Client], httpx.Response]:
    return lambda client: client.get(path)


@pytest.mark.parametrize(
    ("owner", "name", "send"),
    [
        (EngineCollector, "collect", got("/metrics")),
        (Divergences, "latest", got("/v1/requests")),
        (Divergences, "find_report", got("/v1/requests/msg_1")),
        (serve.server.app, "read_messages", posted("/v1/messages")),
        (serve.server.counts, "decode_count_tokens", posted("/v1/messages/count_tokens")),
        (serve.server.prepare, "prompt", posted("/v1/messages")),
        (serve.server.prepare, "prompt", posted("/v1/messages/count_tokens")),
        (serve.server.prepare, "Stops", posted("/v1/messages", stop_sequences=["END"])),
        (Divergences, "started", posted("/v1/messages")),
    ],
)
def test_others_are_answered_while_a_step_takes_long(
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    send: Callable[[httpx.Client], httpx.Response],
) -> None:
    if name == "read_messages":  # the routes hold it since the application was made
        owner, name = serve.server.app, "decode_request"
    held = Held(getattr(owner, name))
    # A plain function, so that a method gets its object.
    monkeypatch.setattr(owner, name, lambda *args, **options: held(*args, **options))
    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(send, client)
        try:
            assert held.reached.wait(30)
            assert httpx.get(f"{url}/health", timeout=20).status_code == 200
            assert not answer.done()
        finally:
            held.let_go.set()
        assert answer.result(30).status_code in (200, 404)


def test_a_long_call_is_read_by_another_thread(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = {
        "name": "t",
        "input_schema": {
            "type": "object",
            "properties": {"a": {"const": "x" * 60}},
            "required": ["a"],
            "additionalProperties": False,
        },
    }
    made, threads = serve.formats.readers.new_id, []

    def noted(*args: Any) -> Any:
        threads.append(threading.current_thread().name)
        return made(*args)

    monkeypatch.setattr(serve.formats.readers, "new_id", noted)
    with httpx.Client(base_url=url, timeout=60) as client:
        one = {"type": "any", "disable_parallel_tool_use": True}
        for chars, aside in ((10**9, False), (10, True)):
            threads.clear()
            monkeypatch.setattr(serve.formats.stream, "HEAVY_CHARS", chars)
            answer = post(client, ask("Call.", 200, tools=[tool], tool_choice=one))
            assert [block["input"] for block in answer["content"]] == [{"a": "x" * 60}]
            assert ("AnyIO" in threads[0]) is aside


def test_the_heartbeat_tells_how_long_the_loop_stood_still() -> None:
    late: list[float] = []
    go_on = threading.Event()

    async def stand_still() -> None:
        async with heartbeat(late.append):
            while not late:
                await asyncio.sleep(0)
            before = len(late)
            threading.Timer(10 * PERIOD_SECONDS, go_on.set).start()
            assert go_on.wait(30)  # on the loop
            while len(late) == before:
                await asyncio.sleep(0)

    asyncio.run(stand_still())
    assert max(late) >= 8 * PERIOD_SECONDS


def test_the_lag_is_among_the_metrics(url: str) -> None:
    def beats() -> float:
        page = httpx.get(f"{url}/metrics").text
        return float(page.partition("tokenzero_loop_lag_seconds_count ")[2].partition("\n")[0])

    before = beats()
    eventually(lambda: beats() > before, "the loop beats")
