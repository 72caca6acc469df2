"""History that OpenAI's clients send again with every request: it is read whatever its form, and always alike."""

from __future__ import annotations

import base64
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessageParam
from openai.types.responses.response_input_item_param import ResponseInputItemParam

from serve.api import messages as wire
from serve.api.messages import Block, InputMessage, MessagesRequest, TextBlock
from serve.api.openai import read_chat, read_responses
from serve.prompt.conversation import conversation
from tests.helpers.any_history import Maker
from tests.helpers.http import encoded
from tests.helpers.media import pdf

USER = {"role": "user", "content": "Hi"}
PNG = "data:image/png;base64,iVBORw0KGgo="
IMAGE = wire.ImageBlock("image/png", 8)
IMAGE_TEXT = "[image: this model reads text only (image/png, 8 bytes)]"


def chat(*messages: Any, **fields: Any) -> MessagesRequest:
    return read_chat(encoded({"messages": [USER, *messages], **fields}))[0]


def responses(*items: Any, **fields: Any) -> MessagesRequest:
    return read_responses(encoded({"input": [USER, *items], **fields}))[0]


def second(request: MessagesRequest) -> InputMessage:
    """The message after the user's first one."""
    return request.messages[1]


def only(message: InputMessage) -> Block:
    (block,) = message.content
    assert not isinstance(block, str)
    return block


class TestPictures:
    @pytest.mark.parametrize(
        "part",
        [{"type": "image_url", "image_url": {"url": PNG, "detail": "low"}}, {"type": "image_url", "image_url": PNG}],
    )
    def test_a_picture_in_a_chat_is_a_placeholder(self, part: object) -> None:
        assert only(second(chat({"role": "user", "content": [part]}))) == IMAGE
        tool = {"role": "tool", "tool_call_id": "c", "content": [part]}
        assert only(second(chat(tool))) == wire.ToolResultBlock("c", (IMAGE,))

    def test_a_picture_in_a_response_is_a_placeholder(self) -> None:
        part = {"type": "input_image", "image_url": PNG, "detail": "high"}
        assert only(second(responses({"role": "user", "content": [part]}))) == IMAGE
        output = {"type": "function_call_output", "call_id": "c", "output": [part]}
        assert only(second(responses(output))) == wire.ToolResultBlock("c", (IMAGE,))

    @pytest.mark.parametrize(
        ("part", "text"),
        [
            ({"type": "image_url", "image_url": {"url": "https://e.org/a.png?sig=1"}}, "(https://e.org/a.png)"),
            ({"type": "input_image", "file_id": "file_1"}, "(file_1)"),
            ({"type": "input_image"}, "reads text only]"),
            ({"type": "image_url", "image_url": None}, "reads text only]"),
        ],
    )
    def test_a_picture_elsewhere_says_where(self, part: object, text: str) -> None:
        assert text in conversation(chat({"role": "user", "content": [part]}))[1]["content"]

    @pytest.mark.parametrize(
        "part",
        [
            {"type": "file", "file": {"filename": "a.bin", "file_data": "data:application/x;base64,AAAA"}},
            {"type": "input_file", "filename": "a.bin", "file_data": "data:application/x;base64,AAAA"},
        ],
    )
    def test_a_file_keeps_its_name_and_not_its_bytes(self, part: object) -> None:
        text = conversation(chat({"role": "user", "content": [part]}))[1]["content"]
        assert text.startswith("a.bin\n[document: ")
        assert "3 bytes" in text
        assert "AAAA" not in text

    def test_the_text_of_a_file_is_read(self) -> None:
        plain = "data:text/csv;base64,YSxiCjEsMgo="
        paper = "data:application/pdf;base64," + base64.b64encode(pdf("Forty two")).decode()
        for data, text in ((plain, "a,b\n1,2\n"), (paper, "Forty two"), (paper.partition(",")[2], "Forty two")):
            part = {"type": "file", "file": {"filename": "a", "file_data": data}}
            assert conversation(chat({"role": "user", "content": [part]}))[1]["content"] == f"a\n{text}"
            item = {"type": "input_file", "filename": "a", "file_data": data}
            assert conversation(responses({"role": "user", "content": [item]}))[1]["content"] == f"a\n{text}"

    def test_no_encoded_data_gets_into_a_prompt(self) -> None:
        data = "QUJD" * 1000
        items = [
            {"type": "image_generation_call", "id": "i", "status": "completed", "result": data},
            {"type": "computer_call_output", "output": {"type": "computer_screenshot", "image_url": PNG + data}},
            {"type": "hologram_call", "frames": [data, f"data:model/x;base64,{data}"]},
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": data, "format": "mp3"}}]},
        ]
        for item in items:
            assert len(str(conversation(responses(item))[1])) < 300


