"""Where a request's time goes: in the answer's `Server-Timing` header, in the metrics and in its status."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import jax.numpy as jnp
import pytest

from experiments.harness.client import scrape
from experiments.harness.server import Server
from model import checkpoint
from model.kernels.dispatch import arranged
from serve.prompt.tokenizer import Tokenizer
from serve.proxy.app import create_proxy
from serve.proxy.upstream import parse_upstream
from serve.rules.normalize import DEFAULT_RULES
from serve.web.timing import Phases
from tests.helpers.http import Json, ask, eventually, is_idle, long, open_request, read_until
from tests.helpers.scripted_server import answering, context_over, listening

CHATS = ("/v1/messages", "/v1/chat/completions", "/v1/responses")
COUNTED = ("decode", "normalize", "recall", "render")
HOST = (*COUNTED, "constrain")
FIRST = (*HOST, "queue", "prefill")  # all that happens before the first token is handed on
WHOLE = (*FIRST, "trace", "generate")
SLOW_SECONDS = 0.05


def asked(path: str, text: str, **more: object) -> Json:
    """A greedy request to one of the three APIs, for an answer of 8 tokens at most."""
    if path == "/v1/responses":
        return {"model": "any", "input": text, "max_output_tokens": 8, "temperature": 0} | more
    return ask(text) | more


def durations(headers: httpx.Headers) -> dict[str, float]:
    """What a Server-Timing header says, in milliseconds; asserts its form."""
    parts = [re.fullmatch(r"([a-z]+);dur=(\d+\.\d+)", part) for part in headers["server-timing"].split(", ")]
    assert all(parts), headers["server-timing"]
    taken = [(part[1], float(part[2])) for part in parts if part]
    assert len(dict(taken)) == len(taken), "each is there once"
    return dict(taken)


def add_up(taken: dict[str, float], wall_s: float) -> bool:
    """Whether the phases fit into the total, and the total into what the client waited."""
    return sum(taken.values()) - taken["total"] <= taken["total"] <= 1e3 * wall_s


class TestHeader:
    @pytest.mark.parametrize("path", CHATS)
    def test_a_whole_answer_tells_every_phase(self, path: str, client: httpx.Client) -> None:
        start = time.perf_counter()
        response = client.post(path, json=asked(path, "Whole?"))
        wall_s = time.perf_counter() - start
        taken = durations(response.headers)
        assert tuple(taken) == (*WHOLE, "total")
        assert add_up(taken, wall_s)
        assert taken["prefill"] > 0 < taken["generate"]

    @pytest.mark.parametrize("path", CHATS)
    def test_a_stream_tells_the_phases_before_its_first_token(self, path: str, client: httpx.Client) -> None:
        start = time.perf_counter()
        with client.stream("POST", path, json=asked(path, "Streamed?", stream=True)) as response:
            wall_s = time.perf_counter() - start
            assert response.headers["content-type"].startswith("text/event-stream")
            response.read()
        taken = durations(response.headers)
        assert tuple(taken) == (*FIRST, "total")
        assert add_up(taken, wall_s)

    def test_who_asks_for_diagnostics_waits_for_the_report(self, client: httpx.Client) -> None:
        body = ask("Why?", stream=True) | {"diagnostics": {"previous_message_id": "msg_0"}}
        with client.stream("POST", "/v1/messages", json=body) as response:
            response.read()
        assert tuple(durations(response.headers)) == (*FIRST, "trace", "total")

    def test_a_count_of_tokens_tells_the_phases_that_it_has(self, client: httpx.Client) -> None:
        start = time.perf_counter()
        response = client.post("/v1/messages/count_tokens", json=ask("How long?"))
        wall_s = time.perf_counter() - start
        taken = durations(response.headers)
        assert tuple(taken) == (*COUNTED, "total")
        assert add_up(taken, wall_s)

    def test_a_refusal_tells_none(self, client: httpx.Client) -> None:
        response = client.post("/v1/messages", json=ask("Refused?", max_tokens=-1))
        assert response.status_code == 400
        assert "server-timing" not in response.headers

    @pytest.mark.parametrize("stream", [False, True])
    def test_the_proxy_adds_what_its_rules_took(self, stream: bool, server: Server, client: httpx.Client) -> None:
        app = create_proxy([parse_upstream(server.url, DEFAULT_RULES, 30)], DEFAULT_RULES)
        with answering(app) as url, httpx.Client(base_url=url, timeout=60) as through:
            response = through.post("/v1/messages", json=ask("Proxied?", stream=stream))
        assert tuple(durations(response.headers)) == (*(FIRST if stream else WHOLE), "total", "proxy")


@pytest.fixture(scope="module")
def slow(model_folder: Path, tokenizer: Tokenizer) -> Iterator[httpx.Client]:
    """A client of a server in this process whose constraints take their time."""
    config, params = checkpoint.load(model_folder, jnp.dtype("float32"))
    _, context = context_over((config, arranged(params, 16)), tokenizer, lambda *_: time.sleep(SLOW_SECONDS))
    with listening(context) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client
        eventually(lambda: is_idle(client), "nothing runs or waits")


class TestAttribution:
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_slow_phase_has_its_own_name_and_no_other_has_its_time(self, stream: bool, slow: httpx.Client) -> None:
        taken = durations(slow.post("/v1/messages", json=ask("Slow?", stream=stream)).headers)
        assert taken["constrain"] >= 1e3 * SLOW_SECONDS
        others = sum(taken.values()) - taken["total"] - taken["constrain"]
        assert others <= taken["total"] - 1e3 * SLOW_SECONDS

    def test_a_ping_comes_before_the_engine_has_reported_its_phases(
        self, slow: httpx.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("serve.server.answer.PING_SECONDS", 0.001)
        streamed = slow.post("/v1/messages", json=ask(long(1, 4_000), stream=True))
        assert streamed.text.startswith("event: ping")
        assert tuple(durations(streamed.headers)) == (*HOST, "total")
        whole = slow.post("/v1/messages", json=ask(long(2, 4_000)))
        assert tuple(durations(whole.headers)) == (*WHOLE, "total"), "its header is written at the end"


class TestMetrics:
    def test_every_answer_counts_once_in_each_phase_and_its_tokens_in_the_itl(self, client: httpx.Client) -> None:
        before = scrape(client)
        answers = [client.post("/v1/messages", json=ask(f"Counted {number}?", max_tokens=6)) for number in range(3)]
        client.post("/v1/messages", json=ask("Refused?", max_tokens=-1))
        after = scrape(client)

        def moved(name: str) -> float:
            return after[name] - before.get(name, 0)

        timed = [durations(answer.headers) for answer in answers]
        for phase in WHOLE:
            labels = f'{{phase="{phase}"}}'
            assert moved(f"tokenzero_phase_seconds_count{labels}") == 3
            seconds = moved(f"tokenzero_phase_seconds_sum{labels}")
            assert 1e3 * seconds == pytest.approx(sum(taken[phase] for taken in timed), abs=0.002)
        sampled = sum(answer.json()["usage"]["output_tokens"] for answer in answers)
        assert all(answer.json()["stop_reason"] == "max_tokens" for answer in answers), "no token is a stop id"
        assert moved("tokenzero_itl_seconds_count") == sampled - 3
        # The report is made between two tokens.
        generated = sum(moved(f'tokenzero_phase_seconds_sum{{phase="{phase}"}}') for phase in ("trace", "generate"))
        assert 0 < moved("tokenzero_itl_seconds_sum") <= generated


class TestStatus:
    def test_a_status_has_the_phases_of_the_header(self, client: httpx.Client) -> None:
        answer = client.post("/v1/messages", json=ask("A status?"))
        taken = durations(answer.headers)
        del taken["total"]
        assert client.get(f"/v1/requests/{answer.json()['id']}").json()["phases_ms"] == taken

    def test_the_status_of_an_aborted_request_has_the_phases_that_ended(self, client: httpx.Client) -> None:
        with open_request(str(client.base_url), ask("Broken?", max_tokens=10_000, stream=True)) as connection:
            head = read_until(connection, b"content_block_delta")
            path = f"/v1/requests/{re.search(rb'msg_[0-9a-f]+', head)[0].decode()}"  # type: ignore[index]
            eventually(lambda: client.get(path).status_code == 200, "there is a report")
        eventually(lambda: client.get(path).json()["state"] == "aborted", "the request is over")
        assert tuple(client.get(path).json()["phases_ms"]) == (*FIRST, "trace")


def test_a_phase_that_raises_is_not_recorded() -> None:
    phases = Phases()
    with pytest.raises(ValueError, match="spoilt"), phases.timed("decode"):
        raise ValueError("spoilt")
    with phases.timed("render"):
        pass
    assert phases.ms().keys() == {"render"}
