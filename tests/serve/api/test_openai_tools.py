"""Tools of OpenAI's two APIs: which are offered to the model, and in what form the client gets their calls."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion
from openai.types.responses import Response as SdkResponse
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from serve.api import answers
from serve.api import messages as wire
from serve.api.messages import MessagesRequest
from serve.api.openai import input_tokens_body, read_chat, read_responses
from tests.helpers.http import encoded
from tests.helpers.openai_clients import USAGE, data_of

USER = {"role": "user", "content": "Hi"}
SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}}
READ = {"type": "function", "name": "read", "parameters": SCHEMA}
FIND = {"type": "function", "name": "find", "description": "Finds", "parameters": SCHEMA}
MAIL = {"type": "namespace", "name": "mail", "description": "d", "tools": [{"type": "function", "name": "send"}]}
SEARCH = {"type": "tool_search", "execution": "client", "description": "Finds tools", "parameters": SCHEMA}
CHAT_READ = {"type": "function", "function": {"name": "read", "parameters": SCHEMA}}
CHAT_PATCH = {"type": "custom", "custom": {"name": "patch", "description": "Patches", "format": {"type": "text"}}}
TEXT_INPUT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
NO_INPUT = {"type": "object", "properties": {}}
FOUND = {
    "type": "tool_search_output",
    "call_id": "c",
    "execution": "client",
    "status": "completed",
    "tools": [MAIL, FIND],
}


def chat(**fields: Any) -> MessagesRequest:
    return read_chat(encoded({"messages": [USER]} | fields))[0]


def responses(*items: Any, **fields: Any) -> MessagesRequest:
    return read_responses(encoded({"input": [*items, USER]} | fields))[0]


def names(request: MessagesRequest) -> list[str]:
    return [tool.name for tool in request.tools or ()]


class TestOffered:
    def test_custom_tools_of_a_chat_take_a_text(self) -> None:
        assert chat(tools=[CHAT_READ, CHAT_PATCH]).tools == (
            wire.Tool("read", SCHEMA),
            wire.Tool("patch", TEXT_INPUT, "Patches"),
        )

    def test_functions_in_the_older_form_are_tools_of_which_one_is_called(self) -> None:
        request = chat(functions=[{"name": "now"}], function_call="auto")
        assert request.tools == (wire.Tool("now", NO_INPUT),)
        assert request.tool_choice == wire.ToolChoice("auto", None, True)
        named = chat(functions=[{"name": "now"}], function_call={"name": "now"})
        assert named.tool_choice == wire.ToolChoice("tool", "now", True)
        assert chat(functions=[{"name": "now"}], function_call="none").tool_choice == wire.ToolChoice(
            "none", None, True
        )

    def test_what_only_the_vendor_can_run_is_left_out_and_reported(self) -> None:
        kinds = ("web_search", "file_search", "code_interpreter", "image_generation", "mcp", "computer_use_preview")
        vendors = [{"type": kind, "server_label": "s", "container": {"type": "auto"}} for kind in kinds]
        for request in (chat(tools=[*vendors, CHAT_READ]), responses(tools=[*vendors, READ])):
            assert (names(request), request.left_out_tools) == (["read"], kinds)
        assert responses(tools=[{"type": "tool_search"}]).left_out_tools == ("tool_search",)
        assert chat(tools=[{"type": "web_search"}]).tools is None

    @pytest.mark.parametrize(("environment", "offered"), [(None, True), ("local", True), ("container_auto", False)])
    def test_a_shell_is_offered_where_the_client_runs_it(self, environment: str | None, offered: bool) -> None:
        shell = {"type": "shell", "environment": environment and {"type": environment}}
        assert bool(responses(tools=[shell]).tools) is offered

    @pytest.mark.parametrize(
        ("kind", "required"),
        [("local_shell", ["command"]), ("shell", ["commands"]), ("apply_patch", ["type", "path"])],
    )
    def test_the_vendors_tools_that_the_client_runs_are_functions(self, kind: str, required: list[str]) -> None:
        (tool,) = responses(tools=[{"type": kind}]).tools
        assert (tool.name, tool.input_schema["required"]) == (kind, required)
        assert tool.description
        chosen = responses(tools=[READ, {"type": kind}], tool_choice={"type": kind}).tool_choice
        assert chosen == wire.ToolChoice("tool", kind)

    def test_a_tool_search_of_the_client_has_its_own_parameters(self) -> None:
        assert responses(tools=[SEARCH]).tools == (wire.Tool("tool_search", SCHEMA, "Finds tools"),)
        (plain,) = responses(tools=[{"type": "tool_search", "execution": "client"}]).tools
        assert list(plain.input_schema["properties"]) == ["query"]

    def test_tools_that_come_as_an_item_are_tools(self) -> None:
        item = {"type": "additional_tools", "role": "developer", "tools": [MAIL, {"type": "web_search"}, {"name": 3}]}
        assert names(responses(item, tools=[READ])) == ["read", "mail__send"]
        assert names(responses(item)) == ["mail__send"]
        assert responses(item, tool_choice="required").tool_choice == wire.ToolChoice("any")
        assert responses(item).messages == responses().messages

    def test_tools_that_a_search_found_can_be_called(self) -> None:
        request = responses(FOUND, tools=[READ, SEARCH])
        assert names(request) == ["read", "tool_search", "mail__send", "find"]
        assert [tool.defer_loading for tool in request.tools or ()] == [None, None, True, True]
        found = (wire.ToolReferenceBlock("mail__send"), wire.ToolReferenceBlock("find"))
        assert request.messages[0].content == (wire.ToolResultBlock("c", found),)

    def test_a_tool_keeps_the_definition_that_it_had_first(self) -> None:
        again = FOUND | {"tools": [FIND | {"description": "Other"}]}
        assert responses(FOUND, again).tools == responses(FOUND).tools

    @pytest.mark.parametrize(("mode", "expected"), [("auto", "auto"), ("required", "any")])
    def test_only_allowed_tools_are_offered(self, mode: str, expected: str) -> None:
        entries = [{"type": "function", "name": "find"}, {"type": "web_search"}, {"type": "shell"}]
        choice = {"type": "allowed_tools", "mode": mode, "tools": entries}
        request = responses(tools=[READ, {"type": "shell"}, FIND], tool_choice=choice)
        assert (names(request), request.tool_choice) == (["shell", "find"], wire.ToolChoice(expected))
        allowed = {"mode": mode, "tools": [{"type": "custom", "custom": {"name": "patch"}}]}
        request = chat(tools=[CHAT_READ, CHAT_PATCH], tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
        assert (names(request), request.tool_choice) == (["patch"], wire.ToolChoice(expected))


def calling(name: str, arguments: str, id: str = "toolu_1") -> list[answers.Event]:
    return [
        answers.MessageStart(answers.Message(id="msg_1", model="m", usage=USAGE)),
        answers.ContentBlockStart(0, wire.ToolUseBlock(id, name, {})),
        answers.ContentBlockDelta(0, answers.InputJsonDelta(arguments)),
        answers.ContentBlockStop(0),
        answers.MessageDelta(answers.Stop("tool_use"), USAGE),
    ]


def calls(name: str, arguments: str) -> answers.Message:
    block = wire.ToolUseBlock("toolu_1", name, json.loads(arguments))
    return answers.Message(id="msg_1", model="m", content=(block,), stop_reason="tool_use", usage=USAGE)


def chat_answers(name: str, arguments: str, **fields: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The choices of the chunks of an answer that calls a tool, and the choice of the whole answer."""
    body = encoded({"messages": [USER]} | fields)
    writer = read_chat(body)[1]
    chunks = [json.loads(data) for data in data_of(b"".join(map(writer.event, calling(name, arguments))))]
    whole = read_chat(body)[1].whole(calls(name, arguments))
    ChatCompletion.model_validate_json(whole)
    return [chunk["choices"][0] for chunk in chunks], json.loads(whole)["choices"][0]


