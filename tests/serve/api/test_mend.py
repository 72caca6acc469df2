"""History that cannot be read: which short text it becomes, and that this text depends on the item alone."""

from typing import Any, get_args

import msgspec
import pytest

from serve.api import messages as wire
from serve.api.mend import BLOCKS, RESULT_BLOCKS, mended
from serve.api.messages import InvalidRequest, TextBlock, decode_request
from serve.api.vendor_tools import CLIENT_TOOLS
from serve.prompt.conversation import block_text, blocks, result_text
from tests.helpers.http import encoded

USER = {"role": "user", "content": "Hi"}
MINIMAL = {"model": "m", "max_tokens": 1, "messages": [USER]}
PNG = {"type": "base64", "media_type": "image/png", "data": "aGVsbG8="}
IMAGE = {"type": "image", "source": PNG}
IMAGE_TEXT = "[image: this model reads text only (image/png, 5 bytes)]"


def read(block: Any, role: str = "user") -> Any:
    """The one block that a block becomes, wherever it stands."""
    alone = decode_request(encoded({**MINIMAL, "messages": [{"role": role, "content": [block]}]}))
    later = decode_request(encoded({**MINIMAL, "messages": [USER, {"role": role, "content": [IMAGE, block]}, USER]}))
    assert later.messages[1].content[1] == alone.messages[0].content[0]
    return blocks(alone.messages[0])[0]


def text_of(block: Any) -> str:
    found = read(block)
    return result_text(found) if isinstance(found, wire.ToolResultBlock) else block_text(found)


ONLY_TEXT = "[image: this model reads text only]"

TEXTS = [
    (IMAGE, IMAGE_TEXT),
    ({**IMAGE, "cache_control": {"type": "ephemeral"}}, IMAGE_TEXT),
    ({**IMAGE, "media_type": "image/gif", "size": 6}, "[image: this model reads text only (image/gif, 6 bytes)]"),
    (
        {"type": "image", "source": {"type": "url", "url": "https://e.com/a.png?signed=1"}},
        "[image: this model reads text only (https://e.com/a.png)]",
    ),
    (
        {"type": "image", "source": {"type": "url", "url": "data:image/png;base64,AA"}},
        "[image: this model reads text only]",
    ),
    (
        {"type": "image", "source": {"type": "file", "file_id": "file_1"}},
        "[image: this model reads text only (file_1)]",
    ),
    ({"type": "image"}, ONLY_TEXT),
    (
        {"type": "image", "source": {"type": "base64", "media_type": 3, "data": None}},
        "[image: this model reads text only]",
    ),
    (
        {
            "type": "document",
            "source": {"type": "content", "content": [{"type": "text", "text": "a"}, IMAGE]},
            "title": "T",
        },
        f"T\na\n\n{IMAGE_TEXT}",
    ),
    ({"type": "document", "source": {"type": "content", "content": "a"}, "title": None}, "a"),
    ({"type": "document", "source": {"type": "file", "file_id": "f"}}, "[document: not available here (f)]"),
    (
        {"type": "document", "source": {"type": "url", "url": "https://e.com/a.pdf"}},
        "[document: not fetched (https://e.com/a.pdf)]",
    ),
    ({"type": "document"}, "[document: unknown source]"),
    ({"type": "document", "source": {"type": "base64", "media_type": "text/plain", "data": "aGk="}}, "hi"),
    ({"type": "document", "source": {"type": "base64", "data": None}}, "[document: it has no data]"),
    (
        {"type": "document", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
        "[document: only texts and PDFs are read (image/png, 3 bytes)]",
    ),
    (
        {"type": "search_result", "source": "https://e.com", "title": "T", "content": [{"type": "text", "text": "a"}]},
        "T\nhttps://e.com\na",
    ),
    ({"type": "search_result", "title": None, "content": [{"type": "text", "text": "a"}]}, "a"),
    (
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "shot"}, IMAGE]},
        f"shot\n\n{IMAGE_TEXT}",
    ),
    ({"type": "tool_result", "tool_use_id": "a", "content": IMAGE, "is_error": None}, IMAGE_TEXT),
    ({"type": "tool_result", "content": 1}, "1"),
    (
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "tool_use", "name": "f"}]},
        "[tool_use]\nname: f",
    ),
    (
        {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "x", "n": 2}},
        "[server_tool_use]\nname: web_search\nquery: x\nn: 2",
    ),
    (
        {
            "type": "web_search_tool_result",
            "tool_use_id": "srvtoolu_1",
            "content": [{"type": "web_search_result", "url": "https://e.com", "title": "T", "encrypted_content": "E"}],
        },
        "[web_search_tool_result]\nurl: https://e.com\ntitle: T",
    ),
    (
        {
            "type": "web_fetch_tool_result",
            "content": {
                "type": "web_fetch_result",
                "content": {
                    "type": "document",
                    "source": {"type": "text", "data": "words"},
                },
            },
        },
        "[web_fetch_tool_result]\nwords",
    ),
    (
        {"type": "mcp_tool_result", "tool_use_id": "m", "content": [{"type": "text", "text": "r"}, IMAGE]},
        f"[mcp_tool_result]\nr\n{IMAGE_TEXT}",
    ),
    ({"type": "compaction", "content": "summary"}, "[compaction]\nsummary"),
    ({"type": "container_upload", "file_id": "file_1"}, "[container_upload]"),
    ({"type": "fallback", "from": {"model": "a"}, "to": {"model": "b"}}, "[fallback]\nmodel: a\nmodel: b"),
    (
        {"type": "video", "frames": [1, "two", None, True, 2.5]},
        "[video]\nframes: 1\nframes: two\nframes: true\nframes: 2.5",
    ),
    ({"type": "x" * 999}, f"[{'x' * 64}]"),
    ({"text": "Hi"}, "Hi"),
    ("Hi", "Hi"),
    (None, ""),
    ({"type": "text", "text": None}, ""),
    ({"type": "text", "text": ["long", "er"]}, "long\ner"),
    ({"type": "tool_reference"}, "[tool_reference]"),
]


