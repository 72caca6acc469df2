"""Requests of the Messages API: what is read, and how a refusal names what is wrong."""

import contextlib
import json
from typing import Any

import anthropic
import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.api import answers
from serve.api import messages as wire
from serve.api.messages import InputMessage, InvalidRequest, TextBlock, decode_count_tokens, decode_request
from tests.helpers.http import encoded
from tests.helpers.mutations import mutated

USER = {"role": "user", "content": "Hi"}
MINIMAL = {"model": "any/name", "max_tokens": 1, "messages": [USER]}
MARK = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}

# The shape of an agent's request, with each block and option that we read and unknown fields at each level.
AGENT = {
    "model": "local-model",
    "max_tokens": 32000,
    "stream": True,
    "system": [{"type": "text", "text": "header"}, {"type": "text", "text": "You are", **MARK}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Hi 😀\n", **MARK}]},
        {"role": "system", "content": "Environment", "new": 1},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "", "signature": "", "new": 1},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": " "},
                {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"b": [1.5, None], "a": {}}, **MARK},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "done", "is_error": True},
                {"type": "tool_result", "tool_use_id": "toolu_2"},
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_3",
                    "content": [{"type": "text", "text": "a"}, {"type": "tool_reference", "tool_name": "Read"}],
                },
                {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "d"}, "title": "t"},
            ],
        },
        {"role": "assistant", "content": "prefill"},
    ],
    "tools": [
        {"name": "Read", "description": "Reads", "input_schema": {"type": "object", "x": 1}, "strict": True, **MARK},
        {"type": "custom", "name": "Bare", "input_schema": {}},
    ],
    "tool_choice": {"type": "tool", "name": "Read", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 2048, "display": "omitted"},
    "stop_sequences": ["END"],
    "temperature": 1,
    "top_p": 0.9,
    "top_k": 40,
    "metadata": {"user_id": "u"},
    "output_config": {"effort": "high", "format": {"type": "json_schema", "schema": {"type": "object"}}},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "service_tier": "auto",
    "betas": [None],
}


def refusal(body: object) -> str:
    with pytest.raises(InvalidRequest) as caught:
        decode_request(body if isinstance(body, bytes) else encoded(body))
    assert (caught.value.type, caught.value.status) == ("invalid_request_error", 400)
    return str(caught.value)


def test_a_minimal_request_has_the_defaults_of_the_api() -> None:
    request = decode_request(encoded(MINIMAL))
    assert request.messages == (InputMessage("user", "Hi"),)
    assert (request.model, request.max_tokens, request.stream) == ("any/name", 1, False)
    rest = ("system", "tools", "tool_choice", "thinking", "stop_sequences", "temperature", "top_p", "top_k")
    assert {getattr(request, name) for name in rest} == {None}


def test_a_request_of_an_agent_is_read_whole() -> None:
    request = decode_request(encoded(AGENT))
    assert [message.role for message in request.messages] == ["user", "system", "assistant", "user", "assistant"]
    assert request.system == (TextBlock("header"), TextBlock("You are"))
    assert request.messages[0].content == (TextBlock("Hi 😀\n"),)
    assert request.messages[2].content == (
        wire.ThinkingBlock("", ""),
        wire.RedactedThinkingBlock("x"),
        TextBlock(" "),
        wire.ToolUseBlock("toolu_1", "Read", {"b": [1.5, None], "a": {}}),
    )
    assert list(request.messages[2].content[3].input) == ["b", "a"]
    assert request.messages[3].content == (
        wire.ToolResultBlock("toolu_1", "done", True),
        wire.ToolResultBlock("toolu_2"),
        wire.ToolResultBlock("toolu_3", (TextBlock("a"), wire.ToolReferenceBlock("Read"))),
        wire.DocumentBlock(wire.TextSource("d"), "t"),
    )
    assert request.tools == (
        wire.Tool("Read", {"type": "object", "x": 1}, "Reads"),
        wire.Tool("Bare", {}, None, "custom"),
    )
    assert request.tool_choice == wire.ToolChoice("tool", "Read", True)
    assert request.thinking == wire.Thinking("enabled", 2048, "omitted")
    assert request.output_config == wire.OutputConfig("high", wire.JsonSchemaFormat({"type": "object"}))
    assert (request.stream, request.temperature, request.top_k, request.stop_sequences) == (True, 1.0, 40, ("END",))


def test_cache_markers_do_not_make_two_requests_differ() -> None:
    marked = {**MINIMAL, "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", **MARK}]}], **MARK}
    plain = {**MINIMAL, "messages": [{"role": "user", "content": [{"text": "Hi", "type": "text"}]}]}
    assert decode_request(encoded(marked)) == decode_request(encoded(plain))


