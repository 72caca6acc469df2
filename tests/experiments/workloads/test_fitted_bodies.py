"""Fitted sessions as bodies: they share what their ids share, and have about their trace's lengths."""

from __future__ import annotations

import json

import numpy as np

from experiments.workloads.agentx import Agent, Trace, TraceRequest
from experiments.workloads.fitted import load_fit, session
from experiments.workloads.fitted_bodies import bodies
from experiments.workloads.sessions import Session
from serve.api.messages import decode_request

MAIN = Agent("", None, 100, 28)


def traced(*prompts: list[int], agent: Agent = MAIN) -> Trace:
    """A session of prompts of these blocks."""
    requests = [
        TraceRequest(agent, "m", float(at), 64 * len(ids), 9, np.array(ids, np.int32), "tool_use", 1.0, None, 1.0)
        for at, ids in enumerate(prompts)
    ]
    return Trace("a.json", "a", 64, 100, 28, requests)


def plain(body: dict[str, object]) -> list[str]:
    """The messages without cache markers, as text."""
    messages = json.loads(json.dumps(body["messages"]))
    for message in messages:
        if isinstance(message["content"], list):
            for block in message["content"]:
                block.pop("cache_control", None)
    return [json.dumps(message) for message in messages]


def test_each_body_extends_the_one_before_as_its_ids_do() -> None:
    made = [body for _, body in bodies(traced([1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7]), Session())]
    assert [len(body["messages"]) for body in made] == [1, 3, 5]
    assert made[1]["system"] == made[0]["system"]
    assert plain(made[2])[1:3] == plain(made[1])[1:3]
    for body in made:
        decode_request(json.dumps(body).encode())


def test_a_break_behind_the_head_changes_the_first_message_and_a_later_one_only_what_follows() -> None:
    trace = traced([1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 8, 9], [1, 2, 8, 9, 10], [1, 2, 8, 9, 11])
    texts = [plain(body) for _, body in bodies(trace, Session())]
    assert texts[2][0] != texts[1][0]
    assert texts[4][0] == texts[3][0]
    assert texts[4][-1] != texts[3][-1]


def test_drawn_sessions_have_about_as_many_characters_as_their_tokens_are_worth() -> None:
    fit = load_fit()
    drawn = (session(fit, f"{number}") for number in range(200))
    trace = next(t for t in drawn if 5 < len(t.requests) < 20 and t.requests[-1].input_tokens < 40_000)
    made = list(bodies(trace, Session()))
    assert len(made) == len(trace.requests)
    asked, body = made[-1]
    text = json.dumps([body["system"], body["tools"], body["messages"]])
    assert 0.75 < len(text) / 4.5 / asked.input_tokens < 1.35
    again = [body for _, body in bodies(trace, Session())]
    assert again == [body for _, body in made]
