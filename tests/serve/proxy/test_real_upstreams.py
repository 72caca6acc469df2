"""Real engines behind the proxy: sessions stay where they are warm, and go on where one engine is killed."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from experiments.bench.upstreams import engines, figures, proxy_before, round_robin, run
from experiments.harness import llama_server
from experiments.harness.server import Server

SESSIONS, TURNS, SCALE = 3, 3, 0.01
FLAGS = ("--max-model-len", "16384", "--kv-pool-bytes", "64MiB", "--page-size", "16", "--max-num-seqs", "4")

pytestmark = pytest.mark.slow
Engines = tuple[list[Server], Server]


@pytest.fixture
def started(model_folder: Path) -> Iterator[Engines]:
    """Two engines, and the proxy before them."""
    with engines(["ours", "ours"], model_folder, FLAGS) as servers, proxy_before(servers, model_folder) as proxy:
        yield servers, proxy


def test_sessions_stay_warm_and_go_on_at_the_other_engine_when_one_is_killed(started: Engines) -> None:
    servers, proxy = started
    outcomes = (
        run(round_robin(servers), 1000, SESSIONS, TURNS, SCALE),
        run(lambda: proxy.url, 2000, SESSIONS, TURNS, SCALE),
    )
    assert not [failure for outcome in outcomes for failure in outcome.failures]
    spread, routed = (figures("", outcome) for outcome in outcomes)
    assert routed["cached_share"] > spread["cached_share"] + 0.1
    assert routed["cached_share_subagents"] > spread["cached_share_subagents"]

    half = threading.Event()

    def kill() -> None:
        assert half.wait(120)
        servers[0].process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = run(lambda: proxy.url, 3000, SESSIONS, TURNS, SCALE, half)
    killer.join()
    # One that breaks off after its first token ends with an error event; any other goes to the other engine.
    assert not [failure for failure in outcome.failures if failure[:3].isdigit()]
    assert len(outcome.failures) <= SESSIONS
    states = httpx.get(f"{proxy.url}/health").json()["upstreams"]
    assert [states[server.url] for server in servers] == ["out", "up"]


@pytest.mark.skipif(bool(llama_server.missing()), reason="needs the foreign extra")
def test_an_engine_that_is_not_ours_shares_the_work_with_one_that_is(model_folder: Path) -> None:
    with engines(["ours", "llama.cpp"], model_folder, FLAGS) as servers, proxy_before(servers, model_folder) as proxy:
        spread = figures("", run(round_robin(servers), 1000, 2, TURNS, SCALE))
        outcome = run(lambda: proxy.url, 2000, 2, TURNS, SCALE)
        assert not outcome.failures
        assert figures("", outcome)["cached_share"] > spread["cached_share"]
        page = httpx.get(f"{proxy.url}/metrics").text
        assert re.findall(r"^tokenzero_proxy_in_flight\S* (\d+)$", page, re.M) == ["0", "0"]
        assert set(httpx.get(f"{proxy.url}/health").json()["upstreams"].values()) == {"up"}
