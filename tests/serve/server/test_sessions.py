"""The sessions that clients name: who is listed with which state and pages, and who sees whose."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from cache.nodes import Agent, Use
from experiments.harness.server import running_server
from serve.engine.sessions import MOST_AGENTS, MOST_SESSIONS, latest_agents
from tests.helpers.http import FLAGS, Json, ask, eventually, open_request, post, prompt_tokens, read_until

SECRETS = {"alice": "alice's key", "bob": "bob's key", "ops": "the operator's"}
SYSTEM = "You are an agent, and these instructions are longer than a page of the cache. " * 3
TOOL = {"name": "Wait", "description": "Waits.", "input_schema": {"type": "object", "additionalProperties": False}}
ONCE = {"type": "tool", "name": "Wait", "disable_parallel_tool_use": True}
CALLS = {"tools": [TOOL], "tool_choice": ONCE, "max_tokens": 200}
SAYS_YES = {"output_config": {"format": {"type": "json_schema", "schema": {"enum": ["yes"]}}}, "max_tokens": 50}

Of = Callable[[str], httpx.Client]


@pytest.fixture(scope="module")
def of(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Of]:
    """A client with the key of a name, of a server with host memory below the device."""
    folder = tmp_path_factory.mktemp("sessions")
    keys, log = folder / "keys", folder / "server.log"
    lines = (f"{name} sha256:{hashlib.sha256(secret.encode()).hexdigest()}" for name, secret in SECRETS.items())
    keys.write_text("\n".join(lines) + " admin\n")
    flags = (*FLAGS, "--api-key-file", str(keys), "--host-cache-bytes", "64MB", "--flush-seconds", "0.05")
    with running_server(model_folder, *flags, log=log) as running:
        clients = {
            name: httpx.Client(base_url=running.url, headers={"x-api-key": secret}, timeout=60)
            for name, secret in SECRETS.items()
        }
        yield clients.__getitem__
        for client in clients.values():
            client.close()
    assert "Traceback" not in log.read_text()


def claude(session: str, agent: str = "", parent: str = "") -> dict[str, str]:
    """The headers of Claude Code."""
    names = {"session-id": session, "agent-id": agent, "parent-agent-id": parent}
    return {f"x-claude-code-{name}": value for name, value in names.items() if value}


def agents_in(listed: Json, session: str) -> dict[str, Json]:
    """The agents of a session, by their ids."""
    return {each["agent"]: each for one in listed["data"] if one["session"] == session for each in one["agents"]}


def agents_of(client: httpx.Client, session: str, until: Callable[[dict[str, Json]], bool]) -> dict[str, Json]:
    """The same, once they are as they should be: an answer is given again for a second."""
    found: list[dict[str, Json]] = []

    def listed() -> bool:
        found.append(agents_in(client.get("/v1/sessions").json(), session))
        return until(found[-1])

    eventually(listed, f"the agents of {session} are as expected, not {found[-1:]}")
    return found[-1]


def states(agents: dict[str, Json]) -> dict[str, str]:
    return {name: each["state"] for name, each in agents.items()}


def test_a_session_of_claude_code_is_listed_with_its_agents_and_what_they_hold(of: Of) -> None:
    client, before = of("alice"), time.time()
    main = post(client, ask("Look around", system=SYSTEM) | CALLS, **claude("s-1"))
    sub = post(client, ask("Go and see", system=SYSTEM) | SAYS_YES, **claude("s-1", "a-7"))
    nested = post(client, ask("Go on", system=SYSTEM) | CALLS, **claude("s-1", "a-8", "a-7"))
    assert [each["stop_reason"] for each in (main, sub, nested)] == ["tool_use", "end_turn", "tool_use"]

    wanted = {"s-1": "tool", "a-7": "ended", "a-8": "tool"}
    agents = agents_of(client, "s-1", lambda now: states(now) == wanted and now["s-1"]["tiers"].get("host", 0) > 0)
    assert {name: each["parent"] for name, each in agents.items()} == {"s-1": "", "a-7": "s-1", "a-8": "a-7"}
    for name, answer in (("s-1", main), ("a-7", sub), ("a-8", nested)):
        agent = agents[name]
        prompt = prompt_tokens(answer["usage"])
        assert agent["prompt_tokens"] == prompt
        assert agent["tiers"]["device"] == prompt - 1
        said = answer["usage"]["output_tokens"]  # a call ends an answer while steps for it are in flight
        assert prompt - 1 <= agent["device_tokens"] <= prompt + said + 4
        assert 0 < agent["own_tokens"] < agent["device_tokens"], "the system text is not its own"
        assert agent["tiers"]["host"] <= prompt
        assert before <= agent["since"] == agent["last_read"] <= time.time()

    reports = {each["id"]: each for each in client.get("/v1/requests").json()["data"]}
    told = [reports[answer["id"]] for answer in (main, sub, nested)]
    named = [(each["session"], each["agent"], each.get("parent", ""), each["agent_state"]) for each in told]
    assert named == [("s-1", "s-1", "", "tool"), ("s-1", "a-7", "s-1", "ended"), ("s-1", "a-8", "a-7", "tool")]


def test_an_agent_runs_while_it_is_answered_and_then_waits_for_a_person(of: Of) -> None:
    client = of("bob")
    headers = {"x-api-key": SECRETS["bob"]} | claude("s-2")
    with open_request(str(client.base_url), ask("7", max_tokens=10_000, stream=True), **headers) as connection:
        read_until(connection, b"content_block_delta")
        agents_of(client, "s-2", lambda now: states(now) == {"s-2": "running"} and now["s-2"]["device_tokens"] > 0)
    agents_of(client, "s-2", lambda now: states(now) == {"s-2": "unknown"})
    post(client, ask("Is it?") | SAYS_YES, **claude("s-2"))
    agents_of(client, "s-2", lambda now: states(now) == {"s-2": "person"})
    post(client, ask("Bye") | SAYS_YES, **claude("s-2"), **{"x-dynamo-session-final": "true"})
    agents_of(client, "s-2", lambda now: states(now) == {"s-2": "ended"})


def test_keys_do_not_see_each_others_sessions_even_of_the_same_id(of: Of) -> None:
    for name in ("alice", "bob"):
        post(of(name), ask(f"{name}'s", 1, system=SYSTEM + name), **claude("s-3"))
        post(of(name), ask(f"{name}'s", 1), **claude(f"only-{name}"))
    for name, other in (("alice", "bob"), ("bob", "alice")):
        agents_of(of(name), f"only-{name}", lambda now: len(now) == 1)
        text = of(name).get("/v1/sessions").text
        assert f"only-{other}" not in text
        listed = of(name).get("/v1/sessions").json()
        assert {each["key"] for each in listed["data"]} == {name}
        assert [each["session"] for each in listed["data"]].count("s-3") == 1
    agents_of(of("ops"), "only-bob", lambda now: len(now) == 1)
    seen = [(each["session"], each["key"]) for each in of("ops").get("/v1/sessions").json()["data"]]
    assert {("s-3", "alice"), ("s-3", "bob"), ("only-alice", "alice"), ("only-bob", "bob")} <= set(seen)
    for name in ("alice", "bob"):
        rows = of(name).get("/v1/requests").json()["data"]
        assert {row["key"] for row in rows} == {name}


def test_without_headers_nothing_is_listed_and_the_reason_is_said(client: httpx.Client) -> None:
    answer = post(client, ask("Who am I?", 1))
    record = client.get(f"/v1/requests/{answer['id']}").json()
    assert not {"session", "agent", "parent"} & record.keys()
    listed = client.get("/v1/sessions").json()
    assert not [each for each in listed["data"] if not each["session"]]
    assert bool(listed["data"]) != ("x-claude-code-session-id" in (listed["reason"] or ""))


def test_ids_that_are_long_or_odd_are_cut_and_harm_nothing(of: Of) -> None:
    client, odd = of("alice"), "<script>" + "x" * 500
    answer = post(client, ask("Odd", 1), **claude(odd))
    agents = agents_of(client, f"{odd[:63]}…", bool)
    assert list(agents) == [f"{odd[:63]}…"]
    assert client.get(f"/v1/requests/{answer['id']}").json()["session"] == f"{odd[:63]}…"


def test_the_latest_are_listed_however_many_there_are_and_the_rest_is_counted() -> None:
    def agent(session: int, number: int, owner: str = "alice") -> Agent:
        found = Agent(f"{owner}\0{session}-{number}", f"{owner}\0{session}")
        found.uses.append(Use(found))
        return found

    known = [agent(session, number) for session in range(40) for number in range(20)]
    others = [agent(session, 0, "alice2") for session in range(40)]
    chosen, left_out = latest_agents([*others, *known], "alice")
    assert [each.id for each in chosen] == [
        f"alice\0{session}-{number}" for session in range(MOST_SESSIONS) for number in range(MOST_AGENTS)
    ]
    assert left_out == len(known) - len(chosen)
    assert len(latest_agents([*others, *known], None)[0]) == MOST_SESSIONS