@pytest.mark.parametrize("thinking", [{"type": "adaptive", "display": "summarized"}, {"type": "disabled"}, None])
@pytest.mark.parametrize("choice", [{"type": "auto"}, {"type": "any"}, {"type": "none"}, None])
def test_every_mode_of_thinking_and_tool_choice_is_read(thinking: object, choice: object) -> None:
    request = decode_request(encoded({**AGENT, "thinking": thinking, "tool_choice": choice}))
    assert (request.thinking and request.thinking.type) == (thinking and thinking["type"])
    assert (request.tool_choice and request.tool_choice.type) == (choice and choice["type"])


def test_count_tokens_reads_the_same_prompt_without_max_tokens() -> None:
    body = {name: value for name, value in AGENT.items() if name != "max_tokens"}
    counted, request = decode_count_tokens(encoded(body)), decode_request(encoded(AGENT))
    for name in counted.__struct_fields__:
        assert getattr(counted, name) == getattr(request, name)
    with pytest.raises(InvalidRequest, match="messages: at least one message is required"):
        decode_count_tokens(encoded({"model": "m", "messages": []}))


BAD_FIELDS = [
    ({"messages": []}, "messages: at least one message is required"),
    ({"messages": {}}, "messages: expected array, got {}"),
    ({"messages": ["Hi"]}, 'messages[0]: expected object, got "Hi"'),
    ({"messages": [USER, {"role": "user"}]}, "messages[1].content: field required"),
    ({"messages": [{"content": ""}]}, "messages[0].role: field required"),
    (
        {"messages": [{"role": "developer", "content": ""}]},
        'messages[0].role: expected user, assistant, system, got "developer"',
    ),
    ({"max_tokens": -1}, "max_tokens: expected int >= 0, got -1"),
    ({"max_tokens": "9"}, 'max_tokens: expected int, got "9"'),
    ({"max_tokens": 1.5}, "max_tokens: expected int, got 1.5"),
    ({"max_tokens": None}, "max_tokens: expected int, got null"),
    ({"max_tokens": 2**31}, "max_tokens: expected int <= 2147483647, got 2147483648"),
    ({"max_tokens": True}, "max_tokens: expected int, got true"),
    ({"model": 3}, "model: expected str, got 3"),
    ({"stream": "yes"}, 'stream: expected bool, got "yes"'),
    ({"system": 3}, "system: expected str | array | null, got 3"),
    ({"system": [{"type": "text"}]}, "system[0].text: field required"),
    ({"temperature": 2.5}, "temperature: expected float <= 2.0, got 2.5"),
    ({"temperature": -1}, "temperature: expected float >= 0.0, got -1"),
    ({"top_p": 1.5}, "top_p: expected float <= 1.0, got 1.5"),
    ({"top_k": -1}, "top_k: expected int >= 0, got -1"),
    ({"stop_sequences": "END"}, 'stop_sequences: expected array | null, got "END"'),
    ({"stop_sequences": ["END", ""]}, 'stop_sequences[1]: expected str of length >= 1, got ""'),
    ({"stop_sequences": ["x"] * 65}, "stop_sequences: expected array of length <= 64, got 65"),
    ({"stop_sequences": ["END", "é" * 257]}, "stop_sequences[1]: expected str of length <= 256, got 257"),
    ({"tools": [{"name": "a"}]}, "tools[0].input_schema: field required"),
    ({"tools": [{"name": "", "input_schema": {}}]}, 'tools[0].name: expected str of length >= 1, got ""'),
    ({"tools": [{"name": "a", "input_schema": []}]}, "tools[0].input_schema: expected object, got []"),
    (
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        'tools[0].type: expected custom (the vendor\'s own tools are not available here), got "web_search_20250305"',
    ),
    ({"tool_choice": {"type": "some"}}, 'tool_choice.type: expected auto, any, tool, none, got "some"'),
    ({"tool_choice": {"type": "any"}}, "tool_choice: expected 'any' together with tools, got no tools"),
    (
        {"tool_choice": {"type": "tool", "name": "q"}},
        "tool_choice.name: expected the name of one of tools, got 'q'",
    ),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name: expected the name of one of tools, got None"),
    ({"thinking": {"type": "enabled"}}, "thinking: expected budget_tokens with type 'enabled', got no budget_tokens"),
    (
        {"thinking": {"type": "enabled", "budget_tokens": 0}},
        "thinking.budget_tokens: expected int >= 1, got 0",
    ),
    ({"thinking": {"type": "deep"}}, 'thinking.type: expected enabled, adaptive, between_tools, disabled, got "deep"'),
    ({"output_config": {"format": {"type": "xml"}}}, 'output_config.format.type: expected json_schema, got "xml"'),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS)
def test_a_refusal_names_the_field_what_was_expected_and_what_was_found(fields: dict[str, Any], message: str) -> None:
    assert refusal({**MINIMAL, **fields}) == message


@pytest.mark.parametrize(("number", "name"), [(b"9" * 5000, "Integer value"), (b"1e999", "Number")])
def test_a_number_that_python_cannot_hold_is_refused(number: bytes, name: str) -> None:
    tool = {"name": "t", "input_schema": {"n": 0}}
    body = encoded({**MINIMAL, "tools": [tool]}).replace(b'"n": 0', b'"n": ' + number)
    assert refusal(body) == f"tools[0].input_schema[...]: {name} out of range"