class TestChatCalls:
    def test_a_custom_tool_gets_its_text(self) -> None:
        (_, first, more, last), whole = chat_answers("patch", '{"input": "+a\\n"}', tools=[CHAT_PATCH])
        custom = {"name": "patch", "input": ""}
        assert first["delta"] == {"tool_calls": [{"index": 0, "custom": custom, "id": "toolu_1", "type": "custom"}]}
        assert more["delta"] == {"tool_calls": [{"index": 0, "custom": {"input": "+a\n"}}]}
        assert last["finish_reason"] == whole["finish_reason"] == "tool_calls"
        call = {"id": "toolu_1", "type": "custom", "custom": {"name": "patch", "input": "+a\n"}}
        assert whole["message"]["tool_calls"] == [call]
        sent_back = chat(messages=[USER, whole["message"]]).messages[1]
        assert sent_back.content == (wire.ToolUseBlock("toolu_1", "patch", {"input": "+a\n"}),)

    def test_a_function_in_the_older_form_is_called_so(self) -> None:
        (_, first, more, last), whole = chat_answers("now", '{"a":1}', functions=[{"name": "now"}])
        assert first["delta"] == {"function_call": {"name": "now", "arguments": ""}}
        assert more["delta"] == {"function_call": {"arguments": '{"a":1}'}}
        assert last["finish_reason"] == whole["finish_reason"] == "function_call"
        assert whole["message"]["function_call"] == {"name": "now", "arguments": '{"a":1}'}
        assert "tool_calls" not in whole["message"]


