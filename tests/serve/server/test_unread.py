"""A real server reads a short text in place of what its model cannot read, in every turn the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from experiments.harness.client import scrape
from serve.api.messages import InvalidRequest, decode_request
from serve.api.openai import read_chat, read_responses
from serve.api.unread import counted_kind, counted_tool
from serve.server.unread import refuse_images
from tests.helpers.http import Json, ask, encoded, error_of, post, prompt_tokens, text_of
from tests.helpers.pdfs import pdf

TOOL = {"name": "Read", "input_schema": {"type": "object"}}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"path": "a.png"}}
PNG = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
IMAGE = {"type": "image", "source": PNG}
WEB_SEARCH = {"type": "web_search_20250305", "name": "web_search"}


def document(data: str) -> Json:
    return {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": data}}


def session(*blocks: Any, result: Any = "") -> list[Json]:
    """A conversation in which the client has read a file, and an answer of another server has other blocks."""
    return [
        {"role": "user", "content": "Look at the file."},
        {"role": "assistant", "content": [*blocks, CALL]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": result}]},
    ]


def request(messages: list[Json], max_tokens: int = 4, **more: Any) -> Json:
    return ask("", max_tokens, messages=messages, tools=[TOOL], **more)


def counted(client: httpx.Client, messages: list[Json]) -> int:
    response = client.post("/v1/messages/count_tokens", json=request(messages))
    assert response.status_code == 200, response.text
    return response.json()["input_tokens"]


@pytest.mark.parametrize(
    ("messages", "refused"),
    [
        (session(result=[IMAGE]), "messages[2].content[0].content[0]: Could not process image"),
        (
            session(result=[document("AAAA")]),
            "messages[2].content[0].content[0]: this model does not support PDF input",
        ),
        (
            [{"role": "user", "content": [{"type": "document", "source": {"type": "content", "content": [IMAGE]}}]}],
            "messages[0].content[0].source.content[0]: Could not process image",
        ),
    ],
)
def test_a_refusal_of_an_image_names_its_place_in_words_that_clients_recover_from(
    messages: list[Json], refused: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        refuse_images(decode_request(encoded(request(messages))))
    assert str(caught.value).startswith(refused)


def test_the_place_of_an_image_is_that_in_the_body_of_openais_apis() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": [image]}]
    part = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
    silent = [{"role": "developer", "content": "d"}, {"type": "additional_tools", "tools": []}]
    items = [*silent, {"role": "user", "content": "a"}, {"type": "ghost_snapshot"}, {"role": "user", "content": [part]}]
    chat, _ = read_chat(encoded({"messages": messages}))
    responses, _ = read_responses(encoded({"input": items}))
    for read, place in ((chat, 1), (responses, 4)):
        with pytest.raises(InvalidRequest, match=rf"^messages\[{place}\].content\[0\]: Could not process image"):
            refuse_images(read)


def test_other_blocks_are_not_refused_as_images() -> None:
    readable = session({"type": "hologram"}, result=[document(pdf("text")), {"type": "text", "text": "a"}])
    refuse_images(decode_request(encoded(request(readable))))


def test_types_that_clients_make_up_do_not_grow_the_metrics() -> None:
    assert {counted_kind(kind) for kind in ("compaction", "made_up", "x" * 999)} == {"compaction", "other"}
    assert {counted_tool(tool) for tool in ("web_search_20250305", "web_search_20990101")} == {"web_search"}
    assert counted_tool("made_up_20250101") == "other"


@pytest.mark.parametrize(
    "messages",
    [
        session(result=[IMAGE]),
        session(result=[document(pdf("The text layer of a file"))]),
        session(result=[document("JVBERi0xLjQK")]),
        session({"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "a"}}),
        session({"type": "hologram", "depth": 3}, None, "text"),
    ],
    ids=["image", "pdf", "broken pdf", "server tool", "unknown"],
)
def test_a_session_goes_on_after_what_cannot_be_read(messages: list[Json], client: httpx.Client) -> None:
    first = post(client, request(messages))
    assert prompt_tokens(first["usage"]) == counted(client, messages)
    again = [*messages, {"role": "assistant", "content": text_of(first) or "ok"}, {"role": "user", "content": "Go on."}]
    second = post(client, request(again))
    assert second["usage"]["cache_read_input_tokens"] >= prompt_tokens(first["usage"]) - 1


def test_the_words_of_a_pdf_are_in_the_prompt(client: httpx.Client) -> None:
    words = "One two three four five six"
    as_text = session(result=[{"type": "document", "source": {"type": "text", "data": words}}])
    assert counted(client, session(result=[document(pdf(words))])) == counted(client, as_text)


def test_what_is_not_read_is_counted_each_time_and_logged_once(client: httpx.Client, server_log: Path) -> None:
    names = [f'tokenzero_unread_blocks_total{{type="{kind}"}}' for kind in ("container_upload", "other")]
    before = scrape(client)
    for kind in ("container_upload", "made_up_1", "made_up_2"):
        post(client, request(session({"type": kind, "file_id": "f"})))
    after = scrape(client)
    assert [after[name] - before.get(name, 0) for name in names] == [1, 2]
    assert server_log.read_text().count("a block of type 'container_upload'") == 1


def test_a_tool_that_only_its_vendor_can_run_is_left_out_and_counted(client: httpx.Client, server_log: Path) -> None:
    beside = request(session()) | {"tools": [TOOL, WEB_SEARCH]}
    name, before = 'tokenzero_left_out_tools_total{type="web_search"}', scrape(client)
    assert prompt_tokens(post(client, beside)["usage"]) == counted(client, session())
    post(client, beside)
    assert scrape(client)[name] == before.get(name, 0) + 2
    assert server_log.read_text().count("left out 'web_search") == 1  # under the name that came first
    alone = request(session()) | {"tools": [WEB_SEARCH]}
    assert "tools[0].type" in error_of(client.post("/v1/messages", json=alone), 400, "invalid_request_error")


def test_a_refused_request_changes_nothing_for_the_next_one(client: httpx.Client) -> None:
    messages = session(result=[IMAGE])
    first = post(client, request(messages))
    for wrong in ({"tool_choice": {"type": "tool", "name": "Write"}}, {"messages": [*messages, {"role": "robot"}]}):
        error_of(client.post("/v1/messages", json=request(messages) | wrong), 400, "invalid_request_error")
    again = post(client, request(messages))
    assert again["usage"]["cache_read_input_tokens"] == prompt_tokens(first["usage"]) - 1
    assert again["content"] == first["content"]
