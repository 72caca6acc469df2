"""Answers of Nemotron's models before Nemotron 3."""

from __future__ import annotations

import pytest

from serve.formats.stream import Text, Thinking, ThinkingEnd
from tests.helpers.answer_events import read_answer

TOOLS = {"search": {"type": "object"}, "now": {"type": "object"}}
SEARCH, NOW = '{"name": "search", "arguments": {"q": "</TOOLCALL> é", "n": [1]}}', '{"name": "now", "arguments": {}}'
CALLS = [("search", {"q": "</TOOLCALL> é", "n": [1]}), ("now", {})]


@pytest.mark.parametrize("written", [f"[{SEARCH}, {NOW}]", f"[ {SEARCH} ,\n{NOW} ]", f"{SEARCH}, {NOW}"])
def test_an_array_of_calls_comes_after_thinking_and_text(written):
    text = f"I search.\n</think>\n\nLook.\n\n<TOOLCALL>{written}</TOOLCALL>"
    assert read_answer("nemotron", text, TOOLS, thinking=True) == [
        Thinking("I search."),
        ThinkingEnd(),
        Text("Look."),
        *CALLS,
    ]


@pytest.mark.parametrize("ending", ["", "]", "</TOOLCALL>", "]</TOOLCALL>"])
def test_closing_delimiters_may_be_missing(ending):
    assert read_answer("nemotron", f"<TOOLCALL>[{SEARCH}, {NOW}{ending}", TOOLS) == CALLS


def test_an_empty_array_is_nothing_and_text_after_calls_is_text():
    assert read_answer("nemotron", f"<TOOLCALL>[]</TOOLCALL><TOOLCALL>[{NOW}]</TOOLCALL> So.", TOOLS) == [
        ("now", {}),
        Text("So."),
    ]


@pytest.mark.parametrize(
    "broken", ["<TOOLCALL>[now]</TOOLCALL>", "Write <TOOLCALL> first.", "<TOOLCALL>[1]</TOOLCALL>"]
)
def test_what_is_no_call_is_text(broken):
    assert read_answer("nemotron", broken, TOOLS) == [Text(broken)]