class TestCalls:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ('{"b": 1.5, "a": {}}', {"b": 1.5, "a": {}}),
            ("", {}),
            (" \n", {}),
            (None, {}),
            ({"a": 1}, {"a": 1}),
            ('"{\\"a\\": 1}"', {"a": 1}),
            ('{"a": "b', {"arguments": '{"a": "b'}),
            ("[1]", {"arguments": "[1]"}),
            ("ls -l", {"arguments": "ls -l"}),
            ("5", {"arguments": "5"}),
            (5, {"arguments": 5}),
            ([1], {"arguments": [1]}),
        ],
    )
    def test_arguments_of_any_form_are_kept(self, arguments: object, expected: dict[str, Any]) -> None:
        call = {"id": "c", "type": "function", "function": {"name": "read", "arguments": arguments}}
        assert only(second(chat({"role": "assistant", "tool_calls": [call]}))) == wire.ToolUseBlock(
            "c", "read", expected
        )
        item = {"type": "function_call", "call_id": "c", "name": "read", "arguments": arguments}
        assert only(second(responses(item))) == wire.ToolUseBlock("c", "read", expected)

    @pytest.mark.parametrize(
        ("call", "expected"),
        [
            ({"type": "custom", "id": "c", "custom": {"name": "x", "input": "+a"}}, ("c", "x", {"input": "+a"})),
            ({"id": None, "function": {"name": "x", "arguments": "{}"}}, ("", "x", {})),
            ({"function": {"name": "x"}}, ("", "x", {})),
        ],
    )
    def test_calls_of_a_chat(self, call: object, expected: tuple[Any, ...]) -> None:
        assert only(second(chat({"role": "assistant", "content": None, "tool_calls": [call]}))) == wire.ToolUseBlock(
            *expected
        )

    def test_a_call_without_a_name_keeps_its_words(self) -> None:
        message = {"role": "assistant", "tool_calls": [{"id": "c", "type": "telepathy", "thought": "of a cat"}]}
        assert only(second(chat(message))) == wire.UnreadBlock("tool_call", "[tool_call]\nthought: of a cat")

    def test_the_older_form_of_calls_pairs_them_by_name(self) -> None:
        call = {"role": "assistant", "content": None, "function_call": {"name": "now", "arguments": "{}"}}
        request = chat(call, {"role": "function", "name": "now", "content": "noon"})
        assert only(request.messages[1]) == wire.ToolUseBlock("now", "now", {})
        assert only(request.messages[2]) == wire.ToolResultBlock("now", "noon")

    @pytest.mark.parametrize(
        ("output", "text"),
        [
            ({"output": None}, ""),
            ({}, ""),
            ({"output": ""}, ""),
            ({"output": []}, ""),
            ({"output": {"content": "x", "success": True}}, "x"),
            ({"output": {"content": "x", "success": False}}, "Error: x"),
            ({"output": {"a": [1]}}, '{"a":[1]}'),
            ({"output": 5}, "5"),
            ({"output": [{"type": "input_text", "text": "x"}, "y", None]}, "x\n\ny"),
        ],
    )
    def test_outputs_of_any_form_are_read(self, output: dict[str, Any], text: str) -> None:
        for kind in ("function_call_output", "custom_tool_call_output"):
            assert conversation(responses({"type": kind, "call_id": "c"} | output))[1] == {
                "role": "tool",
                "tool_call_id": "c",
                "content": text,
            }

    @pytest.mark.parametrize(
        ("item", "expected"),
        [
            (
                {
                    "type": "local_shell_call",
                    "call_id": "c",
                    "action": {"type": "exec", "command": ["ls"], "env": {}, "user": None},
                },
                ("c", "local_shell", {"command": ["ls"]}),
            ),
            (
                {"type": "shell_call", "call_id": "c", "action": {"commands": ["ls"], "timeout_ms": None}},
                ("c", "shell", {"commands": ["ls"]}),
            ),
            (
                {"type": "apply_patch_call", "call_id": "c", "operation": {"type": "delete_file", "path": "a"}},
                ("c", "apply_patch", {"type": "delete_file", "path": "a"}),
            ),
            (
                {"type": "tool_search_call", "call_id": "c", "execution": "client", "arguments": {"query": "x"}},
                ("c", "tool_search", {"query": "x"}),
            ),
            ({"type": "tool_search_call", "arguments": '{"query": "x"}'}, ("", "tool_search", {"query": "x"})),
            ({"type": "shell_call", "call_id": "c"}, ("c", "shell", {})),
        ],
    )
    def test_calls_of_tools_that_the_client_runs_are_calls(self, item: object, expected: tuple[Any, ...]) -> None:
        assert only(second(responses(item))) == wire.ToolUseBlock(*expected)

    @pytest.mark.parametrize(
        ("item", "text"),
        [
            ({"type": "local_shell_call_output", "output": "a"}, "a"),
            ({"type": "shell_call_output", "output": [{"stdout": "a\n", "stderr": ""}, {"stderr": "b"}]}, "a\n\nb"),
            ({"type": "shell_call_output", "output": [{"outcome": {"type": "exit", "exit_code": 2}}]}, "[exit code 2]"),
            ({"type": "shell_call_output", "output": [{"outcome": {"type": "timeout"}}]}, "[timed out]"),
            ({"type": "shell_call_output", "output": "a"}, "a"),
            ({"type": "apply_patch_call_output", "status": "completed"}, "completed"),
            ({"type": "apply_patch_call_output", "status": "failed", "output": "no such file"}, "Error: no such file"),
        ],
    )
    def test_their_results_are_results(self, item: dict[str, Any], text: str) -> None:
        turn = conversation(responses(item | {"id": "c"}))[1]
        assert turn == {"role": "tool", "tool_call_id": "c", "content": text}


