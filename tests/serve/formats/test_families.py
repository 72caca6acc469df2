"""What a format writes, the parser reads back, however the answer's tokens are cut."""

from __future__ import annotations

import json
import re
import time
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from serve.api.messages import TextBlock, ThinkingBlock, ToolUseBlock
from serve.api.stops import Stops
from serve.formats.families import BY_NAME, choose_format, mistral_id
from serve.formats.format import format_for_json, text_after_call, within_thinking, write_turn
from serve.formats.readers import SPACE, Call
from serve.formats.schemas import types_of
from serve.formats.stream import NO_STOPS, AnswerStream, Stopped, Text, Thinking, ThinkingEnd
from tests.helpers.model_families import FAMILIES, tokenizer_of

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
PARTS = ("<parameter=path>", "</parameter>", "Read[ARGS]{}", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", " " * 300, "ST")


@cache
def backend():
    """A tokenizer with thinking and tool delimiters, and with most characters as tokens of their own."""
    return tokenizer_of(next(f for f in FAMILIES if f.name == "qwen3")).hf.backend_tokenizer


def read(name, text, cuts=(), stops=(), tools=TOOLS, thinking=False, json=False):
    """The answer's blocks, in the parser's words, deltas merged."""
    format = format_for_json(BY_NAME[name]) if json else BY_NAME[name]
    stream = AnswerStream(backend(), format, Stops(stops), tools, thinking)
    bounds = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    return merge([*(p for a, b in pairwise(bounds) for p in stream.read(text[a:b])), *stream.finish()])


@cache
def spelling(name, delimiters):
    """A tokenizer with one token a byte; a format's delimiters are special tokens, ordinary ones, or none at all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    if delimiters != "spelled":
        added = [AddedToken(m, special=delimiters == "special", normalized=False) for m in BY_NAME[name].delimiters]
        tokenizer.add_tokens(added)
    return tokenizer


def sample(name, text, delimiters, tools=TOOLS, thinking=False):
    """The same as `read`, of the text's tokens."""
    stream = AnswerStream(spelling(name, delimiters), BY_NAME[name], NO_STOPS, tools, thinking)
    ids = spelling(name, delimiters).encode(text).ids
    return merge([*(event for token in ids for event in stream.feed(token)), *stream.finish()])


def merge(events):
    merged: list = []
    for event in events:
        if isinstance(event, Text | Thinking) and merged and type(merged[-1]) is type(event):
            merged[-1] = type(event)(merged[-1].text + event.text)
        else:
            merged.append(event)
    return [(p.name, p.input) if isinstance(p, Call) else p for p in merged]


@pytest.mark.parametrize("name", CALLING)
def test_interleaved_thinking_and_calls_come_back_in_their_order(name):
    call, other = ToolUseBlock("a" * 9, "Read", {"path": 'a "b" }\n', "limit": 3}), ToolUseBlock("b" * 9, "now", {})
    blocks = [ThinkingBlock("first"), call, other]
    expected: list = [("Read", call.input), ("now", {})]
    if BY_NAME[name].think:
        expected = [Thinking("first"), ThinkingEnd(), *expected]
        if not BY_NAME[name].call_without_marker:
            blocks += [ThinkingBlock("then"), call]
            expected += [Thinking("then"), ThinkingEnd(), ("Read", call.input)]
    assert read(name, write_turn(BY_NAME[name], blocks)) == expected


@pytest.mark.parametrize("name", CALLING)
def test_text_before_a_call_stays_text_and_without_tools_all_of_it_is(name):
    call = ToolUseBlock("a" * 9, "Read", {"path": "x"})
    text = write_turn(BY_NAME[name], [TextBlock("Look:"), call])
    assert read(name, text) == [Text("Look:"), ("Read", {"path": "x"})]
    # The headers of messages are no text.
    headers = re.compile("|".join(map(re.escape, BY_NAME[name].headers)) or "(?!)")
    said, markup = (headers.sub("", part) for part in ("".join(p.text for p in read(name, text, tools={})), text))
    assert said == markup.removeprefix("commentary" if BY_NAME[name].headers else "")


@given(
    st.sampled_from(sorted(BY_NAME)),
    st.lists(st.sampled_from(SOUP + PARTS), max_size=14),
    st.lists(st.integers(0, 4000)),
    st.fixed_dictionaries({"thinking": st.booleans(), "json": st.booleans(), "tools": st.sampled_from([TOOLS, {}])}),
)
def test_any_cut_of_any_text_gives_the_same_answer(name, parts, cuts, how):
    text = "".join(parts)
    whole = read(name, text, (), ["STOP"], **how)
    assert read(name, text, cuts, ["STOP"], **how) == whole
    assert read(name, text, range(len(text)), ["STOP"], **how) == whole


@given(
    st.lists(st.sampled_from(("<", "<tool", "</tool_call", "<tool_call", "<thi", "é", "word", " ", "\n")), max_size=9)
)
def test_text_is_sent_as_soon_as_it_cannot_belong_to_a_delimiter(parts):
    stream, text, sent = AnswerStream(backend(), BY_NAME["hermes"], NO_STOPS, TOOLS), "".join(parts), 0
    for at, letter in enumerate(text):
        sent += sum(len(event.text) for event in stream.read(letter))
        held = text[sent : at + 1].lstrip(SPACE)
        assert any(delimiter.startswith(held) for delimiter in ("<tool_call>", "<think>"))


def test_json_that_is_no_call_is_sent_as_it_comes():
    stream = AnswerStream(backend(), BY_NAME["llama3"], NO_STOPS, TOOLS)
    assert merge(stream.read('{"title": "The')) == [Text('{"title": "The')]


UNCLOSED = "<tool_call>\n<function=Read>\n<parameter=path>\n"


@pytest.mark.parametrize(
    ("part", "end"), [(UNCLOSED, ""), (f"{UNCLOSED}</parameter>x", ""), (UNCLOSED, "</parameter><parameter=<")]
)
def test_calls_that_never_end_cost_no_more_the_more_there_are(part, end):
    stream, text = AnswerStream(backend(), BY_NAME["qwen3_coder"], NO_STOPS, TOOLS), part * (800_000 // len(part)) + end
    before = time.process_time()
    events = [*stream.read(text), *stream.finish()]
    assert time.process_time() - before < 5, "reading each anew to the end takes minutes"
    assert merge(events) == [Text(text)]


@pytest.mark.parametrize(
    "bad", ['{"name": "Read", "arguments": [1]}', '{"name": "Read"', "no call", '{"arguments": {}}']
)
def test_a_malformed_call_is_text_with_its_delimiters(bad):
    text = f"<tool_call>\n{bad}\n</tool_call>"
    assert read("hermes", text) == [Text(text)]


def test_a_call_whose_closing_delimiter_is_missing_at_the_end_is_a_call():
    assert read("hermes", '<tool_call>\n{"name": "now", "arguments": {}}') == [("now", {})]


@pytest.mark.parametrize("inner", ["", "<parameter=path>\nx\n</parameter>\n"])
def test_a_call_in_tags_may_end_with_its_outer_tag(inner):
    call = ("Read", {"path": "x"} if inner else {})
    assert read("qwen3_coder", f"<tool_call>\n<function=Read>\n{inner}</tool_call>\nSo.") == [call, Text("So.")]


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "deepseek"])
def test_thinking_that_the_model_opens_again_is_opened_once(name):
    answer = "<think>\nA <think> B\n</think>\n\nYes"
    assert read(name, answer, thinking=True) == [Thinking("A <think> B"), ThinkingEnd(), Text("Yes")]
    assert read(name, f"\n<think>{answer}") == [Thinking("A <think> B"), ThinkingEnd(), Text("Yes")]


