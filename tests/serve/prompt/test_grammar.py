"""For any logits, an answer under a constraint is what the request demands, and ends."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.sampling import Sampling, sample
from serve.api.messages import InvalidRequest, ToolUseBlock, decode_request
from serve.formats.families import BY_NAME
from serve.formats.format import Format, write_turn
from serve.formats.readers import CALLS_END, Call
from serve.formats.stream import NO_STOPS, AnswerStream, Thinking, ThinkingEnd
from serve.prompt.grammar import Grammar, grammar_of
from serve.prompt.masks import Constrainer, Constraint, ConstraintError, constraint_of, make_constrainer
from tests.helpers.http import ask
from tests.helpers.model_families import AGENT_FAMILIES, FAMILIES, tokenizer_of

Json = dict[str, Any]
ROWS = 16
SPARE = 50  # logits that no token of the tokenizer belongs to
FAMILY = {family.name: family for family in (*FAMILIES, *AGENT_FAMILIES)}
FORMATS = {
    "hermes": "qwen3",
    "qwen3_coder": "qwen3",
    "llama3": "llama3.1",
    "mistral": "mistral-v3",
    "mistral_args": "mistral-v3",
    "deepseek": "deepseek-r1",
    "deepseek_v31": "deepseek-r1",
    "glm45": "glm-4.6",
    "glm47": "glm-4.7",
    "kimi_k2": "kimi-k2",
    "minimax_m2": "minimax-m2",
    "nemotron": "nemotron-nano",
    "harmony": "gpt-oss",
}


@cache
def setting(format: str, family_name: str = "") -> tuple[Any, Format, Constrainer, int]:
    """A family's tokenizer with the format that is asked for, its constrainer and its model's vocabulary."""
    family = FAMILY[family_name or FORMATS[format]]
    hf = tokenizer_of(family).hf
    end = hf.convert_tokens_to_ids(family.end)
    return hf, BY_NAME[format], make_constrainer(hf, {end}, len(hf) + SPARE), end


def demands(format: str, thinking_opened: bool = False, family: str = "", **fields: Any) -> Grammar | None:
    """The grammar of a request with these fields."""
    _, form, constrainer, _ = setting(format, family)
    request = decode_request(json.dumps(ask("go", **fields)).encode())
    return grammar_of(request, form, thinking_opened, constrainer.added_tokens)


def wanted(schema: Any, **fields: Any) -> Json:
    """The fields of a request for JSON."""
    return {"output_config": {"format": {"type": "json_schema", "schema": schema}}, **fields}


def tool(name: str, schema: Json) -> Json:
    return {"name": name, "input_schema": schema}


draw = jax.jit(sample)


def answers(
    format: str, grammar: Grammar, seed: int, temperature: float, favoured: Sequence[str] = ()
) -> list[list[int]]:
    """ROWS answers to random logits, stop id included; the tokens that close things are likelier, so that they end."""
    _, _, constrainer, end = setting(format)
    hf, vocab = setting(format)[0], len(setting(format)[0]) + SPARE
    rng = np.random.default_rng(seed)
    bias = np.zeros(vocab, np.float32)
    bias[[hf.convert_tokens_to_ids(token) for token in ('"', "}", "]", *favoured)]] = 3 + 2 * temperature
    last = hf.convert_tokens_to_ids(CALLS_END)  # else nothing keeps calls in tokens from going on
    bias[[end, end if last is None else last]] = 6
    constraints = [constrainer.start(grammar) for _ in range(ROWS)]
    results: list[list[int]] = [[] for _ in range(ROWS)]
    for step in range(3000):
        going = [i for i, result in enumerate(results) if not result or result[-1] != end]
        if not going:
            return results
        mask = np.full((ROWS, -(-vocab // 32)), 2**32 - 1, np.uint32)
        for i in going:
            mask[i] = constraints[i].mask()
            assert mask[i].any(), "a dead end"
        logits = rng.normal(size=(ROWS, vocab)).astype(np.float32) + bias
        sampling = Sampling(
            temperature=np.full(ROWS, temperature, np.float32),
            top_k=np.zeros(ROWS, np.int32),
            top_p=np.ones(ROWS, np.float32),
            seeds=np.arange(ROWS, dtype=np.uint32),
            positions=np.full(ROWS, step, np.int32),
            mask=mask,
        )
        tokens = np.asarray(draw(logits, sampling))
        for i in going:
            constraints[i].accept(int(tokens[i]))
            results[i].append(int(tokens[i]))
    raise AssertionError(f"no end in sight: {hf.decode(results[going[0]])[-300:]!r}")


def text_of(format: str, ids: list[int]) -> str:
    hf, _, _, end = setting(format)
    assert ids[-1] == end
    assert max(ids) < len(hf)
    return hf.decode(ids[:-1], clean_up_tokenization_spaces=False)


def valid(value: Any, schema: Any, root: Json | None = None) -> bool:
    """Whether a value obeys a schema, for the keywords that occur here."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        return valid(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    is_a = {
        "string": isinstance(value, str),
        "integer": number and value == int(value),
        "number": number,
        "boolean": isinstance(value, bool),
        "null": value is None,
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
    }
    types = schema.get("type", list(is_a))
    checks = [
        any(is_a[name] for name in ([types] if isinstance(types, str) else types)),
        any(json.dumps(value) == json.dumps(allowed) for allowed in schema.get("enum", [value])),
        json.dumps(value) == json.dumps(schema.get("const", value)),
        any(valid(value, part, root) for part in schema.get("anyOf", [True])),
        all(valid(value, part, root) for part in schema.get("allOf", [])),
    ]
    if number:
        checks += [
            value >= schema.get("minimum", value),
            value <= schema.get("maximum", value),
            value > schema.get("exclusiveMinimum", value - 1),
            value < schema.get("exclusiveMaximum", value + 1),
            value % schema.get("multipleOf", value or 1) == 0,
        ]
    if isinstance(value, str):
        checks += [
            schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)),
            re.search(schema.get("pattern", ""), value) is not None,
        ]
    if isinstance(value, list):
        checks += [schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))]
        checks += [valid(item, schema.get("items", True), root) for item in value]
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        checks += [key in value for key in schema.get("required", [])]
        checks += [valid(inner, known.get(key, others), root) for key, inner in value.items()]
    return all(checks)


