"""Calls that models write with faults, inside thinking, or cut off are read as what they mean."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.api.messages import ToolUseBlock
from serve.formats.families import BY_NAME
from serve.formats.format import write_turn
from serve.formats.lenient import decode_lenient, read_cut_object
from serve.formats.readers import Call, CutCall, complete_arguments
from serve.formats.stream import NO_STOPS, AnswerStream, Text, Thinking, ThinkingEnd
from tests.serve.formats.test_families import PARTS, SOUP, backend, merge

TOOLS: dict[str, dict[str, Any]] = {
    "run": {
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "n": {"type": "integer"},
            "flag": {"type": "boolean"},
            "obj": {"type": "object"},
            "arr": {"type": "array", "items": {"type": "string"}},
            "any": {},
            "mixed": {"type": ["object", "string"]},
        },
    },
    "now": {"type": "object", "properties": {}},
}
CALLING = [name for name, format in BY_NAME.items() if format.call]
RUN, NOW = ("run", {"path": "/a"}), ("now", {})


def read(name, text, cuts=(), thinking=False, cut=False, tools=TOOLS):
    """The answer's events, deltas merged; a call as its name and input, a call that was cut off as it is."""
    stream = AnswerStream(backend(), BY_NAME[name], NO_STOPS, tools, thinking)
    bounds = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    events = [event for a, b in pairwise(bounds) for event in stream.read(text[a:b])]
    return merge(events + stream.finish(cut))


def read_any_way(name, text, **how):
    """What is read from a text, whole or letter by letter."""
    whole = read(name, text, **how)
    by_letter = read(name, text, range(len(text)), **how)
    assert [e for e in by_letter if not isinstance(e, CutCall)] == [e for e in whole if not isinstance(e, CutCall)]
    return whole


HERMES_FAULTS = [
    ('{"name": "run", "arguments": "{\\"path\\": \\"/a\\"}"}', [RUN]),
    ('{"name": "run", "parameters": {"path": "/a"}}', [RUN]),
    ('{"name": "now", "arguments": null}', [NOW]),
    ('{"name": "now", "arguments": ""}', [NOW]),
    ('{"arguments": null, "name": "now"}', [NOW]),
    ('{"name": "now"}', [NOW]),
    ('{"name": "run", "arguments": {"path": "/a"}}}', [RUN]),
    ('{"name": "run", "arguments": {"path": "/a"}}}}\n}', [RUN]),
    ('{"name": "run", "arguments": {"path": "/a"}', [RUN]),
    ('{"name": "run", "arguments": {"path": "/a"', [RUN]),
    ('{"name": "run", "arguments": {"path": "/a",},}', [RUN]),
    ('{{"name": "run", "arguments": {"path": "/a"}}}', [RUN]),
    ('"name": "run", "arguments": {"path": "/a"}}', [RUN]),
    ('{"name": "run", "arguments": {"arr": ["a", "b"}}', [("run", {"arr": ["a", "b"]})]),
    ('{"name": "run", "arguments": {"arr": ["a", "b"', [("run", {"arr": ["a", "b"]})]),
    (
        "{'name': 'run', 'arguments': {'path': '/a', 'flag': True, 'any': None}}",
        [("run", RUN[1] | {"flag": True, "any": None})],
    ),
    ("""{'name': 'run', 'arguments': {'path': 'it\\'s "x"'}}""", [("run", {"path": 'it\'s "x"'})]),
    (
        '{"name": "run", "arguments": {"path": "\\d+ C:\\Users \\u12 \\n"}}',
        [("run", {"path": "\\d+ C:\\Users \\u12 \n"})],
    ),
    ('{"name": "run", "arguments": {"path": "a\nb\tc"}}', [("run", {"path": "a\nb\tc"})]),
    ('{"name": "run", "arguments": {"path": "\\ud83d \\ud83c\\udf89"}}', [("run", {"path": "\ufffd 🎉"})]),
    ('{"name": "run", "arguments": {"path": "/a"}}\n{"name": "now", "arguments": {}}', [RUN, NOW]),
    ('{"name": "run", "arguments": {"path": "/a"}}, {"name": "now"}', [RUN, NOW]),
    ('[{"name": "run", "arguments": {"path": "/a"}}, {"name": "now", "arguments": {}}]', [RUN, NOW]),
    ('[{"name": "run", "arguments": {"path": "/a"}}, "junk"]', [RUN]),
    ('```json\n{"name": "run", "arguments": {"path": "/a"}}\n```', [RUN]),
    ('{"type": "function", "function": {"name": "run", "arguments": {"path": "/a"}}}', [RUN]),
    ("<function=run>\n<parameter=path>\n/a\n</parameter>\n</function>", [RUN]),
]


