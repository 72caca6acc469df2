"""Rules on bytes: what they do is what they do to requests, and no other byte changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.api.messages import MessagesRequest, decode_request
from serve.api.openai import read_chat, read_responses
from serve.rules.body import SYSTEM_ROLES, normalize_body
from serve.rules.normalize import DEFAULT_RULES, RULES, normalize
from tests.helpers.http import BILLING, text_block

Json = dict[str, Any]

HEADER = BILLING.format(7)
BLOCK = f'{{"type":"text","text":"{HEADER}"}}'
OTHER = '{"text":"B" ,"type":"text"}'
IMAGE = '{"role":"user","content":[{"type":"image"}]}'
NONE = '"messages":[]}'
ALL = frozenset(RULES) - {"tools-first"}
DATE = "Today's date is 2026-11-25.\n"
COUNT = "<total_tokens>17 tokens left</total_tokens>"
READERS: dict[str, Callable[[bytes], MessagesRequest]] = {
    "/v1/messages": decode_request,
    "/v1/chat/completions": lambda body: read_chat(body)[0],
    "/v1/responses": lambda body: read_responses(body)[0],
}

REMINDER = "<system-reminder>\nR\n</system-reminder>"
ENVIRONMENT = "<env>\n2. Date: 11/28/2026\n4. Working Directory: /a\n</env>\n"
TEXTS = (
    st.just(REMINDER)
    | st.lists(st.sampled_from([HEADER, DATE, COUNT, ENVIRONMENT, "\n", "You é help.\n", '"\\'])).map("".join)
    | st.text(max_size=9)
)
SCHEMAS = st.fixed_dictionaries(
    {"type": st.just("object")},
    optional={"properties": st.dictionaries(st.sampled_from("zyx"), st.sampled_from([{}, {"b": 1.5, "a": [None]}]))},
)


def lists(kind: str) -> st.SearchStrategy:
    """Texts as a string or as a list of blocks, which have a field that rules do not know."""
    return TEXTS | st.lists(
        st.builds(lambda text: {"cache_control": {"x": 1}, "text": text, "type": kind}, TEXTS), max_size=3
    )


def turns(roles: list[str], kind: str) -> st.SearchStrategy:
    return st.lists(
        st.fixed_dictionaries({"content": lists(kind), "role": st.sampled_from(roles)}), min_size=1, max_size=4
    )


def begins_with_a_user(body: Json) -> bool:
    """Whether a user speaks first: ahead of anybody else a system message is OpenAI's system text, moved or not."""
    said = body.get("messages", body.get("input"))
    roles = [turn["role"] for turn in said if turn["role"] not in SYSTEM_ROLES] if isinstance(said, list) else ["user"]
    return roles[:1] == ["user"]


def tools(make: Callable[[str, Json], Json]) -> st.SearchStrategy:
    return st.dictionaries(st.sampled_from("cba"), SCHEMAS).map(lambda named: [make(*tool) for tool in named.items()])


MESSAGES = st.fixed_dictionaries(
    {
        "messages": turns(["user", "assistant", "system"], "text"),
        "model": st.just("m"),
        "max_tokens": st.just(1),
    },
    optional={
        "system": lists("text"),
        "tools": tools(lambda name, schema: {"input_schema": schema, "name": name, "x": 1}),
    },
)
CHATS = st.fixed_dictionaries(
    {"messages": turns(["user", "assistant", "system", "developer"], "text"), "model": st.just("m")},
    optional={
        "tools": tools(lambda name, schema: {"type": "function", "function": {"name": name, "parameters": schema}})
    },
)
RESPONSES = st.fixed_dictionaries(
    {"input": TEXTS | turns(["user", "assistant", "system", "developer"], "input_text"), "model": st.just("m")},
    optional={
        "instructions": TEXTS,
        "tools": tools(lambda name, schema: {"type": "function", "name": name, "parameters": schema}),
    },
)
BODIES = (
    st.tuples(st.just("/v1/messages"), MESSAGES)
    | st.tuples(st.just("/v1/chat/completions"), CHATS.filter(begins_with_a_user))
    | st.tuples(st.just("/v1/responses"), RESPONSES.filter(begins_with_a_user))
)


def body_of(value: Json) -> bytes:
    return json.dumps(value, indent=1).encode()


def read(path: str, body: bytes) -> MessagesRequest:
    """A request as the server reads it; no text is no system text, however it is written."""
    request = READERS[path](body)
    return request if request.system else replaced(request, system=None)


def replaced(request: MessagesRequest, **fields: Any) -> MessagesRequest:
    return msgspec.structs.replace(request, **fields)


def as_json(request: MessagesRequest) -> bytes:
    """All of a request, with the order of its keys."""
    return msgspec.json.encode(request)


