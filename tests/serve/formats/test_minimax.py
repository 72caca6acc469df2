"""Answers of MiniMax-M2, as it writes them and as it gets them wrong."""

from __future__ import annotations

import pytest

from serve.formats.stream import Text, Thinking, ThinkingEnd
from tests.helpers.answer_events import read_answer

TOOLS = {
    "get_weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "todo": {"type": "object", "properties": {"items": {"type": "array"}, "done": {"type": "boolean"}}},
    "now": {"type": "object"},
}
BEGIN, END = "<minimax:tool_call>", "</minimax:tool_call>"


def invoke(name: str, line: str = "", **given: str) -> str:
    parameters = "".join(f'<parameter name="{key}">{value}</parameter>{line}' for key, value in given.items())
    return f'<invoke name="{name}">{line}{parameters}</invoke>{line}'


@pytest.mark.parametrize("line", ["", "\n"])
def test_calls_in_a_tag_come_after_thinking_and_text(line):
    calls = invoke("get_weather", line, city="Köln", days="5") + invoke("now", line)
    text = f"I need two.\n</think>\n\nI look.\n{BEGIN}{line}{calls}{END}"
    assert read_answer("minimax_m2", text, TOOLS, thinking=True) == [
        Thinking("I need two."),
        ThinkingEnd(),
        Text("I look."),
        ("get_weather", {"city": "Köln", "days": 5}),
        ("now", {}),
    ]


def test_values_have_the_types_of_the_schema():
    text = BEGIN + invoke("todo", items='[{"content": "Test", "done": false}]', done="true", more="1") + END
    expected = {"items": [{"content": "Test", "done": False}], "done": True, "more": "1"}
    assert read_answer("minimax_m2", text, TOOLS) == [("todo", expected)]


@pytest.mark.parametrize(
    "value", ['"q" 🦀\n end ', "a </parameter> b", "</invoke>", f"{END}", '<parameter name="x">', "<think>", ""]
)
def test_a_value_may_hold_markup(value):
    assert read_answer("minimax_m2", BEGIN + invoke("get_weather", city=value) + END, TOOLS) == [
        ("get_weather", {"city": value})
    ]


@pytest.mark.parametrize(
    "text",
    [
        invoke("now") + invoke("now"),
        BEGIN + invoke("now") + invoke("now"),
        BEGIN + invoke("now") + invoke("now").removesuffix("</invoke>") + END,
        BEGIN + invoke("now") + END + "\n" + BEGIN + invoke("now") + END,
    ],
)
def test_outer_tags_may_be_missing_or_doubled(text):
    assert read_answer("minimax_m2", text, TOOLS) == [("now", {}), ("now", {})]


@pytest.mark.parametrize(
    "broken", [f"Use {BEGIN} for calls.", f'{BEGIN}<invoke name="now">words', '<invoke name="">', f"{BEGIN}{{}}{END}"]
)
def test_what_is_no_call_is_text(broken):
    assert read_answer("minimax_m2", broken, TOOLS) == [Text(broken)]


def test_of_two_calls_the_first_stands_when_the_second_is_broken():
    broken = '<invoke name="now">words'
    assert read_answer("minimax_m2", BEGIN + invoke("now") + broken, TOOLS) == [("now", {}), Text(broken)]