def response_events(name: str, arguments: str, **fields: Any) -> list[dict[str, Any]]:
    """The events of a response that calls a tool; asserts that the official types lose nothing of them."""
    writer = read_responses(encoded({"input": [USER]} | fields))[1]
    writer.begin("msg_1", "m")
    events = [json.loads(data) for data in data_of(b"".join(map(writer.event, calling(name, arguments))))]
    known = TypeAdapter(ResponseStreamEvent)
    for event in events:
        read = known.validate_python(event)
        assert json.loads(read.model_dump_json(exclude_unset=True, by_alias=True)) == event
    return events


CLIENT_CALLS = [
    ("local_shell", '{"command":["ls"]}', {"action": {"type": "exec", "env": {}, "command": ["ls"]}}),
    (
        "local_shell",
        '{"command":"ls -l"}',
        {"action": {"type": "exec", "env": {}, "command": ["bash", "-lc", "ls -l"]}},
    ),
    ("shell", '{"commands":["ls"],"timeout_ms":5}', {"action": {"commands": ["ls"], "timeout_ms": 5}}),
    ("shell", '{"commands":"ls"}', {"action": {"commands": ["ls"]}}),
    (
        "apply_patch",
        '{"type":"update_file","path":"a","diff":"+a"}',
        {"operation": {"type": "update_file", "path": "a", "diff": "+a"}},
    ),
    ("tool_search", '{"query":"x"}', {"execution": "client", "arguments": {"query": "x"}}),
]


class TestResponseCalls:
    @pytest.mark.parametrize(("kind", "arguments", "fields"), CLIENT_CALLS)
    def test_a_tool_of_the_client_is_called_by_an_item_of_its_own_type(
        self, kind: str, arguments: str, fields: dict[str, Any]
    ) -> None:
        tools = [{"type": kind, "execution": "client"}]
        _, _, added, done, completed = response_events(kind, arguments, tools=tools)
        assert (added["type"], added["item"]["status"]) == ("response.output_item.added", "in_progress")
        assert (done["type"], done["item"]["status"]) == ("response.output_item.done", "completed")
        item = done["item"]
        assert {name: item[name] for name in fields} == fields
        assert (item["type"], item["call_id"]) == (f"{kind}_call", "toolu_1")
        assert completed["response"]["output"] == [item]
        writer = read_responses(encoded({"input": [USER], "tools": tools}))[1]
        writer.begin("msg_1", "m")
        whole = json.loads(writer.whole(calls(kind, arguments)))
        assert SdkResponse.model_validate(whole).output[0].type == f"{kind}_call"
        assert whole["output"] == [item]

    @pytest.mark.parametrize(
        ("kind", "arguments", "status"),
        [
            ("local_shell", '{"command":["ls', "incomplete"),
            ("local_shell", '{"timeout_ms":5}', "completed"),
            ("shell", "{", "incomplete"),
            ("apply_patch", '{"type":"update_file","path":"a"}', "completed"),
            ("tool_search", '{"query":"x', "incomplete"),
        ],
    )
    def test_a_call_that_its_own_item_cannot_hold_is_a_functions(self, kind: str, arguments: str, status: str) -> None:
        tools = [{"type": kind, "execution": "client"}]
        _, _, added, written, done, completed = response_events(kind, arguments, tools=tools)
        (item,) = completed["response"]["output"]
        assert done["item"] == item == added["item"] | {"status": status}
        assert (item["type"], item["name"], item["call_id"]) == ("function_call", kind, "toolu_1")
        assert written["arguments"] == item["arguments"] == arguments

    @pytest.mark.parametrize(("kind", "arguments", "fields"), [CLIENT_CALLS[i] for i in (0, 2, 4, 5)])
    def test_such_a_call_comes_back_as_the_model_wrote_it(
        self, kind: str, arguments: str, fields: dict[str, Any]
    ) -> None:
        completed = response_events(kind, arguments, tools=[{"type": kind, "execution": "client"}])[-1]
        read = SdkResponse.model_validate(completed["response"])
        (message, _) = responses(*(item.model_dump() for item in read.output)).messages
        assert message.content == (wire.ToolUseBlock("toolu_1", kind, json.loads(arguments)),)

    def test_tools_of_items_are_called_back_with_their_namespace(self) -> None:
        item = {"type": "additional_tools", "role": "developer", "tools": [MAIL]}
        *_, done, _ = response_events("mail__send", "{}", input=[item, USER])
        assert (done["item"]["namespace"], done["item"]["name"]) == ("mail", "send")
        *_, done, _ = response_events("mail__send", "{}", input=[FOUND, USER])
        assert (done["item"]["namespace"], done["item"]["name"]) == ("mail", "send")