class TestOtherItems:
    @pytest.mark.parametrize(
        ("item", "role", "text"),
        [
            (
                {"type": "web_search_call", "id": "ws", "status": "completed", "action": {"type": "s", "query": "x"}},
                "assistant",
                "[web_search_call]\nquery: x",
            ),
            (
                {"type": "mcp_call", "server_label": "s", "name": "n", "arguments": "{}", "output": "o", "error": None},
                "assistant",
                "[mcp_call]\nserver_label: s\nname: n\narguments: {}\noutput: o",
            ),
            (
                {"type": "code_interpreter_call", "code": "1", "outputs": []},
                "assistant",
                "[code_interpreter_call]\ncode: 1",
            ),
            (
                {"type": "image_generation_call", "revised_prompt": "a cat", "result": "iVBORw0KGgo="},
                "assistant",
                "[image_generation_call]\nrevised_prompt: a cat\n[image: this model reads text only (8 bytes)]",
            ),
            (
                {"type": "mcp_approval_response", "approval_request_id": "r", "approve": True, "reason": "fine"},
                "user",
                "[mcp_approval_response]\napprove: true\nreason: fine",
            ),
            ({"type": "compaction", "encrypted_content": "E"}, "user", "[compaction]"),
            ({"type": "item_reference", "id": "msg_1"}, "user", "[item_reference]"),
            ({"id": "msg_1"}, "user", "[item_reference]"),
            ({"type": "dream_call", "of": "sheep"}, "assistant", "[dream_call]\nof: sheep"),
            ({"type": "dream", "of": ["sheep", 2]}, "user", "[dream]\nof: sheep\nof: 2"),
            ({"type": "function_call", "arguments": "{}"}, "assistant", "[function_call]\narguments: {}"),
            ({"type": "message", "role": "critic", "content": "Bad"}, "user", "[critic]\nBad"),
        ],
    )
    def test_an_item_of_another_type_keeps_its_words(self, item: dict[str, Any], role: str, text: str) -> None:
        message = second(responses(item, USER))
        block = only(message)
        assert isinstance(block, wire.UnreadBlock)
        assert (message.role, block.text) == (role, text)

    @pytest.mark.parametrize("kind", ["compaction_trigger", "ghost_snapshot", "configuration_update"])
    def test_items_without_words_are_left_out(self, kind: str) -> None:
        assert responses({"type": kind, "ghost_commit": {"id": "x"}}).messages == responses().messages

    def test_a_role_that_does_not_exist_yet_is_read_as_text(self) -> None:
        assert conversation(chat({"role": "critic", "content": "Bad"}))[1] == {
            "role": "user",
            "content": "[critic]\nBad",
        }

    def test_a_later_configuration_replaces_that_of_the_request(self) -> None:
        update = {"type": "configuration_update", "reasoning": {"effort": "low"}}
        schema = {"type": "configuration_update", "text": {"format": {"type": "json_object"}}}
        broken = {"type": "configuration_update", "text": {"format": {"type": "xml"}}}
        request = responses(update, schema, broken, reasoning={"effort": "high"})
        assert request.output_config == wire.OutputConfig("low", wire.JsonSchemaFormat({"type": "object"}))


