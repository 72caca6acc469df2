"""The live replay: its text, what it sends, and what a real server finds of a trace that the test writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings

from experiments.harness.server import Server, running_server
from experiments.wild.live import Answer, Call, body, calls_of, compare, headers, main, prompt_texts, usage_counts
from experiments.workloads.agentx import Agent, Trace
from experiments.workloads.demo_model import TINY, write_demo_model
from tests.experiments.wild.made import asked, session, sessions, write

LONG = list(range(1, 61))


def calls(*traces: Trace) -> list[Call]:
    """The calls of all sessions."""
    return calls_of(traces, len(traces), None, None)


def words_of(call: Call, words_a_block: float = 5.3) -> list[str]:
    """The words of a prompt."""
    return " ".join(prompt_texts(call, words_a_block)).split()


@settings(max_examples=30)
@given(sessions())
def test_prompts_share_the_words_of_the_blocks_that_they_share(trace: Trace) -> None:
    made = calls(trace)
    for old in made:
        for new in made:
            if old.asked.model != new.asked.model:
                continue
            ids = zip(old.asked.hash_ids.tolist(), new.asked.hash_ids.tolist(), strict=False)
            blocks = next((n for n, (a, b) in enumerate(ids) if a != b), None)
            a, b = words_of(old), words_of(new)
            both = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            if blocks is None:
                assert both == min(len(a), len(b))
            else:  # the words after the last common block are drawn anew, a few may be the same
                assert round(5.3 * blocks) <= both <= round(5.3 * blocks) + 3


def test_sessions_models_and_seeds_share_no_text() -> None:
    one, two = session(asked(LONG), asked(LONG, 1, model="other")), session(asked(LONG, 2))
    first, other_model, other_session = calls(one, Trace("b.json", "two", 64, 64, 64, two.requests))
    (other_seed,) = calls_of([session(asked(LONG))], 1, None, None, seed=1)
    for other in (other_model, other_session, other_seed):
        assert sum(a == b for a, b in zip(words_of(first), words_of(other), strict=True)) < 20


def test_a_prompt_has_as_many_words_as_its_blocks_are_worth_and_its_head_as_system_text() -> None:
    (call,) = calls(session(asked(LONG)))
    system, user = prompt_texts(call, 2.5)
    assert len(system.split()) == 5  # two blocks of tools and system text
    assert len(user.split()) == 145
    told = body("m", system, user, "messages", 1)
    assert (told["system"], told["messages"]) == (system, [{"role": "user", "content": user}])
    assert [m["role"] for m in body("m", system, user, "chat", 1)["messages"]] == ["system", "user"]
    assert "system" not in body("m", "", user, "messages", 1)


def test_a_session_and_its_agents_are_named_as_clients_name_them() -> None:
    main_call, sub = calls(session(asked([1]), asked([2], 1, agent=Agent("sub", "", 0, 0))))
    assert headers(main_call)["x-claude-code-session-id"] == "one 0"
    assert "x-claude-code-agent-id" not in headers(main_call)
    assert headers(sub)["x-claude-code-agent-id"] == "sub"


def test_long_sessions_are_left_out_and_the_rest_is_sent_in_the_order_of_times() -> None:
    short = session(asked([1], 5), asked([1, 2], 9))
    found = calls_of([session(asked(LONG)), short, session(asked([7], 6)), short], 2, None, 1000)
    assert [call.asked.t_s for call in found] == [5, 6, 9]
    assert len(calls_of([short], 1, 1, None)) == 1


def test_usage_is_read_as_each_api_reports_it() -> None:
    assert usage_counts({"input_tokens": 5, "cache_read_input_tokens": 90}, "messages") == (95, 90)
    assert usage_counts({"prompt_tokens": 95, "prompt_tokens_details": {"cached_tokens": 90}}, "chat") == (95, 90)
    assert usage_counts({"prompt_tokens": 95}, "chat") == (95, 0)


def test_refused_requests_are_counted_and_left_out_of_the_shares() -> None:
    good = Answer("s", "append", 100, 90, 100, 80, 5.0)
    found = compare([good, Answer("s", "append", 0, 0, 100, 80, 5.0, 400)])
    assert (found["requests"], found["refused"]) == (2, 1)
    assert found["groups"][0]["reused"] == 0.9
    assert found["difference_by_request_q5_50_95"] == [0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--live", "http://127.0.0.1:9"], "expected an endpoint with usage, found ConnectError"),
        (["--live", "http://127.0.0.1:9", "--shrink", "0"], "--shrink 0.0: expected more than 0"),
        (["--live", "http://127.0.0.1:9", "--longest", "10"], "--longest 10: expected a length that a session"),
    ],
)
def test_what_cannot_be_sent_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    path = write(tmp_path / "traces", session(asked([1])))
    with pytest.raises(SystemExit, match="2"):
        main([str(path), *arguments])
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server of a tiny model."""
    folder = tmp_path_factory.mktemp("live")
    write_demo_model(folder / "model", config=TINY)
    with running_server(folder / "model", log=folder / "log") as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("api", ["messages", "chat"])
def test_a_real_server_reuses_what_the_trace_does(tmp_path: Path, server: Server, api: str) -> None:
    broken = [*LONG[:5], *range(200, 260)]
    one = session(asked(LONG), asked([*LONG, 61, 62], 5), asked(broken, 20), asked([*broken, 300], 30))
    path = write(tmp_path / "traces", one, session(asked(LONG, 3)))
    seed = str(len(api))  # the server is warm with the other's text
    main([str(path), "--live", server.url, "--api", api, "--shrink", "4", "--seed", seed, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "live.json").read_text())
    assert found["refused"] == 0
    for answer in map(json.loads, (tmp_path / "live.jsonl").read_text().splitlines()):
        assert answer["cached"] / answer["tokens"] == pytest.approx(
            answer["trace_reused"] / answer["trace_tokens"], abs=0.05
        )
    assert (tmp_path / "live.png").stat().st_size > 0
