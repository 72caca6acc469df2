"""What a format writes, the parser reads back, however the answer's tokens are cut."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from families import FAMILIES, tokenizer_of
from hypothesis import given
from hypothesis import strategies as st

from serve.calls import Call, types_of
from serve.formats import BY_NAME, choose, opening_thinking, write_turn
from serve.messages import TextBlock, ThinkingBlock, ToolUseBlock
from serve.parse import AnswerStream, Stopped, Text, Thinking, ThinkingEnd

TOOLS: dict[str, dict[str, Any]] = {
    "Read": {"type": "object", "properties": {"path": {"type": "string"}, "limit": {"type": "integer"}}},
    "now": {"type": "object", "properties": {}},
}
CALLING = [name for name, format in BY_NAME.items() if format.call]
SOUP = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    '{"name": "Read", "arguments": {}}',
    "{",
    "}",
    '"',
    "é",
    "🦀",
)
SOUP += ("<function=Read>", "</function>", "[TOOL_CALLS]", "<|python_tag|>", "```json", " ", "\n", "word", "<", "STOP")


@cache
def backend():
    """A tokenizer with thinking and tool marks, and with most characters as tokens of their own."""
    return tokenizer_of(next(f for f in FAMILIES if f.name == "qwen3")).hf.backend_tokenizer


def read(name, text, cuts=(), stops=(), tools=TOOLS):
    """The answer's blocks, in the parser's words, deltas merged."""
    stream = AnswerStream(backend(), BY_NAME[name], stops, tools)
    bounds = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    pieces = [p for a, b in pairwise(bounds) for p in stream.read(text[a:b])]
    merged: list = []
    for piece in [*pieces, *stream.finish()]:
        if isinstance(piece, Text | Thinking) and merged and type(merged[-1]) is type(piece):
            merged[-1] = type(piece)(merged[-1].text + piece.text)
        else:
            merged.append(piece)
    return [(p.name, p.input) if isinstance(p, Call) else p for p in merged]


@pytest.mark.parametrize("name", CALLING)
def test_interleaved_thinking_and_calls_come_back_in_their_order(name):
    call, other = ToolUseBlock("a" * 9, "Read", {"path": 'a "b" }\n', "limit": 3}), ToolUseBlock("b" * 9, "now", {})
    blocks = [ThinkingBlock("first"), call, other]
    expected: list = [("Read", call.input), ("now", {})]
    if BY_NAME[name].think:
        expected = [Thinking("first"), ThinkingEnd(), *expected]
        if not BY_NAME[name].bare:
            blocks += [ThinkingBlock("then"), call]
            expected += [Thinking("then"), ThinkingEnd(), ("Read", call.input)]
    assert read(name, write_turn(BY_NAME[name], blocks)) == expected


@pytest.mark.parametrize("name", CALLING)
def test_text_before_a_call_stays_text_and_without_tools_all_of_it_is(name):
    call = ToolUseBlock("a" * 9, "Read", {"path": "x"})
    text = write_turn(BY_NAME[name], [TextBlock("Look:"), call])
    assert read(name, text) == [Text("Look:"), ("Read", {"path": "x"})]
    assert "".join(p.text for p in read(name, text, tools={})) == text


@given(st.sampled_from(sorted(BY_NAME)), st.lists(st.sampled_from(SOUP), max_size=14), st.lists(st.integers(0, 400)))
def test_any_cut_of_any_text_gives_the_same_answer(name, parts, cuts):
    text = "".join(parts)
    assert read(name, text, cuts, ["STOP"]) == read(name, text, (), ["STOP"])


@pytest.mark.parametrize(
    "bad", ['{"name": "Read", "arguments": [1]}', '{"name": "Read"', "no call", '{"arguments": {}}']
)
def test_a_malformed_call_is_text_with_its_marks(bad):
    text = f"<tool_call>\n{bad}\n</tool_call>"
    assert read("hermes", text) == [Text(text)]


def test_a_call_whose_closing_mark_is_missing_at_the_end_is_a_call():
    assert read("hermes", '<tool_call>\n{"name": "now", "arguments": {}}') == [("now", {})]


def test_a_call_inside_thinking_is_thinking_and_a_stop_sequence_inside_a_call_is_not_one():
    inner = '<tool_call>\n{"name": "Read", "arguments": {"path": "STOP"}}\n</tool_call>'
    assert read("hermes", f"<think>\n{inner}\n</think>\n\nSo.") == [Thinking(inner), ThinkingEnd(), Text("So.")]
    assert read("hermes", f"{inner} STOP it", stops=["STOP"]) == [("Read", {"path": "STOP"}), Stopped("STOP")]


def test_a_format_is_chosen_by_name_or_by_the_marks_of_the_template():
    names = {family.name: choose(tokenizer_of(family).hf.chat_template).name for family in FAMILIES}
    assert names == {
        "qwen2.5": "hermes",
        "qwen3": "hermes",
        "llama3.1": "llama3",
        "mistral-v3": "mistral",
        "deepseek-r1": "deepseek",
    }
    assert choose("nothing").name == "none"
    assert choose("<tool_call>", "mistral").name == "mistral"
    with pytest.raises(ValueError, match="hermes"):
        choose("", "unknown")
    assert opening_thinking(BY_NAME["hermes"], "<|im_start|>assistant\n<think>\n")
    assert not opening_thinking(BY_NAME["hermes"], "<think>\n\n</think>\n\n")


def test_the_types_of_hostile_schemas_are_found_without_delay():
    alternatives = {f"t{i}": {"anyOf": [{"$ref": f"#/$defs/t{j}"} for j in range(40)]} for i in range(40)}
    assert types_of({"$ref": "#/$defs/t0"}, {"$defs": alternatives}) == set()
    assert types_of({"enum": 5, "anyOf": "x", "type": 3}, {}) == set()
    assert types_of({"enum": ["a", 1]}, {}) == {"string", "integer"}