@pytest.mark.parametrize(("written", "calls"), HERMES_FAULTS)
def test_json_with_a_fault_is_the_call_that_it_means(written, calls):
    for end in ("\n</tool_call>", "", "\n</tool_call>\n</tool_call>", "\n</tool_call></function>\n"):
        if end or not written.endswith("```"):
            assert read_any_way("hermes", f"<tool_call>\n{written}{end}") == calls
    if not written.startswith("<"):
        assert read_any_way("qwen3_coder", f"<tool_call>\n{written}\n</tool_call>\nSo.") == [*calls, Text("So.")]


@pytest.mark.parametrize(
    "written",
    [
        '{"name": "run", "path": "/a"}',
        '{"name": "run", "arguments": [1]}',
        '{"name": "run", "arguments": "words"}',
        '{"name": "run", "arguments": "[1]"}',
        '{"name": 5, "arguments": {}}',
        '{"name": "run", "arguments": {"path" "/a"}}',
        '{"name": "run"',
    ],
)
def test_json_that_may_mean_something_else_stays_text(written):
    text = f"<tool_call>\n{written}\n</tool_call>"
    assert read_any_way("hermes", text) == [Text(text)]


XML = "<tool_call>\n<function=run>\n{}</function>\n</tool_call>"
NESTED = "<tool_call>\n<function=x>\n<parameter=n>\n1\n</parameter>\n</function>\n</tool_call>"
XML_FAULTS = [
    ("<parameter=path>\n/a\n<parameter=n>\n3\n</parameter>\n", {"path": "/a", "n": 3}),
    ("<parameter=path>/a<parameter=n>3</parameter>", {"path": "/a", "n": 3}),
    ("<parameter=path>\n/a\n", {"path": "/a"}),
    ("<parameter=path>\n/a\n<parameter=n>\n3\n", {"path": "/a", "n": 3}),
    ("<parameter=path>\n/a\n</path>\n<parameter=n>\n3\n</parameter>\n", {"path": "/a", "n": 3}),
    ("<parameter=path>\n/a\n</parameter1>\n<parameter=n>\n3\n</n>\n", {"path": "/a", "n": 3}),
    ("<parameter=path>\n/a\n</parameter\n<parameter=n>\n3\n</paramter>\n", {"path": "/a", "n": 3}),
    ("<parameter=path>\n<b>/a</b>\n<parameter=n>\n3\n</parameter>\n", {"path": "<b>/a</b>", "n": 3}),
    ("<parameter=path>\nx </parameterList>\n</parameter>\n", {"path": "x </parameterList>"}),
    ('<parameter=path>\nx = "</parameter>" + y\n</parameter>\n', {"path": 'x = "</parameter>" + y'}),
    ('<parameter=path>\n"</parameter><parameter=q>"\n</parameter>\n', {"path": '"</parameter><parameter=q>"'}),
    ("<parameter=path>\n<parameter=q>\n1\n</parameter>\n", {"path": "<parameter=q>\n1"}),
    ("<parameter=path>\nas <parameter=n> says\n</parameter>\n", {"path": "as <parameter=n> says"}),
    ("<parameter=path>\na </function> b\n</parameter>\n", {"path": "a </function> b"}),
    ("<parameter=path>\n</function>\n</tool_call>\nb\n</parameter>\n", {"path": "</function>\n</tool_call>\nb"}),
    ("<parameter=path>\n<function=x> says\n</parameter>\n", {"path": "<function=x> says"}),
    (f"<parameter=path>\n{NESTED}\n</parameter>\n", {"path": NESTED}),
    (
        f"<parameter=path>\na\n{NESTED}\n{NESTED}\n</parameter>\n<parameter=n>\n3\n</parameter>\n",
        {"path": f"a\n{NESTED}\n{NESTED}", "n": 3},
    ),
    (f"<parameter=path>\n{NESTED}\n", {"path": NESTED}),
    (
        "<parameter=obj>\n{'a': True, 'b': None, 'c': [1, 'x']}\n</parameter>\n",
        {"obj": {"a": True, "b": None, "c": [1, "x"]}},
    ),
    ("<parameter=arr>\n['x', \"it's\",]\n</parameter>\n", {"arr": ["x", "it's"]}),
    ("<parameter=obj>\n{'a': it's}\n</parameter>\n", {"obj": "{'a': it's}"}),
    ("<parameter=mixed>\n{'a': 1}\n</parameter>\n", {"mixed": "{'a': 1}"}),
    ('<parameter=any>\n{"a": 1}\n</parameter>\n', {"any": {"a": 1}}),
    ("<parameter=any>\n5\n</parameter>\n", {"any": "5"}),
    ("<parameter=other>\n[1]\n</parameter>\n", {"other": "[1]"}),
    ("<parameter= path >\n/a\n</parameter>\n", {"path": "/a"}),
    ('{"path": "/a"}', {"path": "/a"}),
    ("<parameter=arr>\n('a', 'b')\n</parameter>\n", {"arr": ["a", "b"]}),
]


