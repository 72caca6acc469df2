"""Learned volatility: what drifts is reported by its fifth request, and nothing else ever."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest

from experiments.workloads import sessions
from experiments.workloads.sessions import Session
from serve.api.messages import decode_count_tokens
from serve.diagnosis.volatility import Volatile, Volatility
from serve.rules.normalize import DEFAULT_RULES, normalize

Json = dict[str, Any]
AGENT = "agent/1.0"


def observe(volatility: Volatility, body: Json, rules: frozenset[str] = DEFAULT_RULES, agent: str = AGENT) -> list:
    return volatility.observe(agent, normalize(decode_count_tokens(json.dumps(body).encode()), rules).request)


def turns(count: int, **more: Any) -> list[Json]:
    return list(itertools.islice(sessions.requests(Session(scale=0.1, **more)), count))


def drifting(body: Json, number: int) -> Json:
    """The body with a field that no rule knows in the middle of its last system block."""
    *others, last = body["system"]
    lines = last["text"].split("\n")
    value = random.Random(number).getrandbits(64)
    lines.insert(len(lines) // 2, f"x-agent-trace: {value:016x}; keep")
    return body | {"system": [*others, last | {"text": "\n".join(lines)}]}


@pytest.mark.parametrize("release", list(sessions.RELEASES))
def test_a_stable_stream_of_200_requests_has_no_volatile_segment(release: str) -> None:
    volatility = Volatility()
    for body in turns(200, release=release):
        assert observe(volatility, body) == []
    assert volatility.latest() == []


@pytest.mark.parametrize("begins", [0, 1, 60])
def test_a_field_that_begins_to_drift_is_reported_by_its_fifth_request_and_once(begins: int) -> None:
    volatility = Volatility()
    for number, body in enumerate(turns(200)):
        found = observe(volatility, drifting(body, max(number, begins)))
        # The first request that differs from its predecessor is the second one of those that drift.
        assert bool(found) is (number == begins + 4), f"request {number}"
    (found,) = volatility.latest()
    assert found.section == "system[1]"
    assert found.requests == begins + 5
    assert found.before != found.after
    assert found.after == f"x-agent-trace: {random.Random(begins + 4).getrandbits(64):016x}; keep"


def test_the_header_itself_is_noticed_where_it_is_not_stripped() -> None:
    volatility = Volatility()
    for body in turns(5):
        observe(volatility, body, frozenset())
    assert [(found.section, found.line) for found in volatility.latest()] == [("system[0]", 0)]


def test_a_drifting_tool_is_noticed() -> None:
    volatility = Volatility()
    for number, body in enumerate(turns(5)):
        first, second, *rest = body["tools"]
        changed = second | {"description": f"{second['description']} Session {number:04}."}
        observe(volatility, body | {"tools": [first, changed, *rest]})
    assert [found.section for found in volatility.latest()] == ["tools[1] Read"]


def test_a_whole_new_text_every_time_is_no_field() -> None:
    volatility = Volatility()
    for number in range(20):
        text = "\n".join(f"{random.Random(number).random()} line {line}" for line in range(10))
        assert (
            observe(volatility, {"model": "m", "system": text, "messages": [{"role": "user", "content": "Hi"}]}) == []
        )
        alone = {"model": "m", "system": str(number), "messages": [{"role": "user", "content": "Hi"}]}
        assert observe(volatility, alone, agent="alone") == []


def test_what_users_and_the_model_say_is_no_field() -> None:
    volatility = Volatility()
    for number in range(20):
        said = [("user", f"Question {number}"), ("assistant", f"Answer {number}"), ("user", "And?")]
        messages = [{"role": role, "content": text} for role, text in said]
        assert observe(volatility, {"model": "m", "system": "You are.\nBe brief.", "messages": messages}) == []


def test_values_that_come_back_are_two_sessions_and_no_drift() -> None:
    volatility = Volatility()
    pairs = zip(turns(30, group="k", folder="/a"), turns(30, group="k", folder="/b"), strict=True)
    for body in itertools.chain.from_iterable(pairs):
        assert observe(volatility, body) == []


def test_clients_are_distinguished_by_agent_and_tools() -> None:
    volatility = Volatility()
    for number, body in enumerate(turns(4)):
        observe(volatility, drifting(body, number))
        observe(volatility, drifting(body, number), agent="other/1.0")
        observe(volatility, drifting(body | {"tools": body["tools"][:2]}, number))
    assert volatility.latest() == []


def test_texts_can_be_hidden() -> None:
    volatility = Volatility(show_prompt_text=False)
    for number, body in enumerate(turns(5)):
        observe(volatility, drifting(body, number))
    (found,) = volatility.latest()
    assert isinstance(found, Volatile)
    assert (found.before, found.after) == (None, None)