@pytest.mark.parametrize(("block", "text"), TEXTS)
def test_what_cannot_be_read_becomes_a_short_text(block: Any, text: str) -> None:
    assert text_of(block) == text


@pytest.mark.parametrize(
    ("given", "input"),
    [
        (None, {}),
        ("", {}),
        ('{"path": "a"}', {"path": "a"}),
        ('{"path": ', {"input": '{"path": '}),
        ([1], {"input": [1]}),
    ],
)
def test_the_input_of_a_call_is_an_object_again(given: Any, input: dict[str, Any]) -> None:
    block = {"type": "tool_use", "id": "a", "name": "Read", "input": given}
    assert read(block, "assistant") == wire.ToolUseBlock("a", "Read", input)


def test_null_is_absent() -> None:
    assert read({"type": "thinking", "thinking": "t", "signature": None}) == wire.ThinkingBlock("t")
    result = {"type": "tool_result", "tool_use_id": "a", "content": None, "is_error": None}
    assert read(result) == wire.ToolResultBlock("a")
    choice = {"type": "auto", "disable_parallel_tool_use": None}
    request = decode_request(encoded({**MINIMAL, "stream": None, "tool_choice": choice}))
    assert (request.stream, request.tool_choice) == (False, wire.ToolChoice("auto"))


def test_a_message_without_content_is_empty_unless_it_is_the_last() -> None:
    request = decode_request(encoded({**MINIMAL, "messages": [{"role": "assistant", "content": None}, USER]}))
    assert request.messages[0] == wire.InputMessage("assistant", ())
    effort = {"role": "system", "output_config": {"effort": "low"}}
    assert decode_request(encoded({**MINIMAL, "messages": [USER, effort]})).messages[1].content == ()
    with pytest.raises(InvalidRequest, match=r"messages\[1\].content: expected str | array, got null"):
        decode_request(encoded({**MINIMAL, "messages": [USER, {"role": "user", "content": None}]}))


def test_half_a_surrogate_pair_and_an_image_are_mended_in_one_body() -> None:
    halves = {"type": "text", "text": "a\ud83d"}
    for content in ([IMAGE, halves], [halves, IMAGE]):
        request = decode_request(encoded({**MINIMAL, "messages": [{"role": "user", "content": content}]}))
        assert {block_text(block) for block in blocks(request.messages[0])} == {IMAGE_TEXT, "a\ufffd"}


def test_a_system_text_of_other_types_is_text() -> None:
    request = decode_request(encoded({**MINIMAL, "system": [IMAGE, {"type": "text", "text": "s"}]}))
    assert request.system == (TextBlock(IMAGE_TEXT), TextBlock("s"))


def test_a_refusal_names_what_is_wrong_and_not_what_was_mended() -> None:
    body = {**MINIMAL, "messages": [{"role": "user", "content": [IMAGE]}, {"role": "tool", "content": "x"}]}
    with pytest.raises(InvalidRequest, match=r'messages\[1\].role: expected user, assistant, system, got "tool"'):
        decode_request(encoded(body))


def test_every_block_that_has_a_struct_is_mended_by_its_type() -> None:
    for union, kinds in ((wire.Block, BLOCKS), (wire.ResultBlock, RESULT_BLOCKS)):
        assert {struct.__struct_config__.tag for struct in get_args(union)} == kinds.keys()


@pytest.mark.parametrize("block", [block for block, _ in TEXTS])
def test_what_was_mended_stays(block: Any) -> None:
    once = mended({**MINIMAL, "messages": [{"role": "user", "content": [block]}]})
    assert mended(once) == once
    assert msgspec.convert(once, wire.MessagesRequest)


WEB_SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
CUSTOM = {"name": "Read", "input_schema": {"type": "object"}}


@pytest.mark.parametrize("kind", sorted(CLIENT_TOOLS))
def test_a_tool_of_the_vendor_that_the_client_runs_is_a_function_with_its_documented_input(kind: str) -> None:
    request = decode_request(encoded({**MINIMAL, "tools": [{"type": kind, "name": "its name", "max_characters": 9}]}))
    assert request.tools
    assert request.left_out_tools == ()
    (tool,) = request.tools
    assert (tool.name, tool.description, tool.input_schema) == ("its name", *CLIENT_TOOLS[kind].values())


def test_a_tool_that_only_the_vendor_can_run_is_left_out_beside_others_and_refused_alone() -> None:
    request = decode_request(encoded({**MINIMAL, "tools": [WEB_SEARCH, CUSTOM, {"type": "mcp_toolset"}]}))
    assert request.tools == (wire.Tool("Read", {"type": "object"}),)
    assert request.left_out_tools == ("web_search_20250305", "mcp_toolset")
    with pytest.raises(InvalidRequest, match=r'tools\[0\].type: expected custom .*, got "web_search_20250305"'):
        decode_request(encoded({**MINIMAL, "tools": [WEB_SEARCH]}))
    choice = {"type": "tool", "name": "web_search"}
    with pytest.raises(InvalidRequest, match=r"tool_choice.name: expected the name of one of tools, got 'web_search'"):
        decode_request(encoded({**MINIMAL, "tools": [WEB_SEARCH, CUSTOM], "tool_choice": choice}))