class TestMessages:
    @pytest.mark.parametrize(
        "fields",
        [
            {"content": [{"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "text", "text": "a"}]},
            {"content": [{"type": "reasoning", "text": "t"}, {"type": "text", "text": "a"}]},
            {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "t"}]}, "a"]},
            {"content": "a", "reasoning": "t"},
            {"content": "a", "reasoning_content": "t"},
            {"content": "a", "reasoning_content": None, "reasoning": "t"},
        ],
    )
    def test_reasoning_is_read_wherever_it_stands(self, fields: dict[str, Any]) -> None:
        assert conversation(chat({"role": "assistant"} | fields, USER))[1] == {
            "role": "assistant",
            "content": "a",
            "reasoning_content": "t",
        }

    @pytest.mark.parametrize("content", [None, [], ""])
    def test_a_message_without_content_is_empty(self, content: object) -> None:
        for role in ("user", "tool"):
            message = {"role": role, "content": content, "tool_call_id": None}
            assert conversation(chat(message))[1]["content"] == ""
        assert len(conversation(chat({"role": "system", "content": content}))) == 1

    def test_a_refusal_is_what_the_assistant_said(self) -> None:
        assert only(second(chat({"role": "assistant", "content": None, "refusal": "No."}))) == TextBlock("No.")

    def test_what_is_no_text_in_a_system_message_is_a_text(self) -> None:
        system = {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": PNG}]}
        request = read_chat(encoded({"messages": [system, USER]}))[0]
        assert request.system == (TextBlock("a"), TextBlock(IMAGE_TEXT))

    def test_no_model_is_any_model(self) -> None:
        assert (chat().model, responses(model=None).model) == ("", "")


@pytest.mark.parametrize(
    ("read", "field", "kind"),
    [
        (read_responses, "input", ResponseInputItemParam),
        (read_chat, "messages", ChatCompletionMessageParam),
    ],
)
def test_any_history_of_the_sdks_types_is_read_and_what_is_appended_extends_it(
    read: Callable[[bytes], tuple[MessagesRequest, Any]], field: str, kind: Any
) -> None:
    random = Random(0)
    maker = Maker(random)
    for _ in range(2500):
        history = [maker.value(kind) for _ in range(random.randint(1, 4))]
        if random.random() < 0.3:
            history.append({"type": "from_the_future", "role": "oracle", "words": maker.value(kind)})
        turns = conversation(read(encoded({field: [USER, *history, USER]}))[0])
        longer = conversation(read(encoded({field: [USER, *history, USER, USER]}))[0])
        assert longer[: len(turns)] == turns


def nested(levels: int) -> Any:
    value: Any = "leaf"
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("levels", [10, 900])
def test_words_are_read_however_deep_they_stand(levels: int) -> None:
    deep = nested(levels)
    call = {"id": "c", "type": "from_the_future", "words": deep}
    for request in (
        responses({"type": "from_the_future", "words": deep}),
        responses({"type": "reasoning", "summary": deep}),
        chat({"role": "assistant", "reasoning_content": deep, "content": "A"}),
        chat({"role": "assistant", "tool_calls": [call]}),
        chat({"role": "oracle", "content": deep}),
    ):
        assert "leaf" in repr(second(request))