@pytest.mark.parametrize("name", CALLING)
def test_json_may_contain_any_delimiter_and_thinking_or_calls_come_before_it(name):
    format, call = BY_NAME[name], ToolUseBlock("a" * 9, "Read", {"path": "x"})
    text = json.dumps({"delimiters": [" ".join(format.delimiters), write_turn(format, [call])]}, ensure_ascii=False)
    for tools in ({}, TOOLS):
        assert read(name, text, json=True, tools=tools) == [Text(text)]
        if format.think:
            thought = write_turn(format, [ThinkingBlock("so"), TextBlock(text)])
            assert read(name, thought, json=True, tools=tools) == [Thinking("so"), ThinkingEnd(), Text(text)]
    calls = write_turn(format, [call, call])
    assert read(name, calls, json=True) == [("Read", call.input)] * 2


def test_a_calls_id_ends_with_mistrals_own_so_that_the_results_name_it():
    written = '[TOOL_CALLS] [{"name": "now", "arguments": {}, "id": "%s"}]'
    for name, text, own in (
        ("mistral", written % "aB3dE6gH9", "aB3dE6gH9"),
        ("mistral_args", "[TOOL_CALLS]now[CALL_ID]aB3dE6gH9[ARGS]{}", "aB3dE6gH9"),
        ("mistral", written % "not nine", None),
    ):
        (call,) = AnswerStream(backend(), BY_NAME[name], NO_STOPS, TOOLS).read(text)
        assert mistral_id(call.id) == (own or call.id[-9:])
        assert len(call.id) == len("toolu_") + 24 + 9 * bool(own)


