"""Chat Completions as a translation, its errors and models; and the official client against a real server."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import httpx2
import openai
import pytest
from hypothesis import given, settings
from openai.types import Model as SdkModel
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from experiments.harness.server import Server
from serve.api import answers
from serve.api import messages as wire
from serve.api.messages import InputMessage, InvalidRequest, TextBlock, decode_request
from serve.api.openai import read_chat
from serve.api.openai.chat_answer import ChatWriter
from serve.api.openai.errors import error_body, is_openai, status_of
from serve.api.openai.models import model_body, models_body
from serve.server.prepare import seed_of
from tests.helpers.http import CONTEXT, ask, encoded, long, post, prompt_tokens, text_of
from tests.helpers.mutations import mutated
from tests.helpers.openai_clients import (
    ANSWER,
    ANY_REQUEST,
    BROKEN,
    EVENTS,
    Translation,
    client_of,
    data_of,
    json_values,
    served_or_refused,
    streaming,
)

USER = {"role": "user", "content": "Hi"}
MINIMAL = {"model": "any/name", "messages": [USER]}
SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
READ = {"type": "function", "function": {"name": "read", "description": "Reads", "parameters": SCHEMA, "strict": True}}
NOW = {"type": "function", "function": {"name": "now"}}

# The shape of an agent's request, with each field that we read and unknown ones at each level.
AGENT = {
    "model": "local-model",
    "messages": [
        {"role": "system", "content": "You are", "name": "s"},
        {"role": "developer", "content": [{"type": "text", "text": "a coder."}, {"type": "text", "text": "Brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Hi 😀\n", "new": 1}], "name": "u"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Let me see",
            "refusal": None,
            "audio": None,
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "read", "arguments": '{"b": 1.5, "a": {}}'}},
                {"id": "call_2", "function": {"name": "now", "arguments": ""}},
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "noon"}]},
        {"role": "developer", "content": "Plan mode is on."},
        {"role": "assistant", "content": [{"type": "text", "text": "Half"}, {"type": "refusal", "refusal": "No."}]},
        {"role": "user", "content": ""},
    ],
    "tools": [READ, NOW],
    "tool_choice": {"type": "function", "function": {"name": "read"}},
    "parallel_tool_calls": False,
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
    "reasoning_effort": "high",
    "max_completion_tokens": 100,
    "max_tokens": 7,
    "stop": ["END", "STOP"],
    "temperature": 1,
    "top_p": 0.9,
    "stream": True,
    "stream_options": {"include_usage": True, "new": 1},
    "n": 1,
    "user": "u",
    "metadata": {"a": "b"},
    "prompt_cache_key": "k",
    "seed": 7,
    "logit_bias": {"1": -100},
    "new": [None],
}


translated = Translation(read_chat, MINIMAL)
refusal = translated.refusal


class TestRequests:
    def test_a_minimal_request_has_all_the_room_and_no_options(self) -> None:
        request = translated()
        assert (request.model, request.messages) == ("any/name", (InputMessage("user", "Hi"),))
        assert (request.max_tokens, request.stream) == (2**31 - 1, False)
        rest = ("system", "tools", "tool_choice", "thinking", "output_config", "stop_sequences", "temperature", "top_p")
        assert {getattr(request, name) for name in rest} == {None}

    def test_null_is_as_good_as_nothing(self) -> None:
        fields = {name: None for name in AGENT if name not in ("model", "messages")}
        assert translated(**fields) == translated()

    def test_an_agents_request_is_translated_whole(self) -> None:
        assert read_chat(encoded(AGENT))[0] == wire.SeededRequest(
            model="local-model",
            system=(TextBlock("You are"), TextBlock("a coder."), TextBlock("Brief.")),
            messages=(
                InputMessage("user", (TextBlock("Hi 😀\n"),)),
                InputMessage(
                    "assistant",
                    (
                        wire.ThinkingBlock("Let me see", ""),
                        TextBlock("I look."),
                        wire.ToolUseBlock("call_1", "read", {"b": 1.5, "a": {}}),
                        wire.ToolUseBlock("call_2", "now", {}),
                    ),
                ),
                InputMessage("user", (wire.ToolResultBlock("call_1", "done"),)),
                InputMessage("user", (wire.ToolResultBlock("call_2", (TextBlock("noon"),)),)),
                InputMessage("system", "Plan mode is on."),
                InputMessage("assistant", (TextBlock("Half"), TextBlock("No."))),
                InputMessage("user", ""),
            ),
            tools=(wire.Tool("read", SCHEMA, "Reads"), wire.Tool("now", {"type": "object", "properties": {}})),
            tool_choice=wire.ToolChoice("tool", "read", True),
            thinking=wire.Thinking("adaptive"),
            output_config=wire.OutputConfig("high", wire.JsonSchemaFormat(SCHEMA)),
            max_tokens=100,
            stop_sequences=("END", "STOP"),
            temperature=1.0,
            top_p=0.9,
            stream=True,
            seed=7,
            places=(2, 3, 4, 5, 6, 7, 8),
        )

    def test_arguments_keep_their_order(self) -> None:
        request, _ = read_chat(encoded(AGENT))
        assert list(request.messages[1].content[2].input) == ["b", "a"]

    def test_instructions_alone_are_a_message(self) -> None:
        request = translated(messages=[{"role": "system", "content": "One"}, {"role": "developer", "content": "Two"}])
        assert (request.system, request.messages) == ((TextBlock("One"),), (InputMessage("system", "Two"),))

    @pytest.mark.parametrize(
        ("choice", "parallel", "expected"),
        [
            (None, None, wire.ToolChoice("auto")),
            ("auto", True, wire.ToolChoice("auto")),
            ("none", None, wire.ToolChoice("none")),
            ("required", False, wire.ToolChoice("any", None, True)),
            ({"type": "function", "function": {"name": "now"}}, None, wire.ToolChoice("tool", "now")),
        ],
    )
    def test_tool_choices(self, choice: object, parallel: object, expected: wire.ToolChoice) -> None:
        request = translated(tools=[READ, NOW], tool_choice=choice, parallel_tool_calls=parallel)
        assert request.tool_choice == expected
        if choice in (None, "auto", "none"):
            assert translated(tool_choice=choice, parallel_tool_calls=parallel).tool_choice is None

    @pytest.mark.parametrize(
        ("wanted", "expected"),
        [
            ({"type": "text"}, None),
            ({"type": "json_object"}, {"type": "object"}),
            ({"type": "json_schema", "json_schema": {"name": "n"}}, {"type": "object"}),
            ({"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}, {}),
        ],
    )
    def test_response_formats(self, wanted: object, expected: object) -> None:
        config = translated(response_format=wanted).output_config
        assert (config and config.format and config.format.schema) == expected

    @pytest.mark.parametrize(("effort", "thinking"), [("none", "disabled"), ("minimal", "adaptive"), ("x", "adaptive")])
    def test_who_speaks_of_effort_gets_reasoning_unless_it_is_none(self, effort: str, thinking: str) -> None:
        request = translated(reasoning_effort=effort)
        assert request.thinking == wire.Thinking(thinking)
        assert request.output_config == (None if effort == "none" else wire.OutputConfig(effort))

    def test_the_older_name_of_the_limit_and_a_single_stop(self) -> None:
        request = translated(max_tokens=7, stop="END")
        assert (request.max_tokens, request.stop_sequences) == (7, ("END",))


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, -1, -(2**63), 2**64, -(2**200), 10**400])
def test_any_integer_is_a_seed_of_32_bits_and_small_ones_are_themselves(seed: int) -> None:
    made = seed_of(translated(seed=seed))
    assert 0 <= made < 2**32
    assert made == seed_of(translated(seed=seed))
    assert made == seed or not 0 <= seed < 2**32


def test_without_a_seed_each_request_has_another() -> None:
    assert len({seed_of(translated()) for _ in range(8)}) == 8
    with_seed = decode_request(encoded(MINIMAL | {"max_tokens": 1, "seed": 7}))  # a field that this API does not know
    assert len({seed_of(with_seed) for _ in range(8)}) == 8


def said(**message: Any) -> dict[str, Any]:
    return {"messages": [USER, message]}


Q = {"type": "function", "function": {"name": "q"}}
ALLOWED_Q = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [Q]}}
REFUSED = [
    ({"messages": []}, "messages: at least one message is required"),
    ({"messages": "Hi"}, 'messages: expected array, got "Hi"'),
    (said(content=""), "messages[1].role: field required"),
    (said(role=3), "messages[1].role: expected str, got 3"),
    ({"messages": [USER, "Hi"]}, 'messages[1]: expected object, got "Hi"'),
    ({"n": 2}, "n: expected 1, got 2"),
    ({"max_tokens": 0}, "max_tokens: expected int >= 1, got 0"),
    ({"max_completion_tokens": 2**31}, "max_completion_tokens: expected int <= 2147483647, got 2147483648"),
    ({"temperature": 2.5}, "temperature: expected float <= 2.0, got 2.5"),
    ({"top_p": -1}, "top_p: expected float >= 0.0, got -1"),
    ({"stop": ""}, 'stop: expected str of length >= 1, got ""'),
    ({"stop": ["a", ""]}, 'stop[1]: expected str of length >= 1, got ""'),
    ({"stop": ["a"] * 65}, "stop: expected array of length <= 64, got 65"),
    ({"stop": "a" * 257}, "stop: expected str of length <= 256, got 257"),
    ({"tools": [{"type": "custom"}]}, "tools[0].custom: field required"),
    ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].custom.name: field required"),
    ({"tools": [{"type": "function"}]}, "tools[0].function: field required"),
    ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name: expected str of length"),
    ({"tool_choice": "any"}, 'tool_choice: expected none, auto, required, got "any"'),
    ({"tool_choice": "required"}, "tool_choice: expected 'required' together with tools, got no tools"),
    (
        {"tool_choice": {"type": "function", "function": {"name": "q"}}, "tools": [NOW]},
        "tool_choice: expected the name of one of tools, got 'q'",
    ),
    ({"tool_choice": {"type": "web_search"}}, "tool_choice.type: expected function, custom, allowed_tools (oth"),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools: field required"),
    (
        {"tool_choice": ALLOWED_Q, "tools": [NOW]},
        "tool_choice.allowed_tools.tools[0]: expected the name of one of tools, got 'q'",
    ),
    ({"tool_choice": "required", "tools": [{"type": "web_search"}]}, "tool_choice: expected 'required' together"),
    ({"function_call": {"name": "q"}, "functions": [{"name": "now"}]}, "tool_choice: expected the name of one of"),
    ({"logprobs": True}, "logprobs: expected none, as this server returns no log probabilities: leave it out"),
    ({"top_logprobs": 5}, "top_logprobs: expected none, as this server returns no log probabilities"),
    ({"response_format": {"type": "xml"}}, 'response_format.type: expected text, json_object, json_schema, got "xml"'),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema: field required"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_a_refusal_names_the_field_what_was_expected_and_what_was_found(fields: dict[str, Any], message: str) -> None:
    assert refusal(**fields).startswith(message)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[]", b'{"metadata": ' + b'{"a":' * 100_000])
def test_a_body_that_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="body: expected "):
        read_chat(body)


@given(mutated(AGENT, json_values))
@settings(max_examples=300)
def test_a_mutated_request_is_read_or_refused(body: object) -> None:
    with contextlib.suppress(InvalidRequest):
        read_chat(encoded(body))


def written(events: list[answers.Event], with_usage: bool = False) -> bytes:
    writer = ChatWriter(1_700_000_000, with_usage)
    return b"".join(map(writer.event, events))


class TestAnswers:
    def test_chunks_come_in_order_and_the_official_type_loses_nothing(self) -> None:
        *chunks, done = data_of(written(EVENTS, with_usage=True))
        assert done == b"[DONE]"
        for chunk in chunks:
            read = ChatCompletionChunk.model_validate_json(chunk, strict=True)
            assert json.loads(read.model_dump_json(exclude_unset=True)) == json.loads(chunk)
            assert (read.id, read.model, read.created) == ("chatcmpl-1", "local/model", 1_700_000_000)
        *steps, last, counts = [json.loads(chunk) for chunk in chunks]
        assert [step["choices"][0]["delta"] for step in steps] == [
            {"role": "assistant", "content": ""},
            {"reasoning_content": "Let me\u2028"},
            {"reasoning_content": "see"},
            {"content": "Hi 😀"},
            {"content": "\r\n\n"},
            {"tool_calls": [call(0, "", "toolu_1", "read")]},
            {"tool_calls": [call(0, '{"path":"a\\nb",')]},
            {"tool_calls": [call(0, '"n":1.5}')]},
            {"tool_calls": [call(1, "", "toolu_2", "now")]},
            {"tool_calls": [call(1, "{}")]},
        ]
        assert all(step["usage"] is None and step["choices"][0]["finish_reason"] is None for step in steps)
        assert last["choices"] == [{"delta": {}, "finish_reason": "tool_calls", "index": 0}]
        assert counts["choices"] == []
        assert counts["usage"] == {
            "prompt_tokens": 15,
            "completion_tokens": 11,
            "total_tokens": 26,
            "prompt_tokens_details": {"cached_tokens": 7},
        }

    def test_usage_is_reported_only_where_it_is_asked_for(self) -> None:
        assert b"usage" not in written(EVENTS)
        asked = read_chat(encoded(MINIMAL | {"stream": True, "stream_options": {"include_usage": True}}))[1]
        assert (asked.with_usage, read_chat(encoded(MINIMAL))[1].with_usage) == (True, False)

    def test_pings_are_comments(self) -> None:
        assert written([answers.Ping()]) == b": ping\n\n"

    def test_the_official_client_assembles_the_stream_to_the_whole_answer(self) -> None:
        asked = {"model": "m", "messages": [USER]}
        whole = client_of(ChatWriter(1_700_000_000).whole(ANSWER)).chat.completions.create(**asked)
        with streaming(written(EVENTS, True)).chat.completions.stream(
            **asked, stream_options={"include_usage": True}
        ) as stream:
            final = stream.get_final_completion()
        kept = {"id", "created", "model", "usage", "choices"}
        streamed = json.loads(final.model_dump_json(include=kept, exclude_none=True))
        for tool_call in streamed["choices"][0]["message"]["tool_calls"]:
            del tool_call["index"]
        assert streamed == json.loads(whole.model_dump_json(include=kept, exclude_none=True))

    def test_the_official_type_reads_a_whole_answer_and_loses_nothing(self) -> None:
        body = ChatWriter(1_700_000_000).whole(ANSWER)
        read = ChatCompletion.model_validate_json(body, strict=True)
        assert json.loads(read.model_dump_json(exclude_unset=True)) == json.loads(body)
        assert json.loads(body)["choices"] == [
            {
                "message": {
                    "role": "assistant",
                    "content": "Hi 😀\r\n\n",
                    "reasoning_content": "Let me\u2028see",
                    "tool_calls": [
                        {
                            "id": "toolu_1",
                            "function": {"name": "read", "arguments": '{"path":"a\\nb","n":1.5}'},
                            "type": "function",
                        },
                        {"id": "toolu_2", "function": {"name": "now", "arguments": "{}"}, "type": "function"},
                    ],
                    "refusal": None,
                },
                "finish_reason": "tool_calls",
                "index": 0,
                "logprobs": None,
            }
        ]

    def test_an_answer_comes_back_as_it_went_out(self) -> None:
        whole = client_of(ChatWriter(0).whole(ANSWER)).chat.completions.create(model="m", messages=[USER])
        request = translated(messages=[USER, whole.choices[0].message.to_dict()])
        expected = (wire.ThinkingBlock("Let me\u2028see"), *ANSWER.content[1:])
        assert request.messages[1] == InputMessage("assistant", expected)

    @pytest.mark.parametrize(
        ("stop", "finish"),
        [
            ("end_turn", "stop"),
            ("stop_sequence", "stop"),
            ("max_tokens", "length"),
            ("model_context_window_exceeded", "length"),
            ("tool_use", "tool_calls"),
            ("refusal", "content_filter"),
        ],
    )
    def test_reasons_to_finish(self, stop: answers.StopReason, finish: str) -> None:
        message = answers.Message(id="msg_1", model="m", stop_reason=stop, usage=answers.Usage(1))
        (choice,) = json.loads(ChatWriter(0).whole(message))["choices"]
        assert (choice["finish_reason"], choice["message"]["content"]) == (finish, "")
        (chunk,) = data_of(written([answers.MessageDelta(answers.Stop(stop), answers.Usage(1))]))
        assert json.loads(chunk)["choices"][0]["finish_reason"] == finish

    def test_a_stream_that_breaks_raises_in_the_official_client(self) -> None:
        body = written([*EVENTS[:6], BROKEN])
        assert b"[DONE]" not in body
        with pytest.raises(openai.APIError, match="the device is gone"):
            list(streaming(body).chat.completions.create(model="m", messages=[USER], stream=True))


def call(index: int, arguments: str, id: str | None = None, name: str | None = None) -> dict[str, Any]:
    function = {"arguments": arguments} | ({"name": name} if name else {})
    return {"index": index, "function": function} | ({"id": id, "type": "function"} if id else {})


CHAT_PATH, RESPONSES_PATH = "/v1/chat/completions", "/v1/responses"


class TestErrors:
    @pytest.mark.parametrize(
        ("status", "raised", "kind", "code"),
        [
            (400, openai.BadRequestError, "invalid_request_error", None),
            (401, openai.AuthenticationError, "invalid_request_error", "invalid_api_key"),
            (404, openai.NotFoundError, "invalid_request_error", None),
            (413, openai.APIStatusError, "invalid_request_error", None),
            (429, openai.RateLimitError, "rate_limit_error", "rate_limit_exceeded"),
            (500, openai.InternalServerError, "server_error", None),
            (529, openai.InternalServerError, "server_error", "server_is_overloaded"),
        ],
    )
    def test_the_official_client_raises_its_own(
        self, status: int, raised: type[openai.APIStatusError], kind: str, code: str | None
    ) -> None:
        client = client_of(error_body(status, "out of room", CHAT_PATH), status_of(status))
        with pytest.raises(raised, match="out of room") as caught:
            client.chat.completions.create(model="m", messages=[USER])
        error = caught.value
        assert (error.status_code, error.type, error.code) == (503 if status == 529 else status, kind, code)

    @pytest.mark.parametrize(
        ("message", "path", "told", "param"),
        [
            ("n: expected 1, got 2", CHAT_PATH, "n: expected 1, got 2", "n"),
            (
                "messages[1].content[0]: expected",
                CHAT_PATH,
                "messages[1].content[0]: expected",
                "messages[1].content[0]",
            ),
            ("tools[0].input_schema: x", CHAT_PATH, "tools[0].function.parameters: x", "tools[0].function.parameters"),
            ("tools[0].input_schema: x", RESPONSES_PATH, "tools[0].parameters: x", "tools[0].parameters"),
            (
                "output_config.format.schema: x",
                CHAT_PATH,
                "response_format.json_schema.schema: x",
                "response_format.json_schema.schema",
            ),
            ("output_config.format.schema: x", RESPONSES_PATH, "text.format.schema: x", "text.format.schema"),
            ("messages: x", RESPONSES_PATH, "input: x", "input"),
            ("messages[0].content: x", RESPONSES_PATH, "input[0].content: x", "input[0].content"),
            ("no such route, use /v1/messages", RESPONSES_PATH, "no such route, use /v1/messages", None),
            ("body: expected a JSON object", CHAT_PATH, "body: expected a JSON object", None),
            ("no field here", CHAT_PATH, "no field here", None),
        ],
    )
    def test_a_field_has_the_name_that_the_client_knows(
        self, message: str, path: str, told: str, param: str | None
    ) -> None:
        error = json.loads(error_body(400, message, path))["error"]
        assert (error["message"], error["param"]) == (told, param)

    def test_a_prompt_that_is_too_long_has_its_code(self) -> None:
        error = json.loads(error_body(400, "prompt is too long: 9 tokens > 8 maximum", CHAT_PATH))["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")

    @pytest.mark.parametrize(
        ("path", "headers", "openai_form"),
        [
            (CHAT_PATH, [b"anthropic-version"], True),
            (RESPONSES_PATH, [], True),
            ("/v1/models", [], True),
            ("/v1/models/a/b", [b"anthropic-version"], False),
            ("/v1/messages", [], False),
        ],
    )
    def test_who_is_answered_in_this_form(self, path: str, headers: list[bytes], openai_form: bool) -> None:
        assert is_openai(path, headers) == openai_form


def test_the_official_client_reads_the_models() -> None:
    (listed,) = client_of(models_body("org/name", 100)).models.list()
    found = client_of(model_body("org/name", 100)).models.retrieve("org/name")
    assert listed == found == SdkModel.model_validate_json(model_body("org/name", 100), strict=True)
    assert found.to_dict() == {
        "id": "org/name",
        "object": "model",
        "created": 0,
        "owned_by": "tokenzero",
        "context_window": 100,
        "max_output_tokens": 99,
    }


def test_the_official_client_writes_requests_that_we_read() -> None:
    bodies: list[bytes] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        bodies.append(request.read())
        return httpx2.Response(200, content=ChatWriter(0).whole(ANSWER), request=request)

    http_client = openai.DefaultHttpxClient(transport=httpx2.MockTransport(answer))
    sdk = openai.OpenAI(api_key="none", base_url="http://test/v1", http_client=http_client)
    sdk.chat.completions.create(**{name: value for name, value in AGENT.items() if name not in ("new", "stream")})
    assert read_chat(bodies[0])[0] == read_chat(encoded(AGENT | {"stream": False}))[0]


# Against a real server.


@pytest.fixture
def sdk(server: Server, client: httpx.Client) -> Iterator[openai.OpenAI]:
    """The official client, which repeats nothing by itself."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as sdk:
        yield sdk


