"""What an operator pins, and what clients asked to keep, after a server has ended in order or was killed."""

from __future__ import annotations

import json
import signal
import time
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from experiments.harness.client import scrape
from experiments.harness.server import Server, running_server
from tests.helpers.http import FLAGS, Json, ask, eventually, long, post
from tests.serve.server.test_cache_contract import PAGE, SMALL, SYSTEM, asking, press, read, seconds_left, told

CAPTURED = "A captured request whose instructions are named on the command line. " * 8


def serving(model: Path, folder: Path, *flags: str) -> AbstractContextManager[Server]:
    """A server with a store that is written soon."""
    store = ("--store", str(folder / "store"), "--flush-seconds", "0.1")
    return running_server(model, *FLAGS, *SMALL, *store, *flags, log=folder / "log")


def stored(client: httpx.Client) -> bool:
    return scrape(client)["tokenzero_write_queue_bytes"] == 0


def pinned(client: httpx.Client) -> dict[str, Json]:
    return {pin["name"]: pin for pin in client.get("/v1/cache/pins").json()["data"]}


@pytest.mark.parametrize("end", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_pins_and_promises_last_over_a_restart(model_folder: Path, tmp_path: Path, end: signal.Signals) -> None:
    captured = tmp_path / "captured.json"
    captured.write_text(json.dumps({"body": ask("What was asked then.", system=CAPTURED)}))
    flags, text = ("--pin", str(captured)), long(70, 600)
    with (
        serving(model_folder, tmp_path, *flags) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        made = client.post("/v1/cache/pin", json={"system": SYSTEM, "name": "house"}).json()
        assert (made["pinned"], made["over_restarts"]) == (True, True)
        assert set(pinned(client)) == {"captured", "house"}
        (promised,) = told(post(client, asking(text, "1h")))
        time.sleep(1.0)
        eventually(lambda: stored(client), "nothing waits to be written")
        server.process.send_signal(end)
        server.process.wait(30)
    with (
        serving(model_folder, tmp_path, *flags) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        after = pinned(client)
        assert after["house"] == made
        assert after["captured"]["pinned"]
        press(client, 10)
        again = post(client, ask(text, 1))
        assert read(again) >= promised["tokens"], "kept though others needed room"
        assert again["usage"]["cache_read_by_tier"]["disk"] > promised["tokens"] - PAGE
        assert scrape(client)['tokenzero_preload_pages_total{event="taken"}'] * PAGE >= promised["tokens"]
        press(client, 20)
        (kept,) = told(post(client, asking(text, "10m")))
        assert read(post(client, ask(text, 1))) >= promised["tokens"]
        assert seconds_left(kept) > 3500, "the hour that was promised first"
        for system in (SYSTEM, CAPTURED):
            answer = post(client, ask("A question.", 1, system=system))["usage"]
            assert answer["cache_read_by_tier"]["device"] > 200
        client.delete("/v1/cache/pins/house")
    if end == signal.SIGKILL:
        return
    with (
        serving(model_folder, tmp_path) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        assert pinned(client) == {}, "one was dropped, the other is not named any more"
