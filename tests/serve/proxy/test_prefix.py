"""What the proxy takes for a prompt's prefix, and what it believes an engine to hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from experiments.workloads import sessions
from experiments.workloads.sessions import Session
from serve.proxy.holdings import EXPIRY_SECONDS, FIRST_CAPACITY, LEAST_CAPACITY, Holdings
from serve.proxy.prefix import BLOCK_BYTES, Prompt, read_prompt
from serve.proxy.relay import IS_PINGS, Usage, usage_in
from serve.web.agents import sender_of
from tests.helpers.http import Json, encoded, text_block

LONG = "What a long text it is, and none of it matters. " * 20
TOOLS = [{"name": "f", "description": LONG, "input_schema": {"type": "object"}}]
CALL = {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "t", "content": [text_block(LONG)]}
MARK = {"cache_control": {"type": "ephemeral"}}


def read(body: Json, route: str = "/v1/messages", **headers: str) -> Prompt:
    return read_prompt("r", encoded({"model": "m"} | body), route, headers)


def shared(a: Prompt, b: Prompt) -> int:
    """Blocks from the start on that two prompts have in common."""
    same = [x == y for x, y in zip(a.keys, b.keys, strict=False)]
    return same.index(False) if False in same else len(same)


def user(content: Any) -> Json:
    return {"role": "user", "content": content}


class TestPrompt:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ({"messages": [user(LONG)]}, {"messages": [user([text_block(LONG)])]}),
            ({"messages": [user([text_block(LONG)])]}, {"messages": [user([text_block(LONG) | MARK])]}),
            ({"tools": TOOLS, "messages": [user(LONG)]}, {"tools": [TOOLS[0] | MARK], "messages": [user(LONG)]}),
            ({"system": LONG, "messages": []}, {"system": [text_block(LONG) | MARK], "messages": []}),
            ({"messages": [user(LONG)], "max_tokens": 1}, {"stream": True, "messages": [user(LONG)]}),
        ],
    )
    def test_how_a_body_spells_it_does_not_matter(self, one: Json, other: Json) -> None:
        assert read(one).keys.tolist() == read(other).keys.tolist()
        assert len(read(one).keys) >= 3

    def test_a_turn_begins_with_the_one_before_it(self) -> None:
        first = {"system": "S", "tools": TOOLS, "messages": [user(LONG)]}
        answer = {"role": "assistant", "content": [CALL]}
        second = first | {"messages": [user(LONG), answer, user([RESULT])]}
        assert shared(read(first), read(second)) == len(read(first).keys)
        assert len(read(second).keys) > len(read(first).keys)

    def test_responses_and_chats_are_read(self) -> None:
        chat: Json = {"messages": [{"role": "system", "content": LONG}, user("a" * BLOCK_BYTES)]}
        other = {"messages": [{"role": "system", "content": LONG}, user("b" * BLOCK_BYTES)]}
        tooled = [read(body | {"tools": TOOLS}, "/v1/chat/completions") for body in (chat, other)]
        assert shared(*tooled) == (2 * len(LONG)) // BLOCK_BYTES
        asked = [read({"instructions": LONG, "input": i}, "/v1/responses") for i in (LONG, [user(LONG)])]
        assert asked[0].keys.tolist() == asked[1].keys.tolist()

    def test_models_and_salts_share_nothing(self) -> None:
        body = {"messages": [user(LONG)]}
        plain = read(body)
        others = (
            read(body | {"model": "n"}),
            read(body | {"cache_salt": "s"}),
            read(body, **{"x-tokenzero-cache-salt": "s"}),
        )
        assert [shared(plain, other) for other in others] == [0, 0, 0]

    def test_a_file_counts_as_what_an_image_takes_and_not_as_its_bytes(self) -> None:
        pictures = [
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": letter * 100_000}}
            for letter in "ab"
        ]
        one, other = (read({"messages": [user([picture])]}) for picture in pictures)
        assert shared(one, other) == 0
        assert one.size < 5000

    @pytest.mark.parametrize("body", [b"{", b"[]", b'{"messages": 1}', b'{"messages": "\xff"}', b"[" * 10**5])
    def test_what_cannot_be_read_shares_nothing(self, body: bytes) -> None:
        prompt = read_prompt("r", body, "/v1/messages", {})
        assert (len(prompt.keys), prompt.size) == (0, len(body))

    def test_parts_of_any_shape_are_read(self) -> None:
        odd: list[Any] = [1, None, {"content": 7}, {"role": 3}, user([1, None, {"type": []}, {"text": 1}]), user(None)]
        assert read({"messages": odd, "tools": 3, "system": 5}).size > 0

    def test_sessions_share_their_system_text_up_to_the_folder_and_a_session_all_of_itself(self) -> None:
        first, other, next_turn = (
            read(sessions.request(Session(seed, group="g"), turn, header=False))
            for seed, turn in ((0, 0), (1, 0), (0, 1))
        )
        assert 10 < shared(first, other) < len(first.keys)
        assert shared(first, next_turn) == len(first.keys)


class TestSender:
    def test_the_narrowest_id_is_the_agents(self) -> None:
        session = {"x-claude-code-session-id": "s"}
        assert sender_of(session) == ("s", "s")
        assert sender_of(session | {"x-claude-code-agent-id": "a"}) == ("a", "s")
        assert sender_of({"thread-id": "t", "session-id": "s"}) == ("t", "s")
        assert sender_of({}) == ("", "")
        assert len(sender_of({"session-id": "x" * 10**4}).agent) == 200


def keys(*names: int) -> np.ndarray:
    return np.array(names, np.uint64)


class TestHoldings:
    def test_what_was_sent_is_held_until_as_much_as_fits_came_after_it(self) -> None:
        held = Holdings()
        held.capacity = 100
        assert held.use(keys(*range(60)), 0.0) == []
        assert held.use(keys(*range(1000, 1060)), 1.0) == []
        assert held.ages(keys(*range(60))) == [60] * 60
        dropped = held.use(keys(*range(2000, 2050)), 2.0)
        assert sorted(dropped) == list(range(60))
        assert dropped[0] == 59, "from the end of a chain"

    def test_what_is_used_again_stays(self) -> None:
        held = Holdings()
        held.capacity = 100
        for n in range(1, 20):
            held.use(keys(*range(10)), n)
            held.use(keys(*range(1000 * n, 1000 * n + 50)), n)
        assert len(held.ages(keys(*range(10)))) == 10
        assert len(held) < 200

    def test_what_was_not_used_for_long_is_dropped(self) -> None:
        held = Holdings()
        held.use(keys(1, 2), 0.0)
        assert held.use(keys(3), EXPIRY_SECONDS) == [2, 1]

    def test_a_miss_lowers_the_capacity_to_the_age_of_what_was_missed(self) -> None:
        held = Holdings()
        held.learn([10, 10, 300, 300, 300, 300], 2)
        assert held.capacity == 300

    def test_a_miss_at_an_age_that_others_are_hit_at_is_no_eviction(self) -> None:
        held = Holdings()
        held.learn([300] * 10, 2)
        held.learn([300, 300, 310, 310], 2)  # an engine keeps whole pages
        assert held.capacity == FIRST_CAPACITY

    def test_a_hit_that_was_not_expected_raises_it(self) -> None:
        held = Holdings()
        held.learn([1] * 3 + [0] * 9, 0)
        assert held.capacity == LEAST_CAPACITY
        held.learn([], 50)
        assert held.capacity == 2 * LEAST_CAPACITY


class TestUsage:
    @pytest.mark.parametrize(
        ("answer", "route", "usage"),
        [
            (b'{"usage":{"input_tokens":4,"cache_read_input_tokens":90,"output_tokens":1}}', "messages", (94, 90)),
            (b'{"cache_creation_input_tokens": 5, "input_tokens": 4, "output_tokens": 1}', "messages", (9, None)),
            (b'{"input_tokens":0}...{"input_tokens":7,"output_tokens":1}', "messages", (7, None)),
            (
                b'{"prompt_tokens":94,"prompt_tokens_details":{"cached_tokens":90},"completion_tokens":1}',
                "chat/completions",
                (94, 90),
            ),
            (b'{"input_tokens":94,"input_tokens_details":{"cached_tokens":90}}', "responses", (94, 90)),
            (b'{"id":"resp_1","output":[{"id":"resp_2"}],"input_tokens":9}', "responses", (9, None, "resp_1")),
            (b'{"text":"\\"input_tokens\\": 5"}', "messages", (None, None)),
        ],
    )
    def test_it_is_read_in_every_api(self, answer: bytes, route: str, usage: tuple[Any, ...]) -> None:
        assert usage_in(answer, f"/v1/{route}") == Usage(*usage)

    @pytest.mark.parametrize(
        ("events", "is_pings"),
        [
            (b'event: ping\ndata: {"type": "ping"}\n\n', True),
            (b": ping\n\n:\n\n", True),
            (b'event: ping\r\ndata: {"type":"ping"}\r\n\r\n: x\r\n\r\n', True),
            (b"event: ping\ndata: {}\n\nevent: message_start\ndata: {}\n\n", False),
            (b'data: {"choices":[]}\n\n', False),
        ],
    )
    def test_pings_are_told_from_events(self, events: bytes, is_pings: bool) -> None:
        assert bool(IS_PINGS.fullmatch(events)) is is_pings