@pytest.mark.parametrize(("written", "values"), XML_FAULTS)
def test_a_value_ends_where_the_model_meant_it_to(written, values):
    call = XML.format(written)
    assert read_any_way("qwen3_coder", call) == [("run", values)]
    assert read_any_way("qwen3_coder", f"{call}\n{call}") == [("run", values)] * 2
    assert read_any_way("qwen3_coder", call.replace("<tool_call>\n", "", 1)) == [("run", values)]


def test_no_delimiter_around_a_call_is_text():
    call = "<function=run><parameter=path>/a</parameter></function>"
    for text, events in (
        (f"<tool_call>Let me see.{call}</tool_call>", [Text("Let me see."), RUN]),
        (f"Well:\n<tool_call>\nLet me see.\n{call}</tool_call>", [Text("Well:\nLet me see."), RUN]),
        (f"<tool_call>{call} ok </tool_call>", [RUN, Text("ok ")]),
        (f"<tool_call>{call} ok </tool_call> then", [RUN, Text("ok  then")]),
        (f"{call}</tool_call>\n</parameter></function>\nSo.", [RUN, Text("So.")]),
        (f"<tool_call>{call}", [RUN]),
        (f"<tool_call>\n<tool_call>{call}</tool_call></tool_call>", [RUN]),
        (f"<tool_call>{call.replace('run>', 'run')}</tool_call>", [RUN]),
        (f"<tool_call>{call}</tool_", [RUN]),
    ):
        assert read_any_way("qwen3_coder", text) == events
    words = "Models write <tool_call> first. " + "And so on. " * 40
    assert read_any_way("qwen3_coder", words + call) == [Text(words.rstrip()), RUN]


