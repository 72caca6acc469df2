"""Answers of Kimi-K2, as it writes them and as it gets them wrong."""

from __future__ import annotations

import pytest

from serve.formats.families import BY_NAME
from serve.formats.kimi import kimi_id
from serve.formats.readers import Call
from serve.formats.stream import NO_STOPS, AnswerStream, Text, Thinking, ThinkingEnd
from tests.helpers.answer_events import backend, read_answer

TOOLS = {"get_weather": {"type": "object"}, "process": {"type": "object"}}
BEGIN, END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"


def call(id: str, arguments: str, space: str = "") -> str:
    parts = ("<|tool_call_begin|>", id, "<|tool_call_argument_begin|>", arguments, "<|tool_call_end|>")
    return space.join(parts) + space


def test_calls_in_a_section_come_after_thinking_and_text():
    calls = call("functions.get_weather:0", '{"city": "Köln"}') + call("functions.process:1", '{"a": [{"b": {}}]}')
    text = f"<think>Two calls.</think>I look.{BEGIN}{calls}{END}"
    assert read_answer("kimi_k2", text, TOOLS) == [
        Thinking("Two calls."),
        ThinkingEnd(),
        Text("I look."),
        ("get_weather", {"city": "Köln"}),
        ("process", {"a": [{"b": {}}]}),
    ]


@pytest.mark.parametrize("id", ["functions.get_weather:0", "get_weather:0", "functions.get_weather", "get_weather:12"])
@pytest.mark.parametrize("space", ["", " ", "\n"])
def test_an_id_names_the_tool(id, space):
    text = BEGIN + space + call(id, '{"city": "<div>"}', space) + END
    assert read_answer("kimi_k2", text, TOOLS) == [("get_weather", {"city": "<div>"})]


@pytest.mark.parametrize(
    "text",
    [
        call("functions.get_weather:0", "{}") + call("functions.process:1", "{}"),
        BEGIN
        + (call("functions.get_weather:0", "{}") + call("functions.process:1", "{}")).replace("<|tool_call_end|>", ""),
        "<|tool_call_section_begin|>"
        + call("functions.get_weather:0", "{}", " ")
        + call("functions.process:1", "{}")
        + "<|tool_call_section_end|>",
    ],
)
def test_tokens_around_calls_may_be_missing_or_in_the_singular(text):
    assert read_answer("kimi_k2", text, TOOLS) == [("get_weather", {}), ("process", {})]


def test_text_after_a_section_is_text_and_an_empty_section_is_nothing():
    text = f"Look.{BEGIN}{END}{BEGIN}{call('functions.get_weather:0', '{}')}{END} After."
    assert read_answer("kimi_k2", text, TOOLS) == [Text("Look."), ("get_weather", {}), Text("After.")]


def test_a_broken_call_is_text_and_the_next_one_a_call():
    broken = call("functions.process:0", "no object")
    text = BEGIN + broken + call("functions.get_weather:1", "{}") + END
    assert read_answer("kimi_k2", text, TOOLS) == [Text(BEGIN + broken), ("get_weather", {})]


def test_an_id_of_ours_ends_with_the_models_number():
    stream = AnswerStream(backend(), BY_NAME["kimi_k2"], NO_STOPS, TOOLS)
    calls = stream.read(BEGIN + call("functions.process:3", "{}") + call("functions.process", "{}") + END)
    numbered, other = [event for event in calls if isinstance(event, Call)]
    assert kimi_id("process", numbered.id, 9) == "functions.process:3"
    assert kimi_id("process", other.id, 9) == "functions.process:9"
    assert kimi_id("process", "functions.get_weather:3", 9) == "functions.process:9"