def closed(properties: Json, *required: str) -> Json:
    """The schema of an object with these properties only."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


# What `MADE` below does not make.
SCHEMAS: dict[str, Json] = {
    "any of": {"anyOf": [closed({"n": {"type": "integer"}}, "n"), {"const": "none"}, {"type": "null"}]},
    "bounds": closed(
        {
            "a": {"type": "integer", "minimum": -7, "exclusiveMaximum": 120},
            "b": {"type": "number", "exclusiveMinimum": 0, "maximum": 1.5},
            "c": {"type": "integer", "multipleOf": 5, "minimum": 0},
            "d": {"type": "number"},
        },
        *"abcd",
    ),
    "pattern and length": {"type": "string", "pattern": "^[a-c]{2,5}-[0-9]+$", "maxLength": 12},
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": closed(
                {"v": {"type": "integer", "maximum": 9}, "c": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
                "v",
            )
        },
    },
    "mixed": closed({"x": {"type": ["string", "integer", "null"], "maxLength": 3}}, "x"),
    "no properties named": {"type": "object", "additionalProperties": {"type": "boolean"}},
}


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("name", SCHEMAS)
def test_any_logits_give_json_that_obeys_the_schema(name: str, temperature: float) -> None:
    grammar = demands("hermes", **wanted(SCHEMAS[name]))
    assert grammar
    for ids in answers("hermes", grammar, len(name), temperature):
        text = text_of("hermes", ids)
        value = json.loads(text)
        assert valid(value, SCHEMAS[name]), text
        assert "\n" not in text


LEAVES = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        INTS := st.integers(-99, 99),
        st.integers(0, 500),
    ),
    st.builds(lambda low, size: {"type": "number", "minimum": low, "maximum": low + size}, INTS, st.integers(1, 500)),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 4),
        st.integers(0, 4),
    ),
    st.builds(
        lambda pattern: {"type": "string", "pattern": pattern},
        st.sampled_from(["^a+b$", r"^\d{3}$", "^(x|yz){1,3}$", r"^\w\s\w$"]),
    ),
    st.lists(st.text(max_size=5) | st.integers(-9, 9) | st.none(), min_size=1, max_size=4).map(
        lambda values: {"enum": values}
    ),
)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="<>\n\r\ufffd"), min_size=1, max_size=6)


def objects(inner: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    """Schemas of objects, some of whose properties are required."""
    properties = st.dictionaries(NAMES, inner, max_size=4)
    return st.builds(
        lambda found, some: closed(found, *[k for k in found if len(k) % 2 == some]), properties, st.integers(0, 1)
    )


MADE = st.recursive(
    LEAVES,
    lambda inner: (
        objects(inner)
        | st.builds(lambda item, most: {"type": "array", "items": item, "maxItems": most}, inner, st.integers(0, 3))
        | st.lists(inner, min_size=1, max_size=3).map(lambda choices: {"anyOf": choices})
    ),
    max_leaves=6,
)


@settings(max_examples=25)
@given(schema=MADE, seed=st.integers(0, 999), temperature=st.sampled_from([0.0, 1.0, 2.0]))
def test_any_schema_is_obeyed(schema: Json, seed: int, temperature: float) -> None:
    grammar = demands("hermes", **wanted(schema))
    assert grammar
    for ids in answers("hermes", grammar, seed, temperature):
        assert valid(json.loads(text_of("hermes", ids)), schema)


THINKING = {"type": "enabled", "budget_tokens": 1024}
TEXT = {"type": "string", "maxLength": 12}
TOOLS = {
    "Read": closed({"path": TEXT, "limit": {"type": "integer", "minimum": 1}, "flag": {"type": "boolean"}}, "path"),
    "ReadAll": closed({}),
    "Edit": closed(
        {
            "mode": {"allOf": [{"$ref": "#/$defs/mode"}]},
            "places": {"type": "array", "maxItems": 2, "items": closed({"x": {"type": "number"}}, "x")},
            "note": {"anyOf": [TEXT, {"type": "null"}, {"const": 2}]},
            "code": {"type": "string", "pattern": "^[a-f]{4}$"},
        },
        *("mode", "places", "note", "code"),
    )
    | {"$defs": {"mode": {"enum": ["fast", "slow", "é"]}}},
}
DRAFT = {"$schema": "http://json-schema.org/draft-07/schema#"}
OFFERED = [tool(name, schema | DRAFT) for name, schema in TOOLS.items()]


def calls_of(
    format: str, ids: list[int], thinking: bool = False, schemas: Json = TOOLS
) -> tuple[list[Call], list[Any]]:
    """The calls that the parser finds in an answer, and its other events."""
    hf, form, _, end = setting(format)
    assert ids[-1] == end
    stream = AnswerStream(hf.backend_tokenizer, form, NO_STOPS, schemas, thinking)
    events = [event for token in ids[:-1] for event in stream.feed(token)] + stream.finish()
    calls = [event for event in events if isinstance(event, Call)]
    return calls, [event for event in events if not isinstance(event, Call)]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("format", FORMATS)
def test_any_logits_give_calls_that_the_parser_reads_and_the_schemas_allow(format: str, temperature: float) -> None:
    grammar = demands(format, tools=OFFERED, tool_choice={"type": "any"})
    assert grammar
    seen = set()
    for ids in answers(format, grammar, 7, temperature):
        calls, others = calls_of(format, ids)
        assert calls
        assert not others
        for call in calls:
            assert valid(call.input, TOOLS[call.name]), call
        seen |= {call.name for call in calls}
        # The whole answer is what would be written into the history, except for ids and the spelling of values.
        blocks = [ToolUseBlock(call.id, call.name, call.input) for call in calls]
        hf, form, _, _ = setting(format)
        again = hf(write_turn(form, blocks), add_special_tokens=False)["input_ids"]
        assert [(c.name, c.input) for c in calls_of(format, [*again, ids[-1]])[0]] == [(c.name, c.input) for c in calls]
    assert seen >= {"Read", "Edit"}


@pytest.mark.parametrize("format", FORMATS)
def test_a_chosen_tool_is_called_once_where_no_parallel_calls_are_wanted(format: str) -> None:
    choice = {"type": "tool", "name": "Read", "disable_parallel_tool_use": True}
    grammar = demands(format, tools=OFFERED, tool_choice=choice)
    assert grammar
    for ids in answers(format, grammar, 3, 1.0):
        calls, others = calls_of(format, ids)
        assert [call.name for call in calls] == ["Read"]
        assert not others


@pytest.mark.parametrize("format", [name for name in FORMATS if not BY_NAME[name].ends_with_call])
@pytest.mark.parametrize("family", ["", "qwen3"])  # where a format's delimiters are tokens, and where most are none
def test_several_calls_are_written_as_the_history_has_them(format: str, family: str) -> None:
    hf, form, constrainer, end = setting(format, family)
    ids = ["functions.Read:0", "functions.ReadAll:1"] if format == "kimi_k2" else ["toolu_0123456789"] * 2
    blocks = [ToolUseBlock(ids[0], "Read", {"path": "a b\n"}), ToolUseBlock(ids[1], "ReadAll", {})]
    text = write_turn(form, blocks)
    tokens = [*hf(text, add_special_tokens=False)["input_ids"], end]
    many = demands(format, family=family, tools=OFFERED, tool_choice={"type": "any"})
    one = demands(format, family=family, tools=OFFERED, tool_choice={"type": "any", "disable_parallel_tool_use": True})
    assert many
    assert one
    feed(constrainer.start(many), tokens)
    with pytest.raises(ConstraintError):
        feed(constrainer.start(one), tokens)


@pytest.mark.parametrize("thinks", [True, False])
def test_messages_in_channels_are_one_call_or_the_final_json(thinks: bool) -> None:
    hf, _, constrainer, end = setting("harmony")
    fields = {"thinking": THINKING} if thinks else {}
    grammar = demands("harmony", tools=OFFERED, **wanted({"type": "null"}), **fields)
    assert grammar
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant" * thinks
    call = "<|channel|>commentary to=functions.ReadAll <|constrain|>json<|message|>{}"
    for text in ("<|channel|>final<|message|>null", call):
        feed(constrainer.start(grammar), [*hf(thought + text, add_special_tokens=False)["input_ids"], end])
    for text in ("null", call + "<|call|><|start|>assistant" + call):
        with pytest.raises(ConstraintError):
            feed(constrainer.start(grammar), [*hf(thought + text, add_special_tokens=False)["input_ids"], end])


@pytest.mark.parametrize("format", ["glm45", "glm47", "minimax_m2"])
def test_a_value_in_tags_may_be_empty(format: str) -> None:
    hf, form, constrainer, end = setting(format)
    grammar = demands(format, tools=[tool("f", closed({"s": {"type": "string"}}, "s"))], tool_choice={"type": "any"})
    assert grammar
    text = write_turn(form, [ToolUseBlock("toolu_0", "f", {"s": ""})])
    feed(constrainer.start(grammar), [*hf(text, add_special_tokens=False)["input_ids"], end])


def feed(constraint: Constraint, ids: Sequence[int]) -> None:
    """Feed tokens, each of which must be in the mask and after the last of which nothing is missing."""
    for token in ids:
        if not constraint.mask()[token // 32] >> (token % 32) & 1:
            raise ConstraintError(f"token {token} is not in the mask")
        constraint.accept(token)
    assert constraint.finished


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize(
    "format", ["hermes", "qwen3_coder", "deepseek", "deepseek_v31", "glm45", "kimi_k2", "minimax_m2"]
)
def test_thinking_comes_before_calls(format: str, opened: bool) -> None:
    grammar = demands(format, opened, tools=OFFERED, tool_choice={"type": "any"}, thinking=THINKING)
    assert grammar
    thought = 0
    for ids in answers(format, grammar, 11, 1.0, ["<think>", "</think>", "Ċ"]):
        calls, others = calls_of(format, ids, opened)
        assert calls
        assert {type(piece) for piece in others} <= {Thinking, ThinkingEnd}
        thought += bool(others)
    assert thought


@pytest.mark.parametrize("format", ["hermes", "llama3", "deepseek_v31"])
@pytest.mark.parametrize("fields", [{}, {"thinking": {"type": "disabled"}}])
def test_thinking_that_is_not_wanted_ends_where_the_prompt_has_opened_it(format: str, fields: Json) -> None:
    hf, form, constrainer, end = setting(format)
    grammar = demands(format, True, **wanted({"type": "null"}), **fields)
    assert grammar
    assert form.think
    feed(constrainer.start(grammar), [*hf(f"{form.think[1]}null", add_special_tokens=False)["input_ids"], end])
    with pytest.raises(ConstraintError):
        feed(constrainer.start(grammar), [*hf(f"Hm{form.think[1]}null", add_special_tokens=False)["input_ids"], end])


def test_thinking_that_is_spelled_ends_where_its_mark_is_complete() -> None:
    hf, _, constrainer, end = setting("llama3")
    assert "</think>" not in constrainer.added_tokens
    grammar = demands("llama3", True, **wanted({"type": "null"}), thinking=THINKING)
    assert grammar
    feed(
        constrainer.start(grammar),
        [*hf("hm </thi\n\nnk>\n</think>\n\nnull", add_special_tokens=False)["input_ids"], end],
    )
    for wrong in ("null", "hm</think>\n\nnull", "\n</think>\n\nnull\n</think>\n\nnull"):
        with pytest.raises(ConstraintError):
            feed(constrainer.start(grammar), [*hf(wrong, add_special_tokens=False)["input_ids"], end])


def test_stop_ids_are_allowed_exactly_where_the_answer_may_end() -> None:
    hf, _, _, end = setting("hermes")
    other = hf.convert_tokens_to_ids("<|endoftext|>")
    constrainer = make_constrainer(hf, {end, other, 10**6}, len(hf) + SPARE)
    grammar = demands("hermes", **wanted({"type": "integer", "minimum": 0, "maximum": 150}))
    assert grammar
    constraint = constrainer.start(grammar)
    assert constraint.mask().shape == (-(-(len(hf) + SPARE) // 32),)
    assert not {end, other} & allowed(constraint)
    for digit, finished in (("1", False), ("5", False), ("0", True)):
        constraint.accept(hf.convert_tokens_to_ids(digit))
        assert {end, other} <= allowed(constraint)
        assert constraint.finished == finished
    assert allowed(constraint) == {end, other}
    constraint.accept(other)
    assert constraint.finished


def allowed(constraint: Constraint) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")).tolist())


def test_a_request_that_demands_nothing_is_free() -> None:
    for fields in (
        {},
        {"tools": OFFERED},
        {"tools": OFFERED, "tool_choice": {"type": "auto"}},
        {"output_config": {"effort": "low"}},
    ):
        assert demands("hermes", **fields) is None


def test_json_is_an_alternative_to_calls_unless_calls_are_forced_or_forbidden() -> None:
    hf, _, constrainer, end = setting("hermes")
    null, call = "null", '<tool_call>\n{"name": "ReadAll", "arguments": {}}\n</tool_call>'
    expected = {"auto": [null, call], "any": [call], "none": [null]}
    for choice, texts in expected.items():
        grammar = demands("hermes", tools=OFFERED, tool_choice={"type": choice}, **wanted({"type": "null"}))
        assert grammar
        for text in (null, call):
            ids = [*hf(text, add_special_tokens=False)["input_ids"], end]
            if text in texts:
                feed(constrainer.start(grammar), ids)
            else:
                with pytest.raises(ConstraintError):
                    feed(constrainer.start(grammar), ids)


def test_what_cannot_be_forced_is_refused_by_name() -> None:
    forced = {"tools": OFFERED, "tool_choice": {"type": "any"}}
    prefilled = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "{"}]
    for fields in (forced, wanted({})):
        with pytest.raises(InvalidRequest, match=r"^messages: .*(tool_choice|output_config\.format)"):
            demands("hermes", messages=prefilled, **fields)
    request = decode_request(json.dumps(ask("go", **forced)).encode())
    with pytest.raises(InvalidRequest, match=r"^tool_choice: "):
        grammar_of(request, BY_NAME["thinking"], False, {})
    with pytest.raises(InvalidRequest, match=r"^tools\[0\]\.name: "):
        demands("qwen3_coder", tools=[tool("a tool", {})], tool_choice={"type": "any"})


# Keywords that llguidance does not enforce.
UNKNOWN: list[Json] = [
    {"propertyNames": {"pattern": "^a"}},
    {"not": {"required": ["a"]}},
    {"if": {"required": ["a"]}, "then": {"required": ["b"]}},
    {"dependentRequired": {"a": ["b"]}, "$schema": "https://json-schema.org/draft/2020-12/schema"},
    {"properties": {"a": {"type": "array", "uniqueItems": True}}},
    {"properties": {"a": {"type": "string", "format": "made-up"}}},
    {"minProperties": 1, "properties": {"a": {"type": "integer"}}},
    {"properties": {"a": {"oneOf": [{"type": "object"}, {"type": "object", "properties": {"b": {"type": "null"}}}]}}},
]


@pytest.mark.parametrize("extra", UNKNOWN, ids=lambda extra: next(iter(extra)))
def test_unknown_keywords_are_left_out_for_tools_and_refused_for_answers(extra: Json) -> None:
    schema = {"type": "object", "properties": {"a": {}, "b": {}}} | extra
    for format in ("hermes", "qwen3_coder"):
        grammar = demands(format, tools=[tool("f", schema)], tool_choice={"type": "any"})
        assert grammar
        assert setting(format)[2].start(grammar).mask().any()
    grammar = demands("hermes", **wanted(schema))
    assert grammar
    with pytest.raises(InvalidRequest, match=r"^output_config\.format\.schema: ."):
        setting("hermes")[2].start(grammar)


def nested(depth: int, schema: Any) -> Json:
    """A schema of arrays within arrays."""
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


BAD: dict[str, Json] = {
    "type": {"type": "strin"},
    "types": {"type": 5},
    "enum": {"enum": 5},
    "anyOf": {"anyOf": {"a": 1}},
    "required": {"required": 5},
    "properties": {"properties": [1]},
    "contradiction": {"type": "integer", "minimum": 5, "maximum": 3},
    "false": closed({"a": False}, "a"),
    "missing": closed({}, "a"),
    "remote": {"$ref": "http://example.com/schema"},
    "lost": {"$ref": "#/$defs/lost"},
    "loop": {"$ref": "#"},
    "endless": {"$ref": "#/$defs/a", "$defs": {"a": closed({"x": {"$ref": "#/$defs/a"}}, "x")}},
    "itself": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "lookahead": {"type": "string", "pattern": "(?=a)b"},
    "pattern": {"type": "string", "pattern": "("},
    "huge pattern": {"type": "string", "pattern": "^(a{1000}){1000}$"},
    "deep": nested(200, {}),
    "deeper": nested(440, {}),
    "wide": {"anyOf": [{"const": "x" * 100 + str(i)} for i in range(4000)]},
    "many optional": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2500)}},
    "multiple": {"type": "integer", "multipleOf": 10_000_019},
    "multiples": {"allOf": [{"type": "integer", "multipleOf": n} for n in (9967, 9973, 9949)]},
    "length": {"type": "string", "minLength": -1},
    "items": {"type": "array", "minItems": 1.5},
}


@pytest.mark.parametrize("name", BAD)
def test_a_schema_that_no_answer_obeys_or_that_is_too_large_is_refused_by_its_field(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^output_config\.format\.schema: .") as refused:
        setting("hermes")[2].start(demands("hermes", **wanted(BAD[name])))
    assert len(str(refused.value)) < 600
    for format in ("hermes", "qwen3_coder"):
        tools = [
            tool("good", {}),
            tool("bad", closed({"bad": BAD[name]}, "bad") | {"$defs": BAD[name].get("$defs", {})}),
        ]
        if name == "loop":
            tools[1]["input_schema"] = BAD[name]
        with pytest.raises(InvalidRequest, match=r"^tools\[1\]\.input_schema"):
            setting(format)[2].start(demands(format, tools=tools, tool_choice={"type": "any"}))


def test_definitions_that_references_multiply_are_refused_and_not_written_out() -> None:
    many = {f"p{i}": {"$ref": "#/$defs/a"} for i in range(2000)}
    schema = {"properties": many, "$defs": {"a": {"enum": [f"word {i}" for i in range(5000)]}}}
    with pytest.raises(InvalidRequest, match=r"^tools\[0\]\.input_schema: expected parameters of at most \d+ char"):
        demands("qwen3_coder", tools=[tool("f", schema)], tool_choice={"type": "any"})


def test_a_request_becomes_a_constraint_in_one_go() -> None:
    _, form, constrainer, end = setting("hermes")
    free = decode_request(json.dumps(ask("go")).encode())
    bound = decode_request(json.dumps(ask("go", **wanted({"const": 1}))).encode())
    assert constraint_of(free, constrainer, form, False) is None
    constraint = constraint_of(bound, constrainer, form, False)
    assert constraint
    feed(constraint, [setting("hermes")[0].convert_tokens_to_ids("1"), end])


def test_arguments_are_an_object() -> None:
    with pytest.raises(InvalidRequest, match=r"^tools\[0\]\.input_schema\.type: expected 'object', got 'string'"):
        demands("hermes", tools=[tool("f", {"type": "string"})], tool_choice={"type": "any"})
    hf, _, constrainer, end = setting("hermes")
    grammar = demands("hermes", tools=[tool("f", {})], tool_choice={"type": "any"})
    assert grammar
    text = '<tool_call>\n{"name": "f", "arguments": {"any": [1]}}\n</tool_call>'
    feed(constrainer.start(grammar), [*hf(text, add_special_tokens=False)["input_ids"], end])
    with pytest.raises(ConstraintError):
        feed(constrainer.start(grammar), hf(text.replace('{"any": [1]}', "5"), add_special_tokens=False)["input_ids"])


def test_a_tokenizer_without_a_stop_id_has_no_constrainer() -> None:
    with pytest.raises(ValueError, match="stop ids"):
        make_constrainer(setting("hermes")[0], {10**6}, 300)
