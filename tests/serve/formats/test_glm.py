"""Answers of GLM's models, as they write them and as they get them wrong."""

from __future__ import annotations

import pytest

from serve.formats.stream import Text, Thinking, ThinkingEnd
from tests.helpers.answer_events import read_answer

TOOLS = {
    "get_weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "write": {"type": "object", "properties": {"path": {"type": "string"}, "lines": {"type": "array"}, "deep": {}}},
    "get_time": {"type": "object", "properties": {}},
}
FORMATS = pytest.mark.parametrize("format", ["glm45", "glm47"])


def lines(name: str, **given: str) -> str:
    """A call as GLM-4.5 writes it."""
    return f"<tool_call>{name}\n" + "".join(argument(*pair, "\n") for pair in given.items()) + "</tool_call>"


def joined(name: str, **given: str) -> str:
    """A call as GLM-4.7 writes it."""
    return f"<tool_call>{name}" + "".join(argument(*pair, "") for pair in given.items()) + "</tool_call>"


def argument(key: str, value: str, line: str) -> str:
    return f"<arg_key>{key}</arg_key>{line}<arg_value>{value}</arg_value>{line}"


@FORMATS
@pytest.mark.parametrize("written", [lines, joined])
def test_either_form_is_read_whichever_the_template_has(format, written):
    text = written("get_weather", city="Dallas", days="3") + written("get_time")
    assert read_answer(format, text, TOOLS) == [("get_weather", {"city": "Dallas", "days": 3}), ("get_time", {})]


@FORMATS
def test_thinking_and_text_come_before_calls(format):
    text = f"\n<think>I need the weather.</think>\nI look.\n{lines('get_weather', city='Köln')}\n"
    expected = [Thinking("I need the weather."), ThinkingEnd(), Text("I look."), ("get_weather", {"city": "Köln"})]
    assert read_answer(format, text, TOOLS) == expected
    assert read_answer(format, text.removeprefix("\n<think>"), TOOLS, thinking=True) == expected


@FORMATS
def test_text_between_calls_and_after_them_is_text(format):
    text = f"First.{joined('get_time')}Then.{joined('get_time')}Done."
    assert read_answer(format, text, TOOLS) == [
        Text("First."),
        ("get_time", {}),
        Text("Then."),
        ("get_time", {}),
        Text("Done."),
    ]


@FORMATS
@pytest.mark.parametrize("name", ["get_time", " get_time ", "\nget_time\n"])
def test_a_call_without_arguments_may_have_whitespace_around_its_name(format, name):
    assert read_answer(format, f"<tool_call>{name}</tool_call>", TOOLS) == [("get_time", {})]


@FORMATS
def test_strings_are_kept_as_they_are_and_other_values_are_json(format):
    text = joined("write", path="  007 ", lines='["a", {"b": null}]', deep="5")
    assert read_answer(format, text, TOOLS) == [("write", {"path": "  007 ", "lines": ["a", {"b": None}], "deep": "5"})]


@FORMATS
@pytest.mark.parametrize(
    "value",
    [
        'He said "hi" 🦀\n\tend',
        "a </arg_value> b",
        "<tool_call>",
        "</tool_call>",
        "<arg_key>k</arg_key>",
        "<think>",
        "",
    ],
)
def test_a_value_may_hold_markup(format, value):
    assert read_answer(format, joined("write", path=value), TOOLS) == [("write", {"path": value})]


@FORMATS
@pytest.mark.parametrize(
    "broken",
    [
        "<tool_call></tool_call>",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Bonn",
        "<tool_call>get_weather\n<arg_key>city\n<arg_value>Bonn</arg_value>\n</tool_call>",
        "Write <tool_call> before the name.",
    ],
)
def test_what_is_no_call_is_text(format, broken):
    assert read_answer(format, broken, TOOLS) == [Text(broken)]


@FORMATS
def test_without_tools_a_call_is_text(format):
    assert read_answer(format, joined("get_time"), {}) == [Text(joined("get_time"))]