class TestCacheOptions:
    def test_prewarming_asks_for_no_tokens_and_is_complete_without_any(self) -> None:
        options = {"prewarm": True}
        assert chat(prompt_cache_options=options).max_tokens == responses(prompt_cache_options=options).max_tokens == 0
        assert responses(prompt_cache_options={"prewarm": False}, max_output_tokens=7).max_tokens == 7
        writer = read_responses(encoded({"input": "Hi", "prompt_cache_options": options}))[1]
        writer.begin("msg_1", "m")
        message = answers.Message(id="msg_1", model="m", stop_reason="max_tokens", usage=USAGE)
        response = json.loads(writer.whole(message))
        assert (response["status"], response["output"]) == ("completed", [])

    def test_a_comparison_names_the_message_that_the_response_was(self) -> None:
        asked = responses(prompt_cache_options={"comparison_response_id": "resp_abc"})
        assert asked.diagnostics == wire.DiagnosticsRequest("msg_abc")
        assert responses().diagnostics == responses(prompt_cache_options={}).diagnostics == wire.UNSET

    @pytest.mark.parametrize(
        ("found", "told"),
        [
            (None, {"type": "cache_hit"}),
            (answers.PreviousMessageNotFound(), {"type": "comparison_response_not_found"}),
            (answers.Unavailable(), {"type": "unavailable"}),
            (answers.ModelChanged(7), {"type": "cache_miss", "cache_missed_tokens": 7, "reason": "model_changed"}),
            (answers.ToolsChanged(7), {"type": "cache_miss", "cache_missed_tokens": 7, "reason": "tools_changed"}),
            (answers.SystemChanged(7), {"type": "cache_miss", "cache_missed_tokens": 7, "reason": "input_changed"}),
            (answers.MessagesChanged(7), {"type": "cache_miss", "cache_missed_tokens": 7, "reason": "input_changed"}),
        ],
    )
    def test_diagnostics_are_in_openais_words(self, found: Any, told: dict[str, Any]) -> None:
        writer = read_responses(encoded({"input": "Hi"}))[1]
        writer.begin("msg_1", "m")
        diagnostics = found and answers.Diagnostics(found)
        message = answers.Message(id="msg_1", model="m", stop_reason="end_turn", usage=USAGE, diagnostics=diagnostics)
        whole = json.loads(writer.whole(message))
        assert whole["prompt_cache_diagnostics"] == told
        read = SdkResponse.model_validate(whole).prompt_cache_diagnostics
        assert read is not None
        assert read.model_dump(exclude_unset=True) == told


def test_a_count_of_tokens_has_openais_form() -> None:
    assert json.loads(input_tokens_body(7, None)) == {"object": "response.input_tokens", "input_tokens": 7}