QUESTION = {"role": "user", "content": "Hello from the other SDK"}
ASKED = {"model": "gpt-x", "messages": [QUESTION], "temperature": 0, "max_completion_tokens": 20}


class TestServed:
    def test_a_completion_says_what_the_messages_api_says(self, sdk: openai.OpenAI, client: httpx.Client) -> None:
        message = post(client, ask(QUESTION["content"], 20))
        completion = sdk.chat.completions.create(**ASKED)
        (choice,) = completion.choices
        assert (completion.model, choice.message.content) == ("gpt-x", text_of(message))
        assert choice.finish_reason == "length"
        assert completion.usage.prompt_tokens == prompt_tokens(message["usage"])
        assert completion.usage.completion_tokens == 20
        assert completion.usage.prompt_tokens_details.cached_tokens > 0
        assert completion._request_id.startswith("req_")

    def test_a_stream_gathers_to_the_whole(self, sdk: openai.OpenAI) -> None:
        whole = sdk.chat.completions.create(**ASKED)
        *chunks, counts = sdk.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True})
        deltas = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(deltas) == whole.choices[0].message.content
        assert [chunk.choices[0].finish_reason for chunk in chunks] == [*[None] * (len(chunks) - 1), "length"]
        assert counts.usage.prompt_tokens == whole.usage.prompt_tokens
        assert counts.usage.completion_tokens == 20

    def test_a_stop_is_left_out(self, sdk: openai.OpenAI) -> None:
        text = sdk.chat.completions.create(**ASKED).choices[0].message.content
        (stopped,) = sdk.chat.completions.create(**ASKED, stop=text[5:9]).choices
        assert (stopped.message.content, stopped.finish_reason) == (text[: text.index(text[5:9])], "stop")

    def test_a_seed_settles_what_is_sampled(self, sdk: openai.OpenAI) -> None:
        asked = ASKED | {"temperature": 1.5}

        def said(seed: int) -> str | None:
            return sdk.chat.completions.create(**asked, seed=seed).choices[0].message.content

        seeds = (0, 7, -1, 2**32 - 1, 2**32 + 7, -(2**63), 2**63 - 1)
        answers = [said(seed) for seed in seeds]
        assert [said(seed) for seed in seeds] == answers
        assert len(set(answers)) == len(seeds)

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_required_tool_is_called_and_its_result_read(self, sdk: openai.OpenAI, stream: bool) -> None:
        schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
        tool = {
            "type": "function",
            "function": {"name": "switch", "parameters": schema | {"additionalProperties": False}},
        }
        asked = ASKED | {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
        asked |= {"max_completion_tokens": 200, "temperature": 1}
        if stream:
            with sdk.chat.completions.stream(**asked) as events:
                (choice,) = events.get_final_completion().choices
        else:
            (choice,) = sdk.chat.completions.create(**asked).choices
        (made,) = choice.message.tool_calls
        assert (choice.finish_reason, made.type, made.function.name) == ("tool_calls", "function", "switch")
        assert type(json.loads(made.function.arguments)["on"]) is bool
        answer = {"role": "assistant", "tool_calls": [made.to_dict()]}
        result = {"role": "tool", "tool_call_id": made.id, "content": "done"}
        follow = sdk.chat.completions.create(**ASKED | {"messages": [QUESTION, answer, result], "tools": [tool]})
        assert follow.usage.prompt_tokens_details.cached_tokens > 0

    def test_json_obeys_its_schema(self, sdk: openai.OpenAI) -> None:
        schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
        schema |= {"additionalProperties": False}
        wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        asked = ASKED | {"temperature": 2, "max_completion_tokens": 100}
        content = sdk.chat.completions.create(**asked, response_format=wanted).choices[0].message.content
        assert json.loads(content)["n"] in (1, 2)

    def test_models_are_listed_and_found_by_any_name(self, sdk: openai.OpenAI) -> None:
        (listed,) = sdk.models.list()
        assert (listed.id, listed.context_window) == ("tiny-model", CONTEXT)
        assert sdk.models.retrieve("tiny-model") == listed
        assert sdk.models.retrieve("org/name").id == "org/name"

    def test_errors_arrive_as_the_sdks_own(self, sdk: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="n: expected 1, got 2") as caught:
            sdk.chat.completions.create(**ASKED, n=2)
        assert (caught.value.param, caught.value.type) == ("n", "invalid_request_error")
        with pytest.raises(openai.BadRequestError, match="prompt is too long") as caught:
            sdk.chat.completions.create(**ASKED | {"messages": [{"role": "user", "content": long(92, CONTEXT)}]})
        assert caught.value.code == "context_length_exceeded"
        wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"multipleOf": 10_000_019}}}
        with pytest.raises(openai.BadRequestError, match=r"response_format\.json_schema\.schema: "):
            sdk.chat.completions.create(**ASKED, response_format=wanted)
        with pytest.raises(openai.NotFoundError):
            sdk.chat.completions.retrieve("chatcmpl-1")
        with pytest.raises(openai.APIStatusError) as caught:
            sdk.chat.completions.create(**ASKED | {"messages": [{"role": "user", "content": "7" * 300_000}]})
        assert (caught.value.status_code, caught.value.type) == (413, "invalid_request_error")

    @ANY_REQUEST
    @given(body=mutated(AGENT | {"stream": False}, json_values))
    def test_any_request_is_served_or_refused_in_openais_form(self, client: httpx.Client, body: Any) -> None:
        served_or_refused(client, CHAT_PATH, body, "max_completion_tokens")