def test_the_text_after_a_call_is_known_for_every_format():
    assert {name: text_after_call(format) for name, format in BY_NAME.items() if format.call} == {
        "qwen3_coder": "\n</tool_call>",
        "glm47": "",
        "glm45": "",
        "kimi_k2": "<|tool_call_end|><|tool_calls_section_end|>",
        "minimax_m2": "\n</minimax:tool_call>",
        "nemotron": "]</TOOLCALL>",
        "harmony": "",
        "hermes": "\n</tool_call>",
        "mistral": "]",
        "mistral_args": "",
        "deepseek": "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "deepseek_v31": "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "llama3": "",
    }


def test_a_call_inside_thinking_is_thinking_and_a_stop_sequence_inside_a_call_is_not_one():
    inner = '<tool_call>\n{"name": "Read", "arguments": {"path": "STOP"}}\n</tool_call>'
    assert read("hermes", f"<think>\n{inner}\n</think>\n\nSo.") == [Thinking(inner), ThinkingEnd(), Text("So.")]
    assert read("hermes", f"{inner} STOP it", stops=["STOP"]) == [("Read", {"path": "STOP"}), Stopped("STOP")]


def test_a_format_is_chosen_by_name_or_by_the_delimiters_of_the_template():
    names = {family.name: choose_format(tokenizer_of(family).hf.chat_template).name for family in FAMILIES}
    assert names == {
        "qwen2.5": "hermes",
        "qwen3": "hermes",
        "llama3.1": "llama3",
        "mistral-v3": "mistral",
        "deepseek-r1": "deepseek",
    }
    assert choose_format("nothing").name == "none"
    assert choose_format("<tool_call>", "mistral").name == "mistral"
    with pytest.raises(ValueError, match="hermes"):
        choose_format("", "unknown")
    for written, inside in (
        ("", False),
        ("<think>\n", True),
        ("<think>\n\n</think>\n\n", False),
        ("<think>\nHm", True),
    ):
        assert within_thinking(BY_NAME["hermes"], written) == inside


def test_the_types_of_hostile_schemas_are_found_without_delay():
    alternatives = {f"t{i}": {"anyOf": [{"$ref": f"#/$defs/t{j}"} for j in range(40)]} for i in range(40)}
    assert types_of({"$ref": "#/$defs/t0"}, {"$defs": alternatives}) == set()
    assert types_of({"enum": 5, "anyOf": "x", "type": 3}, {}) == set()
    assert types_of({"enum": ["a", 1]}, {}) == {"string", "integer"}
    assert types_of({"anyOf": [{"const": 5}, {"const": None}]}, {}) == {"integer", "null"}
    assert types_of({"$ref": "#/properties/a/b"}, {"properties": [1]}) == set()


XML = "<tool_call>\n<function=Read>\n<parameter=x>\n{}\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize("properties", [None, [1], "x", {"x": None}, {"x": {"type": "string"}}])
def test_a_parameter_whose_schema_says_nothing_usable_is_text(properties):
    assert read("qwen3_coder", XML.format("5"), tools={"Read": {"properties": properties}}) == [("Read", {"x": "5"})]


@pytest.mark.parametrize(
    ("text", "type", "value"),
    [
        ("5", "integer", 5),
        ("1.0", "number", 1.0),
        ("1.0", "integer", 1),
        ("1.5", "integer", "1.5"),
        ('{"a": "b\nc"}', "object", {"a": "b\nc"}),
        ("True", "boolean", True),
        ("None", ["string", "null"], None),
        ("five", "integer", "five"),
        ('{"a": [1]}', "object", {"a": [1]}),
        ("NaN", "number", "NaN"),
        ("1e999", "number", "1e999"),
    ],
)
def test_a_parameter_is_what_its_schema_says_and_else_text(text, type, value):
    (call,) = read("qwen3_coder", XML.format(text), tools={"Read": {"properties": {"x": {"type": type}}}})
    assert repr(call) == repr(("Read", {"x": value})), "1 and 1.0 and true are not the same"


