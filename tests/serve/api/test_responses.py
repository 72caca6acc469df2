"""The Responses API as a translation; and the official client against a real server."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import openai
import pytest
from hypothesis import given, settings
from openai.types.responses import Response as SdkResponse
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from experiments.harness.server import Server
from serve.api import answers
from serve.api import messages as wire
from serve.api.messages import InputMessage, InvalidRequest, MessagesRequest, TextBlock
from serve.api.openai import read_responses
from serve.api.openai.responses_answer import ResponseWriter
from serve.api.openai.responses_request import ResponsesRequest
from tests.helpers.http import ask, encoded, post, prompt_tokens, text_of
from tests.helpers.mutations import mutated
from tests.helpers.openai_clients import (
    ANSWER,
    ANY_REQUEST,
    BROKEN,
    EVENTS,
    USAGE,
    Translation,
    client_of,
    data_of,
    json_values,
    served_or_refused,
    streaming,
)

MINIMAL = {"model": "any/name", "input": "Hi"}
SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
READ = {"type": "function", "name": "read", "description": "Reads", "parameters": SCHEMA, "strict": False}
NOW = {"type": "function", "name": "now", "parameters": None, "strict": False}
PATCH = {"type": "custom", "name": "patch", "description": "Patches", "format": {"type": "grammar", "syntax": "lark"}}
AGENTS = {"type": "namespace", "name": "agents", "description": "d", "tools": [{"type": "function", "name": "wait"}]}
SEARCH = {"type": "web_search", "external_web_access": False}
TEXT_INPUT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}

# The shape of Codex's request, with each field that we read and unknown ones at each level.
AGENT = {
    "model": "local-model",
    "instructions": "You are",
    "input": [
        {
            "type": "message",
            "id": "msg_0",
            "role": "developer",
            "content": [{"type": "input_text", "text": "a coder."}],
        },
        {"role": "system", "content": "Brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi 😀\n", "new": 1}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Let me see"}],
            "encrypted_content": "c2lnbmVk",
        },
        {
            "type": "message",
            "status": "completed",
            "id": "msg_1",
            "role": "assistant",
            "content": [
                {"type": "output_text", "text": "I look.", "annotations": []},
                {"type": "refusal", "refusal": "No"},
            ],
        },
        {
            "type": "function_call",
            "id": "fc_1",
            "call_id": "call_1",
            "name": "read",
            "arguments": '{"b": 1.5, "a": {}}',
        },
        {"type": "function_call", "call_id": "call_2", "name": "wait", "namespace": "agents", "arguments": ""},
        {"type": "function_call_output", "call_id": "call_1", "output": "done"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "noon"}]},
        {"type": "custom_tool_call", "call_id": "call_3", "name": "patch", "input": "+hello"},
        {"type": "custom_tool_call_output", "call_id": "call_3", "output": "patched"},
        {"type": "message", "role": "developer", "content": "Plan mode is on."},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Short"}], "encrypted_content": None},
        {"type": "reasoning", "summary": [], "encrypted_content": "foreign"},
        {"type": "reasoning", "summary": []},
        {"role": "user", "content": ""},
    ],
    "tools": [READ, SEARCH, PATCH, AGENTS],
    "tool_choice": {"type": "function", "name": "read"},
    "parallel_tool_calls": False,
    "reasoning": {"effort": "high", "summary": "auto", "new": 1},
    "text": {"verbosity": "low", "format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}},
    "max_output_tokens": 100,
    "temperature": 1,
    "top_p": 0.9,
    "stream": True,
    "store": False,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "k",
    "client_metadata": {"a": "b"},
    "new": [None],
}


translated = Translation(read_responses, MINIMAL)
refusal = translated.refusal


class TestRequests:
    def test_a_minimal_request_has_all_the_room_and_no_options(self) -> None:
        request = translated()
        assert (request.model, request.messages) == ("any/name", (InputMessage("user", "Hi"),))
        assert (request.max_tokens, request.stream) == (2**31 - 1, False)
        rest = ("system", "tools", "tool_choice", "thinking", "output_config", "stop_sequences", "temperature", "top_p")
        assert {getattr(request, name) for name in rest} == {None}

    def test_null_is_as_good_as_nothing(self) -> None:
        assert translated(**{name: None for name in AGENT if name not in ("model", "input")}) == translated()

    def test_an_agents_request_is_translated_whole(self) -> None:
        assert read_responses(encoded(AGENT))[0] == MessagesRequest(
            model="local-model",
            system=(TextBlock("You are"), TextBlock("a coder."), TextBlock("Brief.")),
            messages=(
                InputMessage("user", (TextBlock("Hi 😀\n"),)),
                InputMessage("assistant", (wire.ThinkingBlock("Let me see", "c2lnbmVk"),)),
                InputMessage("assistant", (TextBlock("I look."), TextBlock("No"))),
                InputMessage("assistant", (wire.ToolUseBlock("call_1", "read", {"b": 1.5, "a": {}}),)),
                InputMessage("assistant", (wire.ToolUseBlock("call_2", "agents__wait", {}),)),
                InputMessage("user", (wire.ToolResultBlock("call_1", "done"),)),
                InputMessage("user", (wire.ToolResultBlock("call_2", (TextBlock("noon"),)),)),
                InputMessage("assistant", (wire.ToolUseBlock("call_3", "patch", {"input": "+hello"}),)),
                InputMessage("user", (wire.ToolResultBlock("call_3", "patched"),)),
                InputMessage("system", "Plan mode is on."),
                InputMessage("assistant", (wire.ThinkingBlock("Short"),)),
                InputMessage("assistant", (wire.RedactedThinkingBlock("foreign"),)),
                InputMessage("user", ""),
            ),
            tools=(
                wire.Tool("read", SCHEMA, "Reads"),
                wire.Tool("patch", TEXT_INPUT, "Patches"),
                wire.Tool("agents__wait", {"type": "object", "properties": {}}),
            ),
            tool_choice=wire.ToolChoice("tool", "read", True),
            thinking=wire.Thinking("adaptive"),
            output_config=wire.OutputConfig("high", wire.JsonSchemaFormat(SCHEMA)),
            max_tokens=100,
            temperature=1.0,
            top_p=0.9,
            stream=True,
            left_out_tools=("web_search",),
            places=(*range(2, 14), 15),
        )

    @pytest.mark.parametrize(
        ("reasoning", "thinking"),
        [
            ({}, None),
            ({"summary": "auto"}, wire.Thinking("adaptive")),
            ({"effort": "low"}, wire.Thinking("adaptive")),
            ({"effort": "none", "summary": "auto"}, wire.Thinking("disabled")),
        ],
    )
    def test_who_speaks_of_effort_or_a_summary_gets_reasoning(
        self, reasoning: object, thinking: wire.Thinking | None
    ) -> None:
        assert translated(reasoning=reasoning).thinking == thinking

    def test_any_json_object(self) -> None:
        config = translated(text={"format": {"type": "json_object"}}).output_config
        assert config == wire.OutputConfig(None, wire.JsonSchemaFormat({"type": "object"}))
        assert translated(text={"format": {"type": "text"}}).output_config is None


REFUSED = [
    ({"input": []}, "input: expected array of length >= 1, got []"),
    ({"input": 3}, "input: expected str | array, got 3"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input: expected at least one message, got only reasoning"),
    ({"input": ["Hi"]}, 'input[0]: expected object, got "Hi"'),
    ({"previous_response_id": "resp_1"}, "previous_response_id: expected none, as nothing is stored here: send the wh"),
    ({"conversation": {"id": "conv_1"}}, "conversation: expected none"),
    ({"background": True}, "background: expected none"),
    ({"tools": [{"type": "function"}]}, "tools[0]: expected a name in a tool of type function, got none"),
    ({"tools": [{"name": "a"}]}, "tools[0].type: field required"),
    ({"tools": [SEARCH], "tool_choice": "required"}, "tool_choice: expected 'required' together with tools, got no to"),
    (
        {"tools": [READ, SEARCH], "tool_choice": {"type": "web_search"}},
        "tool_choice.type: expected function, custom, allowed_tools, local_shell, shell, apply_patch, tool_search, "
        "got 'web_search': it is not available here, so choose 'auto'",
    ),
    ({"tools": [READ], "tool_choice": {"type": "shell"}}, "tool_choice: expected the name of one of tools, got"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.name: field required"),
    (
        {"tools": [READ], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [NOW]}},
        "tool_choice.tools[0].name: expected the name of one of tools, got 'now'",
    ),
    (
        {"tools": [READ, SEARCH], "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [SEARCH]}},
        "tool_choice: expected 'required' together with tools, got no tools",
    ),
    ({"top_logprobs": 3}, "top_logprobs: expected none, as this server returns no log probabilities: leave it out"),
    ({"include": ["message.output_text.logprobs"]}, "include: expected none, as this server returns no log probab"),
    ({"tool_choice": {"type": "function", "name": "q"}}, "tool_choice: expected the name of one of tools, got 'q'"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type: expected text, json_object, json_schema, got "),
    ({"max_output_tokens": 0}, "max_output_tokens: expected int >= 1, got 0"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_a_refusal_names_the_field_what_was_expected_and_what_was_found(fields: dict[str, Any], message: str) -> None:
    assert refusal(**fields).startswith(message)


@given(mutated(AGENT, json_values))
@settings(max_examples=300)
def test_a_mutated_request_is_read_or_refused(body: object) -> None:
    with contextlib.suppress(InvalidRequest):
        read_responses(encoded(body))


def writer(**fields: Any) -> ResponseWriter:
    asked = encoded(MINIMAL | {"tools": [READ, SEARCH, NOW, PATCH, AGENTS]} | fields)
    made = ResponseWriter(msgspec.json.decode(asked, type=ResponsesRequest), 1_700_000_000)
    made.begin("msg_1", MINIMAL["model"])
    return made


def written(events: list[answers.Event], **fields: Any) -> bytes:
    asked = writer(**fields)
    return b"".join(map(asked.event, events))


def response_events(events: list[answers.Event], **fields: Any) -> list[dict[str, Any]]:
    return [json.loads(data) for data in data_of(written(events, **fields))]


def calling(name: str, arguments: str) -> list[answers.Event]:
    """The events of a block that calls a tool."""
    return [
        answers.ContentBlockStart(0, wire.ToolUseBlock("toolu_1", name, {})),
        answers.ContentBlockDelta(0, answers.InputJsonDelta(arguments)),
        answers.ContentBlockStop(0),
    ]


class TestAnswers:
    def test_events_come_in_the_apis_order(self) -> None:
        events = response_events(EVENTS)
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert [event["type"].removeprefix("response.") for event in events] == [
            "created",
            "in_progress",
            "output_item.added",
            "content_part.added",
            "reasoning_text.delta",
            "reasoning_text.delta",
            "reasoning_text.done",
            "content_part.done",
            "output_item.done",
            "output_item.added",
            "content_part.added",
            "output_text.delta",
            "output_text.delta",
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "output_item.added",
            "function_call_arguments.delta",
            "function_call_arguments.delta",
            "function_call_arguments.done",
            "output_item.done",
            "output_item.added",
            "function_call_arguments.delta",
            "function_call_arguments.done",
            "output_item.done",
            "completed",
        ]

    def test_the_official_types_read_each_event_and_lose_nothing(self) -> None:
        known = TypeAdapter(ResponseStreamEvent)
        for line in written(EVENTS).split(b"\n\n"):
            name, _, data = line.partition(b"\n")
            if name.startswith(b"event: "):
                fields = json.loads(data.removeprefix(b"data: "))
                assert name.decode() == f"event: {fields['type']}"
                read = known.validate_python(fields)
                assert json.loads(read.model_dump_json(exclude_unset=True, by_alias=True)) == fields

    def test_a_ping_is_a_comment_after_the_response_that_it_keeps_alive(self) -> None:
        stream = written([answers.Ping(), answers.Ping()])
        assert stream.endswith(b"\n\n: ping\n\n: ping\n\n")
        assert [json.loads(data)["type"] for data in data_of(stream)] == ["response.created", "response.in_progress"]

    def test_items_are_sent_empty_then_whole_and_all_again_at_the_end(self) -> None:
        events = response_events(EVENTS)
        added = [event["item"] for event in events if event["type"] == "response.output_item.added"]
        done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert done == events[-1]["response"]["output"]
        assert (
            [item["id"] for item in added] == [item["id"] for item in done] == ["rs_1_0", "msg_1_1", "fc_1_2", "fc_1_3"]
        )
        assert {item["status"] for item in added} == {"in_progress"}
        assert {item["status"] for item in done} == {"completed"}
        assert all(not item.get("content") and not item.get("arguments") for item in added)
        for event in events:
            if "item_id" in event:
                assert event["item_id"] == done[event["output_index"]]["id"]

    def test_usage_counts_the_whole_prompt(self) -> None:
        assert response_events(EVENTS)[-1]["response"]["usage"] == {
            "input_tokens": 15,
            "input_tokens_details": {"cached_tokens": 7, "cache_write_tokens": 5},
            "output_tokens": 11,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 26,
        }

    def test_the_official_client_assembles_the_stream_to_the_whole_answer(self) -> None:
        whole = client_of(writer().whole(ANSWER)).responses.create(**MINIMAL)
        with streaming(written(EVENTS)).responses.stream(**MINIMAL) as stream:
            final = stream.get_final_response()
        kept = {"id", "model", "status", "output", "usage", "tools", "tool_choice", "instructions"}
        streamed = json.loads(final.model_dump_json(include=kept, exclude_none=True))
        assert streamed == json.loads(whole.model_dump_json(include=kept, exclude_none=True))
        assert (whole.output_text, whole.status) == ("Hi 😀\r\n\n", "completed")

    def test_the_official_type_reads_a_whole_answer_and_loses_nothing(self) -> None:
        asked = {name: value for name, value in AGENT.items() if name not in ("model", "input")}
        body = writer(**asked).whole(ANSWER)
        fields = json.loads(body)
        read = SdkResponse.model_validate(fields)
        assert json.loads(read.model_dump_json(exclude_unset=True, by_alias=True)) == fields
        assert fields["output"] == [
            {
                "type": "reasoning",
                "id": "rs_1_0",
                "status": "completed",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "Let me\u2028see"}],
                "encrypted_content": "c2lnbmVk",
            },
            {
                "type": "message",
                "id": "msg_1_1",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Hi 😀\r\n\n", "annotations": []}],
            },
            {
                "type": "function_call",
                "id": "fc_1_2",
                "call_id": "toolu_1",
                "name": "read",
                "namespace": None,
                "status": "completed",
                "arguments": '{"path":"a\\nb","n":1.5}',
            },
            {
                "type": "function_call",
                "id": "fc_1_3",
                "call_id": "toolu_2",
                "name": "now",
                "namespace": None,
                "status": "completed",
                "arguments": "{}",
            },
        ]
        assert [tool["type"] for tool in fields["tools"]] == ["function", "custom", "namespace"]

    def test_an_answer_comes_back_as_it_went_out(self) -> None:
        whole = client_of(writer().whole(ANSWER)).responses.create(**MINIMAL)
        request = translated(input=[{"role": "user", "content": "Hi"}, *(item.to_dict() for item in whole.output)])
        sent_back = [block for message in request.messages[1:] for block in message.content]
        assert {message.role for message in request.messages[1:]} == {"assistant"}
        assert tuple(sent_back) == ANSWER.content

    def test_a_call_in_a_namespace_names_it(self) -> None:
        *_, done = response_events(calling("agents__wait", "{}"))
        assert (done["item"]["type"], done["item"]["namespace"], done["item"]["name"]) == (
            "function_call",
            "agents",
            "wait",
        )

    @pytest.mark.parametrize(
        ("arguments", "input"), [('{"input": "+a\\n"}', "+a\n"), ('{"input": 1}', '{"input": 1}'), ("{}", "{}")]
    )
    def test_a_custom_tool_gets_its_text(self, arguments: str, input: str) -> None:
        _, _, added, delta, whole, done = response_events(calling("patch", arguments))
        assert (added["item"]["type"], added["item"]["input"]) == ("custom_tool_call", "")
        assert (delta["type"], delta["delta"]) == ("response.custom_tool_call_input.delta", input)
        assert (whole["type"], whole["input"]) == ("response.custom_tool_call_input.done", input)
        assert (done["item"]["name"], done["item"]["call_id"], done["item"]["input"]) == ("patch", "toolu_1", input)

    @pytest.mark.parametrize(
        ("stop", "status", "reason"),
        [
            ("end_turn", "completed", None),
            ("tool_use", "completed", None),
            ("max_tokens", "incomplete", "max_output_tokens"),
            ("model_context_window_exceeded", "incomplete", "max_output_tokens"),
            ("refusal", "incomplete", "content_filter"),
        ],
    )
    def test_how_a_response_ends(self, stop: answers.StopReason, status: str, reason: str | None) -> None:
        *_, event = response_events([answers.MessageDelta(answers.Stop(stop), USAGE), answers.MessageStop()])
        assert (event["type"], event["response"]["status"]) == (f"response.{status}", status)
        assert event["response"]["incomplete_details"] == (reason and {"reason": reason})
        whole = json.loads(writer().whole(answers.Message(id="msg_1", model="m", stop_reason=stop, usage=USAGE)))
        assert (whole["status"], whole["incomplete_details"]) == (status, reason and {"reason": reason})

    @pytest.mark.parametrize("before", [[], EVENTS[:8]])
    def test_a_stream_that_breaks_ends_with_a_failed_response(self, before: list[answers.Event]) -> None:
        with streaming(written([*before, BROKEN])).responses.create(**MINIMAL, stream=True) as stream:
            *_, failed = stream
        assert (failed.type, failed.response.status) == ("response.failed", "failed")
        assert (failed.response.error.code, failed.response.error.message) == ("server_error", "the device is gone")
        assert len(failed.response.output) == bool(before)


# Against a real server.


@pytest.fixture
def sdk(server: Server, client: httpx.Client) -> Iterator[openai.OpenAI]:
    """The official client, which repeats nothing by itself."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as sdk:
        yield sdk