class TestRules:
    @settings(max_examples=800, deadline=None, derandomize=True)
    @given(given_body=BODIES, rules=st.sampled_from([DEFAULT_RULES, ALL, *(frozenset({name}) for name in sorted(ALL))]))
    def test_they_do_to_bytes_what_they_do_to_requests(
        self, given_body: tuple[str, Json], rules: frozenset[str]
    ) -> None:
        path, value = given_body
        body = body_of(value)
        made = normalize_body(body, path, rules)
        expected = normalize(read(path, body), rules)
        # A text that was moved is a message more in the body, so that the places in it differ.
        assert as_json(replaced(read(path, made.body), places=())) == as_json(
            replaced(expected.request, system=expected.request.system or None, places=())
        )
        assert {note.rule for note in made.applied} == {note.rule for note in expected.applied}
        assert (made.body == body) is not bool(made.applied)

    def test_a_body_that_no_rule_changes_is_the_very_same(self) -> None:
        body = body_of({"system": "You help.", "messages": [{"role": "user", "content": HEADER}]})
        assert normalize_body(body, "/v1/messages", DEFAULT_RULES).body is body

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            (
                f'{{"system" : "{HEADER}You \\u00e9","messages": [ ],"n":1.0}}',
                '{"system" : "You é","messages": [ ],"n":1.0}',
            ),
            (f'{{"a":[{BLOCK}],"system":[ {BLOCK} , {OTHER}],{NONE}', f'{{"a":[{BLOCK}],"system":[ {OTHER}],{NONE}'),
            (f'{{"system":[{OTHER} , {BLOCK} ],{NONE}', f'{{"system":[{OTHER} ],{NONE}'),
            (f'{{"system":[{BLOCK} ],{NONE}', f'{{"system":[],{NONE}'),
            (f'{{"messages":[{IMAGE}],"system":"{HEADER}"}}', f'{{"messages":[{IMAGE}],"system":""}}'),
            (f'{{"system":[ {BLOCK}],"messages":[1e0]}}', None),
            (f'{{"system":"{HEADER}","system":"twice",{NONE}', None),
            (f'{{"system":[{{"type":"image","text":"{HEADER}"}}],{NONE}', None),
        ],
    )
    def test_only_what_a_rule_changes_has_new_bytes(self, before: str, after: str | None) -> None:
        made = normalize_body(before.encode(), "/v1/messages", DEFAULT_RULES)
        assert made.body.decode() == (before if after is None else after)

    def test_one_message_always_stays(self) -> None:
        body = body_of({"messages": [{"role": "system", "content": [text_block(HEADER)]}]})
        made = normalize_body(body, "/v1/messages", DEFAULT_RULES)
        assert json.loads(made.body) == {"messages": [{"role": "system", "content": ""}]}

    def test_a_text_that_is_moved_is_the_only_message_where_there_was_none(self) -> None:
        body = body_of({"system": f"{DATE}You help.", "messages": []})
        made = normalize_body(body, "/v1/messages", frozenset({"volatile-last"}))
        assert json.loads(made.body)["messages"] == [{"role": "system", "content": DATE.strip()}]

    def test_a_text_is_moved_to_where_a_message_is_dropped(self) -> None:
        turns = [{"role": "user", "content": "Hi"}, {"role": "system", "content": HEADER}]
        body = body_of({"system": f"{DATE}You help.", "messages": turns})
        made = normalize_body(body, "/v1/messages", frozenset({"volatile-last", "strip-preamble"}))
        assert json.loads(made.body)["messages"] == [turns[0], {"role": "system", "content": DATE.strip()}]

    def test_what_a_rule_cannot_parse_stays_and_is_reported(self) -> None:
        body = body_of({"system": "x-anthropic-billing-header: odd", "messages": []})
        made = normalize_body(body, "/v1/messages", DEFAULT_RULES)
        assert made.body is body
        assert [note.where for note in made.unparsed] == ["system"]

    def test_tools_keep_what_is_not_sorted(self) -> None:
        first = '{"name":"b", "input_schema":{"z":1.0 ,"a":"\\u00e9"}, "x":[ ]}'
        second = '{"type":"web_search_20250305","name":"a"}'
        body = f'{{"tools":[{first}, {second}],"messages":[]}}'.encode()
        made = normalize_body(body, "/v1/messages", frozenset({"sort-tools"})).body.decode()
        assert made == f'{{"tools":[{second}, {first}],"messages":[]}}'
        made = normalize_body(body, "/v1/messages", frozenset({"sort-schema-keys"})).body.decode()
        assert made == body.decode().replace('{"z":1.0 ,"a":"\\u00e9"}', '{"a":"é","z":1.0}')
