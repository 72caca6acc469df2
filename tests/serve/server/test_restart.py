"""A server with a store: what it computed survives a restart and a kill -9; a store that breaks costs only hits."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys

import httpx
import pytest

from experiments.harness.client import scrape
from experiments.harness.server import running_server
from tests.helpers.http import FLAGS, ask, eventually, post, prompt_tokens, text_of

PAGE = int(FLAGS[FLAGS.index("--page-size") + 1])
TEXT = "a prompt of a few pages " * 60


def restored(message):
    """Tokens of an answer's prompt that came from disk."""
    return message["usage"]["cache_read_by_tier"].get("disk", 0)


def metric(client, name, tier="disk"):
    """A tier's figure on the metrics page."""
    page = client.get("/metrics").text
    return float(re.search(rf'^{name}\{{tier="{tier}"\}} (\S+)$', page, re.MULTILINE)[1])


def written(client):
    """Whether no page waits to be written."""
    return scrape(client)["tokenzero_write_queue_bytes"] == 0


def until_stored(client, message):
    """Return once the pages of an answer's prompt are on disk, and no page waits."""
    pages = prompt_tokens(message["usage"]) // PAGE
    eventually(lambda: metric(client, "tokenzero_tier_pages") >= pages, "the pages are on disk")
    eventually(lambda: written(client), "nothing waits to be written")


def serving(folder, store, log):
    return running_server(folder, *FLAGS, "--store", str(store), "--flush-seconds", "0.2", log=log)


def test_a_prompt_that_was_computed_and_not_answered_is_read_from_the_store(model_folder, tmp_path):
    with (
        serving(model_folder, tmp_path / "store", tmp_path / "log") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        warmed = post(client, ask(TEXT, 0))["usage"]
    with (
        serving(model_folder, tmp_path / "store", tmp_path / "log") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        again = post(client, ask(TEXT))
        assert restored(again) == again["usage"]["cache_read_input_tokens"]
        assert restored(again) > 0.9 * prompt_tokens(warmed)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_ended_answers_the_same_from_its_store(model_folder, tmp_path, end):
    with serving(model_folder, tmp_path / "store", tmp_path / "log") as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            first = post(client, ask(TEXT))
            if end == signal.SIGKILL:  # the time that a killed server may lose
                until_stored(client, first)
        server.process.send_signal(end)
        server.process.wait(30)
    with (
        serving(model_folder, tmp_path / "store", tmp_path / "log") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        again = post(client, ask(TEXT))
        assert text_of(again) == text_of(first)
        usage = again["usage"]
        assert restored(again) == usage["cache_read_input_tokens"]
        # All but what a page and the last token take.
        assert restored(again) > (usage["cache_creation_input_tokens"] + usage["input_tokens"]) * 10
        assert metric(client, "tokenzero_restored_tokens_total") == restored(again)
        assert metric(client, "tokenzero_restore_seconds_count") > 0


def test_a_server_on_two_devices_that_was_killed_is_followed_by_one_on_one(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    flags = (*FLAGS, "--store", str(tmp_path / "store"), "--flush-seconds", "0.2")
    answers = []
    for devices in (2, 1):
        with (
            running_server(model_folder, *flags, "--tp", str(devices), log=tmp_path / "log") as server,
            httpx.Client(base_url=server.url, timeout=60) as client,
        ):
            answers += [post(client, ask(TEXT)), post(client, ask(TEXT))]
            assert client.get("/health").json()["tp"] == devices
            assert scrape(client)["tokenzero_tensor_parallel_devices"] == devices
            until_stored(client, answers[-1])
            server.process.kill()
            server.process.wait(30)
    assert len(set(map(text_of, answers))) == 1
    cold, warm, read, _ = (answer["usage"]["cache_read_input_tokens"] for answer in answers)
    assert cold < warm == read == restored(answers[2])


def test_a_store_that_vanishes_under_the_server_costs_hits_and_one_warning(model_folder, tmp_path):
    store, log = tmp_path / "store", tmp_path / "log"
    with serving(model_folder, store, log) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        first = post(client, ask(TEXT))
        eventually(lambda: metric(client, "tokenzero_tier_pages") > 5, "the pages are on disk")
        shutil.rmtree(store)
        assert text_of(post(client, ask(TEXT))) == text_of(first)
        for number in range(3):
            post(client, ask(f"{number} {TEXT}"))
            eventually(lambda: written(client), "nothing waits to be written")
        assert metric(client, "tokenzero_tier_errors_total") > 0
    assert "Traceback" not in log.read_text()
    # The environments of pages, sampled turns and tokenised segments, each with its path.
    warned = re.findall(r"(\S+): \w+ fails, going on without", log.read_text())
    assert all(path.startswith(str(store)) for path in warned)
    assert 1 <= len(set(warned)) == len(warned) <= 3


def test_a_directory_of_another_program_is_refused_and_left_as_it_was(model_folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("dear reader")
    command = [sys.executable, "-m", "serve", "--model", str(model_folder), *FLAGS, "--store", str(other)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode != 0
    assert str(other) in ended.stderr
    assert "letter.txt" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert [path.name for path in other.iterdir()] == ["letter.txt"]