ASKED = {"model": "gpt-x", "input": "Hello from the third SDK", "temperature": 0, "max_output_tokens": 20}


class TestServed:
    def test_a_response_says_what_the_messages_api_says(self, sdk: openai.OpenAI, client: httpx.Client) -> None:
        message = post(client, ask(ASKED["input"], 20))
        response = sdk.responses.create(**ASKED)
        assert (response.model, response.output_text) == ("gpt-x", text_of(message))
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert response.usage.input_tokens == prompt_tokens(message["usage"])
        assert response.usage.output_tokens == 20
        assert response.usage.input_tokens_details.cached_tokens > 0

    def test_a_stream_tells_the_same(self, sdk: openai.OpenAI) -> None:
        whole = sdk.responses.create(**ASKED)
        events = list(sdk.responses.create(**ASKED, stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
        assert events[-1].type == "response.incomplete"
        assert events[-1].response.output_text == whole.output_text
        assert events[-1].response.usage.input_tokens == whole.usage.input_tokens

    def test_a_tool_loop(self, sdk: openai.OpenAI) -> None:
        schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
        schema |= {"additionalProperties": False}
        tool = {"type": "function", "name": "switch", "parameters": schema, "strict": True}
        asked = ASKED | {"tools": [tool, SEARCH], "parallel_tool_calls": False, "max_output_tokens": 200}
        with sdk.responses.stream(**asked | {"tool_choice": "required"}) as stream:
            response = stream.get_final_response()
        (call,) = response.output
        assert (response.status, call.type, call.name) == ("completed", "function_call", "switch")
        assert type(json.loads(call.arguments)["on"]) is bool
        history = [
            {"role": "user", "content": ASKED["input"]},
            {name: getattr(call, name) for name in ("type", "call_id", "name", "arguments")},
            {"type": "function_call_output", "call_id": call.call_id, "output": "done"},
        ]
        follow = sdk.responses.create(**asked | {"input": history})
        assert follow.usage.input_tokens_details.cached_tokens >= response.usage.input_tokens - 1

    def test_a_call_of_a_tool_that_the_client_runs_is_extended_by_its_result(self, sdk: openai.OpenAI) -> None:
        schema = {"type": "object", "properties": {"query": {"enum": ["mail", "files"]}}, "required": ["query"]}
        search = {"type": "tool_search", "execution": "client", "parameters": schema | {"additionalProperties": False}}
        asked = ASKED | {"tools": [search], "parallel_tool_calls": False, "max_output_tokens": 200}
        response = sdk.responses.create(**asked, tool_choice={"type": "tool_search"})
        (call,) = response.output
        assert (response.status, call.type, call.execution) == ("completed", "tool_search_call", "client")
        assert call.arguments["query"] in ("mail", "files")
        output = {"type": "tool_search_output", "call_id": call.call_id, "execution": "client", "tools": [READ]}
        history = [{"role": "user", "content": ASKED["input"]}, call.to_dict(), output]
        follow = sdk.responses.create(**asked | {"input": history, "max_output_tokens": 2})
        assert follow.usage.input_tokens_details.cached_tokens >= response.usage.input_tokens - 1

    def test_what_cannot_be_read_is_extended_by_what_follows(self, sdk: openai.OpenAI) -> None:
        image = {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo="}
        history: list[Any] = [
            {"role": "user", "content": [{"type": "input_text", "text": "What is in it?"}, image]},
            {
                "type": "web_search_call",
                "id": "ws_1",
                "status": "completed",
                "action": {"type": "search", "query": "x"},
            },
            {"type": "dream", "of": "sheep"},
        ]
        first = sdk.responses.create(**ASKED | {"input": history, "max_output_tokens": 2})
        longer = [*history, *first.output, {"type": "nap"}, {"role": "user", "content": "And now?"}]
        second = sdk.responses.create(**ASKED | {"input": longer, "max_output_tokens": 2})
        assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens

    def test_the_count_of_a_prompt_is_that_of_its_response(self, sdk: openai.OpenAI) -> None:
        asked: dict[str, Any] = {"input": ASKED["input"], "instructions": "Count", "tools": [READ, SEARCH]}
        counted = sdk.responses.input_tokens.count(**asked)
        response = sdk.responses.create(model="any", max_output_tokens=1, **asked)
        assert (counted.object, counted.input_tokens) == ("response.input_tokens", response.usage.input_tokens)

    def test_a_request_may_name_no_model(self, client: httpx.Client) -> None:
        name = client.get("/v1/models").json()["data"][0]["id"]
        asked = {"max_output_tokens": 1, "input": "Hi"}
        assert client.post("/v1/responses", json=asked).json()["model"] == name
        with client.stream("POST", "/v1/responses", json=asked | {"stream": True}) as response:
            created, *_ = data_of(response.read())
        assert json.loads(created)["response"]["model"] == name
        chat = {"max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]}
        assert client.post("/v1/chat/completions", json=chat).json()["model"] == name

    def test_a_prewarmed_prompt_is_read_and_compared_with(self, sdk: openai.OpenAI) -> None:
        asked = ASKED | {"input": "Warm this prompt of the third SDK", "max_output_tokens": 1}
        warm = sdk.responses.create(**asked, prompt_cache_options={"prewarm": True})
        assert (warm.status, warm.output, warm.usage.output_tokens) == ("completed", [], 0)
        options = {"comparison_response_id": warm.id}
        hit = sdk.responses.create(**asked, prompt_cache_options=options)
        assert hit.usage.input_tokens_details.cached_tokens >= warm.usage.input_tokens - 1
        assert hit.prompt_cache_diagnostics.type == "cache_hit"
        missed = sdk.responses.create(**asked, instructions="Other", prompt_cache_options=options)
        assert missed.prompt_cache_diagnostics.reason == "input_changed"
        assert missed.prompt_cache_diagnostics.cache_missed_tokens > 0
        unknown = sdk.responses.create(**asked, prompt_cache_options={"comparison_response_id": "resp_0"})
        assert unknown.prompt_cache_diagnostics.type == "comparison_response_not_found"

    def test_json_obeys_its_schema(self, sdk: openai.OpenAI) -> None:
        schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
        wanted = {"type": "json_schema", "name": "n", "schema": schema | {"additionalProperties": False}}
        response = sdk.responses.create(**ASKED | {"temperature": 2, "text": {"format": wanted}})
        assert json.loads(response.output_text)["n"] in (1, 2)

    def test_errors_arrive_as_the_sdks_own(self, sdk: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="previous_response_id: expected none") as caught:
            sdk.responses.create(**ASKED, previous_response_id="resp_1")
        assert caught.value.param == "previous_response_id"
        wanted = {"type": "json_schema", "name": "n", "schema": {"multipleOf": 10_000_019}}
        with pytest.raises(openai.BadRequestError, match=r"text\.format\.schema: "):
            sdk.responses.create(**ASKED, text={"format": wanted})
        with pytest.raises(openai.NotFoundError):
            sdk.responses.retrieve("resp_1")

    @ANY_REQUEST
    @given(body=mutated(AGENT | {"stream": False}, json_values))
    def test_any_request_is_served_or_refused_in_openais_form(self, client: httpx.Client, body: Any) -> None:
        served_or_refused(client, "/v1/responses", body, "max_output_tokens")
