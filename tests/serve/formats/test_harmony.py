"""Answers of gpt-oss in channels, as it writes them and as it gets them wrong."""

from __future__ import annotations

import pytest

from serve.api.messages import TextBlock, ThinkingBlock, ToolUseBlock
from serve.api.stops import Stops
from serve.formats.families import BY_NAME
from serve.formats.format import write_turn
from serve.formats.stream import AnswerStream, Stopped, Text, Thinking, ThinkingEnd
from tests.helpers.answer_events import events_of, read_answer
from tests.helpers.model_families import AGENT_FAMILIES, tokenizer_of

TOOLS = {"get_weather": {"type": "object"}, "now": {"type": "object"}, "python": {"type": "object"}}
NEXT = "<|start|>assistant"
THOUGHT = f"<|channel|>analysis<|message|>I need the\nweather.<|end|>{NEXT}"
THINKS = [Thinking("I need the\nweather."), ThinkingEnd()]
ARGUMENTS = '{"city": "Köln", "deep": {"a": [null]}}'
CALL = ("get_weather", {"city": "Köln", "deep": {"a": [None]}})


@pytest.mark.parametrize("end", ["", "<|return|>", "<|end|>"])
@pytest.mark.parametrize("channel", ["final", "commentary", "final <|constrain|>json", "comment"])
def test_analysis_is_thinking_and_the_other_channels_are_text(channel, end):
    text = f"{THOUGHT}<|channel|>{channel}<|message|>Hello, world!\nWhat's up?{end}"
    assert read_answer("harmony", text, TOOLS) == [*THINKS, Text("Hello, world!\nWhat's up?")]


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.get_weather <|constrain|>json",
        "<|channel|>commentary to=functions.get_weather",
        "<|channel|>commentary to=functions.get_weather json",
        " to=functions.get_weather<|channel|>commentary <|constrain|>json",
        " to=functions.get_weather<|channel|>commentary json",
        "<|channel|>analysis to=functions.get_weather",
        " to=functions.get_weather<|channel|>analysis",
        "<|channel|>commentary to=get_weather <|constrain|>json",
    ],
)
@pytest.mark.parametrize("end", ["", "<|call|>"])
def test_a_message_to_a_tool_is_a_call_with_the_recipient_in_either_place(header, end):
    call = f"{header}<|message|>{ARGUMENTS}{end}"
    assert read_answer("harmony", call, TOOLS) == [CALL]
    assert read_answer("harmony", THOUGHT + call, TOOLS) == [*THINKS, CALL]


def test_a_preamble_comes_before_a_call_and_calls_may_follow_each_other():
    preamble = f"<|channel|>commentary<|message|>I look.<|end|>{NEXT}"
    call = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>"
    text = f"{THOUGHT}{preamble}{call}{NEXT}{call}"
    assert read_answer("harmony", text, TOOLS) == [*THINKS, Text("I look."), ("now", {}), ("now", {})]


@pytest.mark.parametrize("body", ["", "{}"])
def test_a_call_may_have_no_arguments(body):
    text = f"<|channel|>commentary to=functions.now<|message|>{body}<|call|>"
    assert read_answer("harmony", text, TOOLS) == [("now", {})]


@pytest.mark.parametrize(
    "header", ["<|channel|>commentary to=python <|constrain|>code", " to=python<|channel|>commentary"]
)
def test_what_is_sent_to_a_built_in_tool_is_its_code(header):
    text = f'{THOUGHT}{header}<|message|>print("<b>", 1 < 2)\nprint()<|call|>'
    assert read_answer("harmony", text, TOOLS) == [*THINKS, ("python", {"code": 'print("<b>", 1 < 2)\nprint()'})]
    search = '<|channel|>analysis to=browser.search <|constrain|>json<|message|>{"query": "x"}'
    assert read_answer("harmony", search, TOOLS) == [("browser.search", {"query": "x"})]


