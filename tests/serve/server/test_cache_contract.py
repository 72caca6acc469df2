"""What a client may ask of the cache, on a real server: times, pins and priorities, and what is told back."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from experiments.harness.client import scrape
from experiments.harness.server import Server, running_server
from tests.helpers.http import FLAGS, Json, ask, error_of, eventually, is_idle, long, post

PAGE = int(FLAGS[FLAGS.index("--page-size") + 1])
SMALL = ("--max-model-len", "4096", "--kv-pool-bytes", "4MiB")  # 512 pages, 8192 tokens
OWNERS = ("alice", "bob", "carol", "dave", "erin", "ops")
SECRETS = {name: f"the key of {name}" for name in OWNERS}


def marked(text: str, ttl: str | None = None) -> Json:
    """A block of text with a marker."""
    return {"type": "text", "text": text, "cache_control": {"type": "ephemeral"} | ({"ttl": ttl} if ttl else {})}


def asking(text: str, ttl: str | None = None, **more: Any) -> Json:
    """A request that asks to keep all of its prompt."""
    return ask("", 1) | {"messages": [{"role": "user", "content": [marked(text, ttl)]}]} | more


def told(answer: Json) -> list[Json]:
    """What an answer says of its markers."""
    return answer["usage"]["retention"]


def read(answer: Json) -> int:
    """The tokens that an answer read from the cache."""
    return answer["usage"]["cache_read_input_tokens"]


def seconds_left(kept: Json) -> float:
    """From now until the end that was told."""
    return (
        datetime.strptime(kept["until"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC) - datetime.now(UTC)
    ).total_seconds()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("contract")
    hashes = {name: hashlib.sha256(secret.encode()).hexdigest() for name, secret in SECRETS.items()}
    options = {"ops": "admin", "bob": "priority=background"}
    path.joinpath("keys").write_text("\n".join(f"{n} sha256:{h} {options.get(n, '')}" for n, h in hashes.items()))
    return path


@pytest.fixture(scope="module")
def server(model_folder: Path, folder: Path) -> Iterator[Server]:
    """A server with six keys, each of which may keep 32 pages, and that pins 192."""
    flags = (*FLAGS, *SMALL, "--retain-bytes", "1.5MiB", "--api-key-file", str(folder / "keys"))
    with running_server(model_folder, *flags, log=folder / "log") as running:
        yield running
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture
def ops(server: Server) -> Iterator[httpx.Client]:
    """An admin's client."""
    with httpx.Client(base_url=server.url, timeout=60, headers={"x-api-key": SECRETS["ops"]}) as client:
        yield client
        eventually(lambda: is_idle(client), "nothing runs or waits")


def as_key(name: str) -> dict[str, str]:
    """The header of a request with this key."""
    return {"x-api-key": SECRETS[name]}


def press(client: httpx.Client, number: int) -> None:
    """Fill the pool with other prompts."""
    for each in range(3):
        post(client, ask(long(number + each, 3000), 1))


def test_a_retained_prefix_stays_while_others_are_evicted(ops: httpx.Client) -> None:
    kept, other = "kept " * 150, "other " * 150
    answer = post(ops, asking(kept, "1h"), **as_key("alice"))
    (retention,) = told(answer)
    assert retention["tier"] == "device"
    assert retention["instead"] is None
    assert 3500 < seconds_left(retention) <= 3601
    prompt = answer["usage"]["cache_creation_input_tokens"] + answer["usage"]["cache_read_input_tokens"] + 1
    assert retention["tokens"] == prompt // PAGE * PAGE
    post(ops, ask(other, 1), **as_key("alice"))
    press(ops, 10)
    assert read(post(ops, asking(kept, "1h"), **as_key("alice"))) >= retention["tokens"]
    assert read(post(ops, ask(other, 1), **as_key("alice"))) < 100, "the pressure evicted what nobody asked to keep"


def test_a_time_that_is_over_is_over(ops: httpx.Client) -> None:
    text = "short " * 150
    assert told(post(ops, asking(text, "1s"), **as_key("bob")))[0]["tokens"] > 0
    time.sleep(1.1)
    press(ops, 20)
    assert read(post(ops, ask(text, 1), **as_key("bob"))) < 100
    assert scrape(ops)['tokenzero_retentions_total{event="expired"}'] > 0


def test_new_tokens_are_counted_by_the_time_that_they_are_kept(ops: httpx.Client) -> None:
    system = [marked("You count what is kept. " * 10, "1h")]
    body = asking("a question " * 15, "5m", system=system)
    first, again = post(ops, body, **as_key("carol"))["usage"], post(ops, body, **as_key("carol"))["usage"]
    hour, five = first["retention"]
    made = first["cache_creation"]
    assert made["ephemeral_1h_input_tokens"] + first["cache_read_input_tokens"] == hour["tokens"]
    assert five["tokens"] - hour["tokens"] - made["ephemeral_5m_input_tokens"] in (0, 1), "the last is computed again"
    assert sum(made.values()) <= first["cache_creation_input_tokens"]
    assert again["cache_creation"] == {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0}
    assert "cache_creation" not in post(ops, ask("no marker", 1), **as_key("carol"))["usage"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cache_control": {"type": "ephemeral", "ttl": "a week"}}, "kept for 5m"),
        ({"cache_control": {"type": "ephemeral", "ttl": "9d"}}, "kept for 86400 s"),
        ({"cache_control": "yes"}, "cached as all prompts are"),
        ({"prompt_cache_retention": "for ever"}, "kept for 5m"),
        ({"nvext": {"cache_control": {"ttl": 7}}}, "kept for 5m"),
    ],
)
def test_what_cannot_be_honoured_is_told_with_what_was_done_instead(
    ops: httpx.Client, fields: Json, words: str
) -> None:
    (retention,) = told(post(ops, ask("What cannot be kept so long. " * 10, 1) | fields))
    assert words in retention["instead"]