JSON = '{"name": "run", "arguments": {"path": "/a"}}'
DEEPSEEK = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
OTHER_FAULTS = [
    ("mistral", f"[TOOL_CALLS]{JSON}", [RUN]),
    ("mistral", f"[TOOL_CALLS] {JSON}, {JSON}", [RUN, RUN]),
    ("mistral", f"[TOOL_CALLS] [TOOL_CALLS] [{JSON}]", [RUN]),
    ("mistral", f"[TOOL_CALLS] [{JSON},]", [RUN]),
    ("mistral", f"[TOOL_CALLS] [{JSON}]]", [RUN]),
    ("mistral", f"[TOOL_CALLS] [{JSON}]\n]", [RUN, Text("]")]),
    ("mistral", f"[TOOL_CALLS] [{JSON}}}, {JSON[:-1]}]", [RUN, RUN]),
    ("mistral", f"[TOOL_CALLS] [{JSON[:-1]}, {JSON}", None),
    ("mistral", '[TOOL_CALLS] [{"name": "run", "arguments": "{\\"path\\": \\"/a\\"}"}, {"name": "now"}]', [RUN, NOW]),
    ("mistral_args", '[TOOL_CALLS]run[ARGS]"{\\"path\\": \\"/a\\"}"[TOOL_CALLS]now', [RUN, NOW]),
    ("mistral_args", "[TOOL_CALLS]now[ARGS]null", [NOW]),
    ("mistral_args", "[TOOL_CALLS]now[ARGS][TOOL_CALLS]now[ARGS]{}", [NOW, NOW]),
    ("mistral_args", "[TOOL_CALLS]run[ARGS]{'path': '/a',}", [RUN]),
    ("llama3", '{"name": "run", "parameters": "{\\"path\\": \\"/a\\"}"}', [RUN]),
    ("llama3", '{"name": "run", "parameters": {"path": "/a"}}}', [RUN]),
    ("llama3", '<function=run>{"path": "/a"}</function>', [RUN]),
    ("llama3", '<function=run>{"path": "/a"}</function><function=now>{}</function>', [RUN, NOW]),
    ("llama3", f"[{JSON}]", [RUN]),
    ("llama3", f"Here: {JSON} Good?", [Text("Here:"), RUN, Text("Good?")]),
    ("llama3", '{"name": "now"}', [NOW]),
    ("llama3", '{"name": "now"}; {"name": "now"}', [NOW, NOW]),
    ("llama3", '{"name": "Bob"}', None),
    ("llama3", 'The object {"name": "now"} is a tool.', None),
    ("llama3", '{"tools": [{"name": "now"}, {"name": "run"}]}', None),
    ("llama3", '[{"name": "now"}, {"name": "run"}]', None),
    ("llama3", '{\n  "dependency": {"name": "now"}\n}', None),
    ("llama3", '{"name": "now", "type": "module"}', None),
    ("llama3", '{"tools": [{"type": "function", "function": {"name": "now"}}]}', None),
    ("llama3", '{"name": "Bob", "parameters": null}', None),
    ("llama3", '{"name": "run", "description": "Runs.", "parameters": {"type": "object"}}', None),
    ("llama3", '{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}', None),
    ("deepseek", DEEPSEEK.format('function<｜tool▁sep｜>run\n```json\n{"path": "/a"}\n```').replace("▁", "_"), [RUN]),
    ("deepseek", DEEPSEEK.format('function<｜tool▁sep｜>run\n```json\n{"path": "/a"\n```'), [RUN]),
    ("deepseek", DEEPSEEK.format("function<｜tool▁sep｜>now\n```json\n```"), [NOW]),
    ("deepseek", DEEPSEEK.format("function<｜tool▁sep｜>now\n"), [NOW]),
    ("deepseek_v31", DEEPSEEK.format('run<｜tool▁sep｜>{"path": "/a"}}').replace("▁", " "), [RUN]),
    ("deepseek_v31", DEEPSEEK.format('run<｜tool▁sep｜>"{\\"path\\": \\"/a\\"}"'), [RUN]),
    ("deepseek_v31", DEEPSEEK.format("now<｜tool▁sep｜>null"), [NOW]),
    ("deepseek_v31", DEEPSEEK.format("now<｜tool▁sep｜>"), [NOW]),
]


@pytest.mark.parametrize(("name", "text", "calls"), OTHER_FAULTS)
def test_other_formats_read_their_models_faults_as_well(name, text, calls):
    assert read_any_way(name, text) == ([Text(text)] if calls is None else calls)


def written(name, *calls):
    return write_turn(BY_NAME[name], [ToolUseBlock("a" * 9, *call) for call in calls])


@pytest.mark.parametrize("name", CALLING)
def test_thinking_that_ends_with_calls_ends_before_them(name):
    close = BY_NAME[name].think_delimiters[1]
    thought = [Thinking("I need it."), ThinkingEnd()]
    for calls in ((RUN,), (RUN, NOW)):
        for end in ("", "\n", close, f"\n{close}\n\n"):
            text = f"I need it.\n{written(name, *calls)}{end}"
            assert read_any_way(name, text, thinking=True) == [*thought, *calls]
            assert read_any_way(name, f"{BY_NAME[name].think[0]}{text}") == [*thought, *calls]
    assert read_any_way(name, written(name, RUN), thinking=True) == [RUN]


