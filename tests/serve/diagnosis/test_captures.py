"""Captures of all three APIs, told apart by their shape, with what agents send beside text."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pytest

from serve.__main__ import main
from serve.api.messages import InvalidRequest
from serve.diagnosis.captures import api_of, read_capture, read_prompt
from tests.helpers.http import BILLING, ask, text_block

Json = dict[str, Any]

USER = {"role": "user", "content": "Hi"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
MESSAGES = ask("Hi", system=[text_block(BILLING.format(1)), text_block("You help.")])
CHAT = {"model": "m", "messages": [{"role": "system", "content": f"{BILLING.format(1)}\nYou help."}, USER]}
RESPONSES = {"model": "m", "instructions": f"{BILLING.format(1)}\nYou help.", "input": [USER]}
SEARCH = {"type": "web_search_20250305", "name": "web_search"}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}


@pytest.mark.parametrize(
    ("body", "api"),
    [
        (MESSAGES, "messages"),
        (ask("Hi"), "messages"),
        ({"messages": [USER, {"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [USER], "tools": [{"name": "f", "input_schema": {}}]}, "messages"),
        ({"messages": [USER], "tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "messages"),
        (CHAT, "chat"),
        ({"messages": [{"role": "developer", "content": "x"}, USER]}, "chat"),
        ({"messages": [USER], "tools": [{"type": "function", "function": {"name": "f"}}]}, "chat"),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}, "chat"),
        ({"messages": [USER, {"role": "tool", "tool_call_id": "c", "content": "x"}]}, "chat"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "chat"),
        ({"messages": [USER], "stream_options": {}}, "chat"),
        (RESPONSES, "responses"),
        ({"model": "m", "input": "Hi"}, "responses"),
        ([], "messages"),
    ],
)
def test_the_api_is_known_by_the_shape(body: Any, api: str) -> None:
    assert api_of(body) == api


@pytest.mark.parametrize("body", [MESSAGES, CHAT, RESPONSES], ids=["messages", "chat", "responses"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda body: json.dumps(body).encode(),
        lambda body: codecs.BOM_UTF8 + json.dumps(body).encode(),
        lambda body: json.dumps(body).encode("utf-16"),
        lambda body: json.dumps({"path": "/v1/x", "body": body}).encode(),
        lambda body: json.dumps({"body": json.dumps(body)}).encode(),
        lambda body: codecs.BOM_UTF8 + json.dumps({"request": {"url": "x", "body": json.dumps(body)}}).encode(),
    ],
    ids=["body", "bom", "utf-16", "capture", "text", "nested"],
)
def test_a_capture_is_read_however_it_was_written(body: Json, wrap: Any) -> None:
    request = read_capture(wrap(body))
    texts = [block.text for block in request.system or () if not isinstance(block, str)]
    assert "You help." in "".join(texts)
    assert len(request.messages) == 1


@pytest.mark.parametrize("half", ["\\ud83d", "\\ude00!"])
def test_half_a_character_is_read(half: str) -> None:
    for body in (MESSAGES, CHAT, RESPONSES, {"body": MESSAGES}, {"body": json.dumps(ask("HALF"))}):
        content = json.dumps(body).replace("Hi", half).replace("HALF", half.replace("\\", "\\\\")).encode()
        assert len(read_capture(content).messages) == 1


@pytest.mark.parametrize(
    "body",
    [
        ask("Hi", tools=[SEARCH], tool_choice={"type": "tool", "name": "web_search"}),
        ask("Hi", tools=[SEARCH, {"type": "bash_20250124", "name": "bash"}, {"name": "f", "input_schema": {}}]),
        ask("Hi", tools=[{"type": "mcp_toolset", "mcp_server_name": "x"}]),
        CHAT | {"n": 2, "logprobs": True, "modalities": ["text", "audio"], "audio": {}},
        CHAT | {"tools": [{"type": "web_search_preview"}]},
        RESPONSES | {"previous_response_id": "resp_1", "background": True, "tools": [{"type": "web_search"}]},
        {"messages": [USER], "max_tokens": 1},
        {"input": "Hi"},
    ],
)
def test_what_an_api_refuses_has_a_prompt_all_the_same(body: Json) -> None:
    request = read_capture(json.dumps(body).encode())
    assert len(request.messages) == 1
    named = {tool.get("name") or tool["type"] for tool in body.get("tools", ())}
    assert {tool.name for tool in request.tools or ()} <= named


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"messages": 1}', b'{"model": "m", "messages": [1]}'])
def test_what_has_none_is_refused(body: bytes) -> None:
    for api in ("messages", "chat", "responses"):
        with pytest.raises(InvalidRequest):
            read_prompt(body, api)  # type: ignore[arg-type]


class TestExplain:
    @staticmethod
    def explain(tmp_path: Path, capsys: pytest.CaptureFixture[str], *bodies: Json) -> str:
        for number, body in enumerate(bodies):
            (tmp_path / f"{number}.json").write_text(json.dumps(body))
        main(["explain", str(tmp_path), "--normalize", "none"])
        return capsys.readouterr().out

    @pytest.mark.parametrize(
        ("body", "section"),
        [(MESSAGES, "system[0]"), (CHAT, "system[0]"), (RESPONSES, "system")],
        ids=["messages", "chat", "responses"],
    )
    def test_a_header_is_found_in_each_api(
        self, body: Json, section: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        other = json.loads(json.dumps(body).replace("00001", "fffff"))
        shown = self.explain(tmp_path, capsys, body, other)
        assert "preamble" in shown
        assert section in shown

    def test_images_and_vendor_items_are_no_obstacle(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        result = {"type": "tool_result", "tool_use_id": "t", "content": [IMAGE]}
        turns = [USER, {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}]
        shown = self.explain(
            tmp_path,
            capsys,
            MESSAGES | {"messages": [*turns, {"role": "user", "content": [result]}]},
            MESSAGES | {"messages": [*turns, {"role": "user", "content": [result, text_block("And now?")]}]},
        )
        assert "new_content" in shown or "goes on" in shown

    def test_a_bad_file_of_a_folder_costs_that_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "1-bad.json").write_text("{")
        (tmp_path / "9-bad.json").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(SystemExit) as ended:
            self.explain(tmp_path, capsys, *(MESSAGES | {"model": f"m{n}"} for n in range(3)))
        shown = capsys.readouterr().out
        assert "0.json -> 1.json" in shown
        assert "1.json -> 2.json" in shown
        assert isinstance(ended.value.code, str), "the exit status is 1"
        for name in ("1-bad.json", "9-bad.json"):
            assert f"explain: left out {tmp_path / name}: expected the body of a POST to" in ended.value.code

    def test_with_one_good_file_there_is_nothing_to_compare(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text(json.dumps(MESSAGES))
        (tmp_path / "b.json").write_text("[")
        with pytest.raises(SystemExit, match=r"b\.json: expected the body[^\n]*\n.*1 of 2 files can be read"):
            main(["explain", str(tmp_path)])

    @pytest.mark.parametrize("columns", ["40", "80", "200"])
    def test_names_are_whole(
        self, columns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("COLUMNS", columns)
        name = "mcp__a_server_with_a_long_name__and_a_tool_with_a_longer_one"
        old, new = (
            MESSAGES | {"tools": [{"name": name, "input_schema": {}, "description": text}]} for text in ("One.", "Two.")
        )
        for number, body in enumerate((old, new)):
            (tmp_path / f"{'capture-' * 12}{number}.json").write_text(json.dumps(body))
        main(["explain", str(tmp_path), "--svg", str(tmp_path / "why.svg")])
        piped = capsys.readouterr().out
        assert f"tools[0] {name}" in piped
        assert f"{'capture-' * 12}0.json -> {'capture-' * 12}1.json" in piped
        assert "…" not in piped
        assert (tmp_path / "why.svg").stat().st_size < 100_000
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        main(["explain", str(tmp_path)])
        assert "…" not in capsys.readouterr().out