def test_more_than_a_key_may_keep_costs_it_what_ends_first_and_other_keys_nothing(ops: httpx.Client) -> None:
    erin = as_key("erin")
    theirs = told(post(ops, asking(long(80, 200), "1h"), **erin))[0]
    mine = told(post(ops, asking(long(81, 200), "10m"), **as_key("dave")))[0]
    assert theirs["tokens"] == mine["tokens"] > 150
    for number in (82, 83):
        assert told(post(ops, asking(long(number, 200), "20m"), **as_key("dave")))[0]["tokens"] > 150
    assert "given up before" in told(post(ops, asking(long(81, 200), "10m"), **as_key("dave")))[0]["instead"]
    press(ops, 30)
    assert read(post(ops, asking(long(80, 200), "1h"), **erin)) >= theirs["tokens"], "no other key's"
    refused = told(post(ops, asking(long(84, 1500), "30m"), **as_key("dave")))[0]
    assert refused["tokens"] == 0
    assert "--retain-bytes" in refused["instead"]
    assert (refused["until"], refused["tier"]) == (None, None)


def test_openais_answers_tell_the_same(ops: httpx.Client) -> None:
    messages = [{"role": "user", "content": "keep this for a day " * 20}]
    body = {"messages": messages, "max_tokens": 1, "prompt_cache_retention": "24h"}
    (retention,) = ops.post("/v1/chat/completions", json=body).json()["usage"]["retention"]
    assert 86_000 < seconds_left(retention) <= 86_401
    body = {"input": messages, "max_output_tokens": 1, "prompt_cache_retention": "24h"}
    answer = ops.post("/v1/responses", json=body).json()
    assert answer["usage"]["retention"][0]["asked"] == "prompt_cache_retention"


def test_the_priority_that_counts_is_told(ops: httpx.Client) -> None:
    def priority(fields: Json, **headers: str) -> str | None:
        response = ops.post("/v1/messages", json=ask("urgent?", 1) | fields, headers=headers)
        assert response.status_code == 200
        return response.headers.get("x-tokenzero-priority")

    hints = {"nvext": {"agent_hints": {"priority": -1, "osl": 7}}}
    assert priority({}) is None
    assert priority(hints) == "background"
    assert priority({"service_tier": "flex"}) == "background"
    assert priority(hints, **{"x-tokenzero-priority": "interactive"}) == "interactive"
    assert priority({}, **{"x-tokenzero-priority": "at once"}) == "interactive"
    assert priority({}, **{"x-api-key": SECRETS["bob"], "x-tokenzero-priority": "interactive"}) == "background"
    response = ops.post("/v1/messages", json=ask("hints", 1) | hints)
    assert response.headers["x-tokenzero-unused-hints"] == "nvext.agent_hints.osl"


SYSTEM = "These are instructions that an operator wants on the device at all times. " * 8


def test_an_admin_pins_lists_and_drops(ops: httpx.Client) -> None:
    body = {"system": SYSTEM, "name": "house", "key": "alice"}
    assert "admin" in error_of(ops.post("/v1/cache/pin", json=body, headers=as_key("alice")), 403, "permission_error")
    pin = ops.post("/v1/cache/pin", json=body).json()
    assert (pin["name"], pin["pinned"], pin["tier"], pin["over_restarts"]) == ("house", True, "device", False)
    assert pin["tokens"] > 200
    assert ops.get("/v1/cache/pins").json() == {"data": [pin]}
    press(ops, 40)
    assert read(post(ops, ask("A question.", 1, system=SYSTEM), **as_key("alice"))) >= pin["tokens"]
    assert read(post(ops, ask("A question.", 1, system=SYSTEM))) < 100, "it is alice's"
    assert ops.delete("/v1/cache/pins/house").json()["pinned"] is False
    assert ops.get("/v1/cache/pins").json() == {"data": []}
    error_of(ops.delete("/v1/cache/pins/house"), 404, "not_found_error")
    press(ops, 60)
    assert read(post(ops, ask("Another question.", 1, system=SYSTEM), **as_key("alice"))) < 100


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"system": long(90, 3500), "key": "alice"}, "--retain-bytes"),
        ({"system": "short", "key": "alice"}, "more than a page"),
        ({"system": SYSTEM, "key": "nobody"}, "expected a name in --api-key-file"),
        ({"system": SYSTEM}, "no key reads what another has"),
    ],
)
def test_a_pin_that_cannot_be_is_answered_with_the_reason(ops: httpx.Client, body: Json, words: str) -> None:
    pin = ops.post("/v1/cache/pin", json=body)
    assert pin.status_code == 200
    assert (pin.json()["pinned"], pin.json()["tokens"]) == (False, 0)
    assert words in pin.json()["instead"]
    assert ops.get("/v1/cache/pins").json() == {"data": []}