@pytest.mark.parametrize("name", [name for name in CALLING if BY_NAME[name].call_openers])
def test_calls_that_thinking_only_mentions_stay_thinking(name):
    close = BY_NAME[name].think_delimiters[1]
    call, unknown = written(name, RUN), written(name, ("unknown", {"path": "/a"}))
    for thought in (f"Like {call} this.", f"A\n{call}\nB\n{call}\nC.", f"{call}\n{unknown}", unknown, f"{call} <"):
        assert read_any_way(name, thought, thinking=True) == [Thinking(thought)]
        answer = read_any_way(name, f"{thought}{close}\n\n{call}", thinking=True)
        assert answer == [Thinking(thought), ThinkingEnd(), RUN]
    assert read_any_way(name, f"{call}{close}So.", thinking=True) == [Thinking(call), ThinkingEnd(), Text("So.")]
    assert read_any_way(name, f"A {call}", thinking=True, cut=True) == [Thinking(f"A {call}")]
    assert read_any_way(name, f"A {call}", thinking=True, tools={}) == [Thinking(f"A {call}")]


def test_no_part_of_a_call_is_sent_as_thinking_before_it_is_clear_what_it_is():
    stream = AnswerStream(backend(), BY_NAME["hermes"], NO_STOPS, TOOLS, thinking=True)
    call = f"<tool_call>\n{JSON}\n</tool_call>"
    assert stream.read(f"Look.\n{call}\n\n") == [Thinking("Look.")]
    (thought,) = merge(stream.read("Or not: <"))
    assert thought == Thinking(f"\n{call}\n\nOr not:")
    assert merge(stream.read(f"tool_call>\n{JSON}")) == []
    assert [type(event) for event in stream.finish()] == [ThinkingEnd, Call]


@pytest.mark.parametrize("name", [name for name in CALLING if BY_NAME[name].call_openers])
def test_a_call_that_was_cut_off_is_told_from_its_name_on_and_never_as_text(name):
    input = {"path": "/a", "any": 'say "hi" to C:\\d', "n": 12}
    text = written(name, ("run", input))
    opened, named = len(BY_NAME[name].call_openers[0]), text.index("run") + len("run")
    if BY_NAME[name].call_without_marker:
        opened = named + 1  # before, it may be any JSON
    for end in range(opened, len(text)):
        before, *calls = read(name, f"Look:{text[:end]}", cut=True)
        assert before == Text("Look:")
        match calls:
            case [CutCall(_, "run", arguments)]:
                assert end > named
                with pytest.raises(json.JSONDecodeError):
                    json.loads(arguments)
                assert complete_arguments(arguments).items() <= input.items()
            case [call]:
                assert call == ("run", input)
                assert end > text.index("12")
            case _:
                assert end <= named + len("<｜tool▁sep｜>"), "the name may go on, or be followed by another"


def test_all_complete_arguments_of_a_cut_call_are_known_a_number_at_the_end_too():
    text = '<tool_call>\n{"name": "run", "arguments": {"path": "/a", "n": 12, '
    (call,) = read("hermes", text, cut=True)
    assert call.arguments == '{"path":"/a","n":12'
    assert complete_arguments(call.arguments) == {"path": "/a", "n": 12}