@pytest.mark.parametrize("value", ["1e999", "[" * 5000 + "]" * 5000, "1" * 5000])
def test_a_call_whose_arguments_the_wire_cannot_carry_is_text(value):
    text = f'<tool_call>{{"name": "Read", "arguments": {{"a": {value}}}}}</tool_call>'
    assert read("hermes", text) == [Text(text)]


def test_arguments_are_the_input_as_json():
    stream = AnswerStream(backend(), BY_NAME["hermes"], NO_STOPS, TOOLS)
    (call,) = stream.read('<tool_call>\n{"name": "Read", "arguments": {"b": 1.0,  "a": "\\u00e9"}}')
    assert call.arguments == '{"b":1.0,"a":"é"}'
    assert json.loads(call.arguments) == call.input


# Texts with parts of JSON and of delimiters, but without whole delimiters and without whitespace at their ends.
WORDS = st.text(st.sampled_from('ab {}"\\\né🙂;<[,]'), max_size=12).map(lambda text: f"a{text.rstrip(SPACE)}")
STRINGS = st.text(st.characters(codec="utf-8"), max_size=6)
NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.none() | st.booleans() | NUMBERS | STRINGS
VALUES = st.recursive(PLAIN, lambda v: st.lists(v, max_size=3) | st.dictionaries(STRINGS, v, max_size=3), max_leaves=5)


@st.composite
def turns(draw, name):
    """Blocks that a format can write, and that can be told apart when they are read."""
    kinds = draw(st.lists(st.sampled_from([TextBlock, ThinkingBlock, ToolUseBlock]), max_size=5))
    kept = [k for i, k in enumerate(kinds) if k is not TextBlock or i == 0 or kinds[i - 1] is not TextBlock]
    # XML has a type only where the schema has one: other values are tested above.
    texts = st.dictionaries(st.just("path"), STRINGS)
    values = texts if BY_NAME[name].parameter else st.dictionaries(STRINGS, VALUES, max_size=3)
    calls = values.map(lambda input: ToolUseBlock("a" * 9, "Read", input))
    return [draw(calls) if kind is ToolUseBlock else kind(draw(WORDS)) for kind in kept]


@given(st.sampled_from(CALLING), st.sampled_from(["special", "ordinary", "spelled"]), st.data())
def test_what_is_written_is_read_back_from_any_tokens(name, delimiters, data):
    blocks = data.draw(turns(name))
    expected: list = []
    for block in blocks:
        match block:
            case TextBlock(text):
                expected.append(Text(text))
            case ThinkingBlock(text):
                expected += [Thinking(text), ThinkingEnd()]
            case _:
                expected.append(("Read", block.input))
    if BY_NAME[name].write and blocks and isinstance(blocks[-1], ThinkingBlock):
        expected.pop()  # the template writes the end of the last message
    assert sample(name, write_turn(BY_NAME[name], blocks), delimiters) == expected


@given(st.sampled_from(CALLING), st.lists(st.sampled_from(SOUP), max_size=14), st.booleans())
def test_no_word_is_lost_and_delimiters_are_the_same_as_one_token_or_many(name, parts, thinking):
    numbered = [f"w{i}." if part == "word" else part for i, part in enumerate(parts)]
    answer = sample(name, "".join(numbered), "special", thinking=thinking)
    assert answer == sample(name, "".join(numbered), "spelled", thinking=thinking)
    told = "".join(map(repr, answer))
    assert all(told.count(word) == 1 for word in numbered if word.startswith("w"))


def test_a_special_token_that_is_not_a_delimiter_vanishes_and_a_delimiter_without_tools_is_text():
    assert sample("mistral", "a<|end|>b[TOOL_CALLS]", "special", tools={}) == [Text("ab[TOOL_CALLS]")]


def test_an_answer_that_begins_within_thinking_leaves_it_at_the_closing_delimiter():
    answer = sample("deepseek", "\nso\n</think>\n\nYes", "special", thinking=True)
    assert answer == [Thinking("so"), ThinkingEnd(), Text("Yes")]
    assert sample("deepseek", "\n\n</think>\n\nYes", "special", thinking=True) == [Text("Yes")]


def test_of_two_calls_the_first_stands_when_the_second_is_broken():
    first, broken = write_turn(BY_NAME["deepseek"], [ToolUseBlock("a" * 9, "now", {})]), "<｜tool▁call▁begin｜>broken"
    text = first.removesuffix("<｜tool▁calls▁end｜>") + "\n" + broken
    assert read("deepseek", text) == [("now", {}), Text(broken)]