def test_what_is_ignored_is_not_kept() -> None:
    ignored = {"metadata": {"a": []}, "service_tier": "auto", "context_management": {"edits": []}, "new": [1]}
    assert decode_request(encoded(MINIMAL | ignored)) == decode_request(encoded(MINIMAL))
    assert not ignored.keys() & set(wire.MessagesRequest.__struct_fields__)


@pytest.mark.parametrize("name", MINIMAL)
def test_a_missing_field_is_named(name: str) -> None:
    assert refusal({key: value for key, value in MINIMAL.items() if key != name}) == f"{name}: field required"


@pytest.mark.parametrize("body", [[], None, 3, "Hi"])
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    assert refusal(body) == f"body: expected object, got {json.dumps(body)}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b"\xef\xbb\xbf{}",
        b"{'model': 1}",
        encoded(MINIMAL) + b"}",
        encoded(MINIMAL)[:-1],
        encoded(MINIMAL).replace(b"Hi", b"\xff"),
        encoded(MINIMAL).replace(b"Hi", b"\xed\xa0\x80"),
        encoded(MINIMAL).replace(b"Hi", b"\\ud80"),
        encoded({**MINIMAL, "metadata": {"a": float("nan")}}),
        b"[" * 100_000,
        b'{"metadata": ' + b'{"a":' * 100_000,
        b'{"unknown": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_malformed_json_and_text_are_refused(body: bytes) -> None:
    assert refusal(body).startswith("body: expected ")


@pytest.mark.parametrize(
    ("text", "read"),
    [("\ud800", "\ufffd"), ("a\ud83d\ud83d", "a\ufffd\ufffd"), ("\udc00b", "\ufffdb"), ("\ud83d\ude00", "\U0001f600")],
)
def test_half_a_surrogate_pair_is_read_as_a_replacement_character(text: str, read: str) -> None:
    body = {**MINIMAL, "messages": [{"role": "user", "content": text}], "metadata": {text: text}}
    assert wire.decode_request(encoded(body)).messages[0].content == read


@pytest.mark.parametrize(
    "body",
    [
        b'{"max_tokens": 0, "messages": "\xff"}',
        b'{"max_tokens": 0, "messages": ' + b"[" * 100_000,
        b'{"messages": [{"role": 1}], "messages": 1}',
        b'{"messages": [{"role": 1}], "messages": []}',
        b'{"messages": [{"role": 1}], "messages": [[]]}',
    ],
)
def test_a_refusal_does_not_need_the_value_that_it_would_show(body: bytes) -> None:
    assert refusal(body).endswith("got an unreadable value")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["text", "user", "image"]),
    lambda values: (
        st.lists(values, max_size=4) | st.dictionaries(st.text() | st.sampled_from([*AGENT]), values, max_size=4)
    ),
    max_leaves=12,
)


def decodes_or_is_refused(body: bytes) -> None:
    for decode in (decode_request, decode_count_tokens):
        with contextlib.suppress(InvalidRequest):
            decode(body)


@given(json_values)
def test_any_json_is_read_or_refused(body: object) -> None:
    decodes_or_is_refused(encoded(body))


@given(st.dictionaries(st.sampled_from([*AGENT]), json_values))
def test_any_value_of_a_field_is_read_or_refused(fields: dict[str, object]) -> None:
    decodes_or_is_refused(encoded({**MINIMAL, **fields}))


@given(mutated(AGENT, json_values))
@settings(max_examples=300)
def test_a_mutated_request_is_read_or_refused(body: object) -> None:
    decodes_or_is_refused(encoded(body))


@given(st.integers(0, len(encoded(AGENT)) - 1), st.binary(max_size=3), st.integers(0, 3))
def test_a_request_with_broken_bytes_is_read_or_refused(at: int, junk: bytes, cut: int) -> None:
    body = encoded(AGENT)
    decodes_or_is_refused(body[:at] + junk + body[at + cut :])


def test_the_official_client_writes_requests_that_we_read() -> None:
    bodies: list[bytes] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        bodies.append(request.read())
        message = answers.Message(id="msg_1", model="m", usage=answers.Usage(1))
        return httpx2.Response(200, content=answers.encode(message), request=request)

    http_client = anthropic.DefaultHttpxClient(transport=httpx2.MockTransport(answer))
    client = anthropic.Anthropic(api_key="none", base_url="http://test", http_client=http_client)
    fields = {name: AGENT[name] for name in ("model", "system", "messages", "tools", "tool_choice", "thinking")}
    client.messages.create(max_tokens=9, **fields)
    request, direct = decode_request(bodies[0]), decode_request(encoded(AGENT))
    assert all(getattr(request, name) == getattr(direct, name) for name in fields)