def test_a_message_to_the_assistant_is_no_call():
    for text in (
        f"<|channel|>commentary to=assistant{THOUGHT}<|channel|>final<|message|>Hi",
        f"{THOUGHT}<|channel|>commentary to=assistant<|channel|>final<|message|>Hi",
        f"{THOUGHT} to=assistant<|channel|>final<|message|>Hi",
    ):
        assert read_answer("harmony", text, TOOLS) == [*THINKS, Text("Hi")]


def test_thinking_that_was_not_ended_ends_with_the_next_header():
    text = f"<|channel|>analysis<|message|>Hm.{NEXT}<|channel|>commentary to=functions.now<|message|>{{}}"
    assert read_answer("harmony", text, TOOLS) == [Thinking("Hm."), ThinkingEnd(), ("now", {})]
    text = "<|channel|>analysis<|message|>Hm.<|channel|>final<|message|>So."
    assert read_answer("harmony", text, TOOLS) == [Thinking("Hm."), ThinkingEnd(), Text("So.")]


def test_an_answer_that_is_cut_off_ends_with_what_was_said():
    assert read_answer("harmony", "<|channel|>analysis<|message|>I'm\nthinking", TOOLS) == [Thinking("I'm\nthinking")]
    assert read_answer("harmony", f"{THOUGHT}<|channel|>fin", TOOLS) == THINKS
    assert read_answer("harmony", f"{THOUGHT}<|channel|>commentary to=functions.no", TOOLS) == THINKS


@pytest.mark.parametrize("text", ["Hello.", "to=5 of 6", "1 < 2 <| 3", "to", "a to=functions.now b"])
def test_words_without_a_header_are_text(text):
    assert read_answer("harmony", text, TOOLS) == [Text(text)]


def test_words_of_a_broken_call_are_not_lost():
    text = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>not json<|call|>"
    (said,) = read_answer("harmony", text, TOOLS)
    assert "functions.now" in said.text
    assert "not json" in said.text


def test_arguments_may_hold_control_tokens_as_text():
    text = '<|channel|>commentary to=functions.now<|message|>{"a": "<|end|><|start|>assistant<|channel|>final"}<|call|>'
    assert read_answer("harmony", text, TOOLS) == [("now", {"a": "<|end|><|start|>assistant<|channel|>final"})]


def test_stop_sequences_count_in_text_only():
    text = f"{THOUGHT.replace('weather', 'STOP')}<|channel|>final<|message|>Go, STOP it"
    assert events_of("harmony", list(text), TOOLS, stops=Stops(["STOP"]))[-2:] == [Text("Go, "), Stopped("STOP")]


def test_a_turn_is_written_as_messages_and_read_back():
    call = ToolUseBlock("toolu_0", "now", {"a": "é"})
    blocks = [ThinkingBlock("Hm."), TextBlock("I look."), call]
    written = write_turn(BY_NAME["harmony"], blocks)
    assert written == (
        f"<|channel|>analysis<|message|>Hm.<|end|>{NEXT}<|channel|>commentary<|message|>I look.<|end|>{NEXT}"
        '<|channel|>commentary to=functions.now <|constrain|>json<|message|>{"a": "é"}'
    )
    assert read_answer("harmony", written, TOOLS) == [
        Thinking("Hm."),
        ThinkingEnd(),
        Text("I look."),
        ("now", {"a": "é"}),
    ]
    assert write_turn(BY_NAME["harmony"], [TextBlock("So.")]) == "<|channel|>final<|message|>So."


def test_control_tokens_of_the_tokenizer_are_read_as_headers():
    tokenizer = tokenizer_of(next(family for family in AGENT_FAMILIES if family.name == "gpt-oss"))
    stream = AnswerStream(tokenizer.hf.backend_tokenizer, tokenizer.template.format, Stops(()), TOOLS)
    text = f"{THOUGHT}<|channel|>commentary to=functions.now <|constrain|>json<|message|>{{}}"
    events = [event for token in tokenizer.encode(text) for event in stream.feed(int(token))] + stream.finish()
    said = "".join(event.text for event in events if isinstance(event, Text | Thinking))
    assert said == "I need the\nweather."
    assert events[-1].name == "now"