def test_what_is_known_of_a_cut_calls_arguments_is_valid_json_up_to_where_it_was_cut():
    for name, text, arguments in (
        (
            "hermes",
            '<tool_call>\n{"name": "run", "arguments": {"path": "/a", "any": "it\\n\\u00e',
            '{"path":"/a","any":"it\\n',
        ),
        ("hermes", '<tool_call>\n{"name": "run", "arguments": {"path": "/a", "n": 1', '{"path":"/a"'),
        ("hermes", '<tool_call>\n{"name": "run", "arg', "{"),
        ("hermes", "<tool_call>\n{'name': 'run', 'arguments': {'path': '/a', 'obj': {'b", '{"path":"/a"'),
        (
            "qwen3_coder",
            "<tool_call>\n<function=run>\n<parameter=path>\n/a\n</parameter>\n<parameter=any>\nb\n</para",
            '{"path":"/a","any":"b',
        ),
        (
            "qwen3_coder",
            "<tool_call>\n<function=run>\n<parameter=path>\n/a\n</parameter>\n<parameter=n>\n1",
            '{"path":"/a"',
        ),
        ("qwen3_coder", "<tool_call>\n<function=run>\n", "{"),
        ("mistral_args", '[TOOL_CALLS]run[ARGS]{"path": "/a', '{"path":"/a'),
    ):
        assert [event.arguments for event in read(name, text, cut=True)] == [arguments]
    assert read("hermes", '<tool_call>\n{"name": "run", "arguments": {"path": "/a"}', cut=True) == [RUN], "all is there"
    (call,) = read("qwen3_coder", f"<tool_call>\n<function=run>\n<parameter=path>\n{NESTED}\nand", cut=True)
    assert call.arguments == json.dumps({"path": f"{NESTED}\nand"}, separators=(",", ":"))[:-2]
    assert read("hermes", "A <tool_call>\n", cut=True) == [Text("A")]
    assert read("hermes", "<tool_call> is what", cut=True) == [Text("<tool_call> is what")]


FAULTS = (*SOUP, *PARTS, "'", "\\", "null", "</path>", "<parameter=x>", "<parameter=path>\n", "\n</parameter>\n")
FAULTS += ('{"name": "Read"', ', "arguments": {"path": "', '"}}', "[", "]", ",", "</think>", "\n</tool_call>")


@given(
    st.sampled_from(sorted(BY_NAME)),
    st.lists(st.sampled_from(FAULTS), max_size=12),
    st.lists(st.integers(0, 4000), max_size=4),
    st.booleans(),
    st.booleans(),
)
def test_any_cut_of_a_text_with_faults_gives_the_same_answer(name, parts, cuts, thinking, cut):
    def told(cuts):
        tools = {"Read": TOOLS["run"]}
        events = read(name, "".join(parts), cuts, thinking, cut, tools)
        return [(e.name, e.arguments) if isinstance(e, CutCall) else e for e in events]

    whole = told(())
    assert told(cuts) == whole
    assert told(range(len("".join(parts)))) == whole


OPEN = "<tool_call>\n<function=run>\n<parameter=path>\n"


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("qwen3_coder", f"{OPEN}/a\n</function>\n</tool_call>\nand "),
        ("qwen3_coder", f"{OPEN}</function>x"),
        ("qwen3_coder", f"{OPEN}/a\n</tool_call>\n"),
        ("qwen3_coder", f"x{written('qwen3_coder', RUN)}"),
        ("qwen3_coder", "<function=x>\n<parameter=y>"),
        ("hermes", "<tool_call>x "),
        ("hermes", '<tool_call>{"name": "run", "arguments": {"path": "'),
        ("hermes", f"<tool_call>[{JSON}, "),
        ("llama3", '{"name": "run", "parameters": {'),
        ("llama3", f"{JSON} x"),
        ("mistral", "[TOOL_CALLS]"),
        ("deepseek", "<｜tool▁call▁begin｜>now<｜tool▁sep｜>"),
    ],
)
def test_hostile_text_takes_time_in_proportion_to_its_length(name, part, thinking):
    def seconds(chars):
        text = part * (chars // len(part))
        before = time.process_time()
        read(name, text, range(0, len(text), 4000), thinking)
        return time.process_time() - before

    assert min(seconds(60_000) for _ in range(2)) < 8 * seconds(15_000) + 0.2


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda v: st.lists(v) | st.dictionaries(st.text(), v),
        max_leaves=8,
    )
)
def test_python_literals_are_read_as_python_reads_them(value):
    assert decode_lenient(json.dumps(value)) == value
    wrapped = {"v": value}
    try:
        read_back = decode_lenient(repr(wrapped))
    except ValueError:
        assert "\\x" in repr(wrapped) or "\\U" in repr(wrapped), "escapes that only Python has"
        return
    if "\\x" not in repr(wrapped) and "\\U" not in repr(wrapped):
        assert read_back == wrapped
    assert read_cut_object(json.dumps(wrapped)) == (wrapped, None)
