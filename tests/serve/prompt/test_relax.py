"""A schema that cannot be enforced costs the keywords that it fails for, and nothing else of the request."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from typing import Any

import pytest

from serve.api.messages import InvalidRequest, decode_request
from serve.formats.families import BY_NAME
from serve.prompt import relax
from serve.prompt.enforce import DemandedSchema
from serve.prompt.masks import Constrainer, Constraint, ConstraintError, constraint_of, make_constrainer
from serve.prompt.relax import UNENFORCED, keyword_label, unenforced
from tests.helpers.http import ask
from tests.serve.prompt.test_grammar import SPARE, feed, setting

Json = dict[str, Any]
FORMS = ("answer", "hermes", "qwen3_coder")
EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
AHEAD = {"type": "string", "pattern": "(?=a)b"}
ANY_INTEGER = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}


def closed(**properties: Any) -> Json:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def nested(depth: int) -> Json:
    schema: Json = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


class Reports:
    """A constrainer of its own, and what it reports."""

    def __init__(self, format: str) -> None:
        self.format, self.dropped = format, list[tuple[str, tuple[str, ...]]]()
        hf, _, _, end = setting(format)
        self.constrainer: Constrainer = make_constrainer(hf, {end}, len(hf) + SPARE, report=self.add)

    def add(self, demanded: DemandedSchema, dropped: Sequence[str]) -> None:
        self.dropped.append((demanded.name, tuple(dropped)))

    def constraint(self, **fields: Any) -> Constraint:
        request = decode_request(json.dumps(ask("go", **fields)).encode())
        found = constraint_of(request, self.constrainer, BY_NAME[self.format], False)
        assert found
        return found


def asked(form: str, schema: Any) -> tuple[Reports, Json]:
    """A constrainer, and the fields of a request that demands a schema in this form."""
    if form == "answer":
        return Reports("hermes"), {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    tools = [{"name": "f", "input_schema": schema}]
    return Reports(form), {"tools": tools, "tool_choice": {"type": "tool", "name": "f"}}


def dropped(form: str, schema: Any) -> tuple[str, ...]:
    """What a schema is enforced without."""
    reports, fields = asked(form, schema)
    assert reports.constraint(**fields).mask().any()
    return reports.dropped[0][1] if reports.dropped else ()


# A schema, and the only keywords of it that are left out.
CASES: dict[str, tuple[Json, tuple[str, ...]]] = {
    "zod's email": (closed(to={"type": "string", "format": "email", "pattern": EMAIL}), ("/properties/to/pattern",)),
    "look-behind": (closed(a={"type": "string", "pattern": "(?<!a)b$"}), ("/properties/a/pattern",)),
    "backreference": (closed(a={"type": "string", "pattern": r"^(a)\1$"}), ("/properties/a/pattern",)),
    "word boundary": (closed(a={"type": "string", "pattern": r"\bfoo\b"}), ("/properties/a/pattern",)),
    "broken pattern": (closed(a={"type": "string", "pattern": "("}), ("/properties/a/pattern",)),
    "dangling": (closed(a={"$ref": "#/$defs/no"}, b={"type": "null"}), ("/properties/a/$ref",)),
    "other document": (closed(a={"$ref": "http://example.com/a"}), ("/properties/a/$ref",)),
    "type any": (closed(a={"type": "any"}), ("/properties/a/type",)),
    "type str": (closed(a={"type": "str", "description": "a"}), ("/properties/a/type",)),
    "type file": (closed(a={"type": "array", "items": {"type": "file"}}), ("/properties/a/items/type",)),
    "type of types": (closed(a={"type": [{"type": "string"}]}), ("/properties/a/type",)),
    "64 bits": (closed(a=ANY_INTEGER), ("/properties/a/minimum",)),
    "two at once": (
        closed(a=AHEAD, b={"type": "any"}, c={"type": "null"}),
        ("/properties/a/pattern", "/properties/b/type"),
    ),
    "in a definition": (
        {"$defs": {"E": AHEAD}, **closed(a={"$ref": "#/$defs/E"}, b={"type": "array", "items": {"$ref": "#/$defs/E"}})},
        ("/$defs/E/pattern",),
    ),
    "in a recursion": (
        {
            "$defs": {"N": closed(v=AHEAD, next={"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]})},
            **closed(n={"$ref": "#/$defs/N"}),
        },
        ("/$defs/N/properties/v/pattern",),
    ),
    "one alternative": (closed(a={"anyOf": [AHEAD, {"type": "null"}]}), ("/properties/a/anyOf/0/pattern",)),
    "deep inside": (
        closed(a=closed(b={"type": "array", "items": closed(c=AHEAD)})),
        ("/properties/a/properties/b/items/properties/c/pattern",),
    ),
    "among many": (closed(**{f"p{i}": {"type": "null"} for i in range(40)}, a=AHEAD), ("/properties/a/pattern",)),
    "names with slashes": (closed(**{"a/b~c": AHEAD}), ("/properties/a~1b~0c/pattern",)),
    "enum of no list": (closed(a={"enum": 5}), ("/properties/a/enum",)),
    "required of no list": ({"type": "object", "properties": {"a": {"type": "null"}}, "required": 5}, ("/required",)),
    "no schema": (closed(a=5, b={"type": "null"}), ("/properties/a",)),
    "contradiction": (closed(a={"type": "integer", "minimum": 5, "maximum": 3}), ("/properties/a/minimum",)),
    "negative length": (closed(a={"type": "string", "minLength": -1}), ("/properties/a/minLength",)),
    "endless": ({"$ref": "#/$defs/a", "$defs": {"a": closed(x={"$ref": "#/$defs/a"})}}, ("/$defs/a/required",)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_only_the_innermost_keyword_is_left_out(name: str, form: str) -> None:
    schema, left_out = CASES[name]
    assert dropped(form, schema) == left_out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"name": {"type": "null"}, "child": {"$ref": "#"}}, "required": ["name"]},
        closed(body={"type": "object", "properties": {"c": {"type": "array", "items": {"$ref": "#/properties/body"}}}}),
        {"$defs": {"P": {"$anchor": "p", "type": "integer"}}, **closed(p={"$ref": "#p"})},
        {
            "$defs": {"a/b": {"type": "null"}, "c d": {"type": "null"}},
            **closed(p={"$ref": "#/$defs/a~1b"}, q={"$ref": "#/$defs/c%20d"}),
        },
        {"definitions": {"P": {"type": "null"}}, **closed(p={"$ref": "#/definitions/P"})},
    ],
)
def test_references_within_a_schema_lead_somewhere_in_every_form(schema: Json, form: str) -> None:
    assert dropped(form, schema) == ()


@pytest.mark.parametrize("form", FORMS)
def test_keywords_that_nothing_enforces_are_left_out_and_named(form: str) -> None:
    values: Json = {"uniqueItems": True, "minContains": 1, "maxContains": 2, "$dynamicRef": "#a"}
    for keyword in UNENFORCED:
        schema = closed(a={"type": "integer", keyword: values.get(keyword, {"const": 1})})
        assert dropped(form, schema) == (f"/properties/a/{keyword}",), keyword
    for name in ("uri-reference", "binary", "path", "made-up"):
        assert dropped(form, closed(a={"type": "string", "format": name})) == ("/properties/a/format",)
    for name in relax.FORMATS:
        assert dropped(form, closed(a={"type": "string", "format": name})) == ()


@pytest.mark.parametrize("form", FORMS)
def test_alternatives_that_overlap_are_still_alternatives(form: str) -> None:
    schema = closed(a={"oneOf": [{"type": "null"}, {"type": ["null", "boolean"]}]})
    reports, fields = asked(form, schema)
    constraint = reports.constraint(**fields)
    hf = setting("hermes")[0]
    text = {"answer": '{"a": 5', "hermes": '<tool_call>\n{"name": "f", "arguments": {"a": 5'}.get(form)
    if text:
        with pytest.raises(ConstraintError):
            feed(constraint, hf(text, add_special_tokens=False)["input_ids"])


def test_the_rest_of_a_schema_is_enforced() -> None:
    hf = setting("hermes")[0]
    schema = closed(a=AHEAD, b={"type": "string", "maxLength": 2}, c={"const": 7})
    for text, good in (
        ('{"a": "any", "b": "xy", "c": 7}', True),
        ('{"a": "any", "b": "xyz"', False),
        ('{"a": "any", "b": "x", "c": 8', False),
        ('{"a": 5', False),
        ('{"b": ', False),
    ):
        reports, fields = asked("answer", schema)
        constraint = reports.constraint(**fields)
        ids = hf(text, add_special_tokens=False)["input_ids"]
        with contextlib.nullcontext() if good else pytest.raises(ConstraintError):
            feed(constraint, [*ids, setting("hermes")[3]])


@pytest.mark.parametrize("format", ["hermes", "qwen3_coder", "mistral"])
def test_one_bad_tool_among_many_costs_only_its_own_constraint(format: str) -> None:
    good = [{"name": f"t{i}", "input_schema": closed(a={"type": "integer"})} for i in range(20)]
    bad = {"send": closed(to={"type": "string", "pattern": EMAIL}), "list": {"type": "array"}, "lost": {"$ref": "#/no"}}
    tools = [*good[:10], *({"name": name, "input_schema": schema} for name, schema in bad.items()), *good[10:]]
    reports = Reports(format)
    for choice in (
        {"type": "any"},
        {"type": "any", "disable_parallel_tool_use": True},
        {"type": "tool", "name": "list"},
    ):
        assert reports.constraint(tools=tools, tool_choice=choice).mask().any()
    assert reports.dropped == [
        ("tool send", ("/properties/to/pattern",)),
        ("tool list", ("/type",)),
        ("tool lost", ("/$ref",)),
    ], "once each, however many requests"


def test_a_schema_is_searched_once_and_remembered_within_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    reports, fields = asked("answer", closed(a=AHEAD))
    reports.constraint(**fields)
    enforcer = reports.constrainer.enforcer
    assert 0 < enforcer.found.bytes < enforcer.found.most_bytes
    monkeypatch.setattr("serve.prompt.enforce.relax", lambda *args: pytest.fail("searched again"))
    reports.constraint(**fields)
    assert len(reports.dropped) == 1


def test_when_time_is_up_a_schema_is_left_out_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relax, "MOST_ATTEMPTS", 0)
    monkeypatch.setattr(relax.Budget.__init__, "__defaults__", (0, *relax.Budget.__init__.__defaults__[1:]))
    reports = Reports("hermes")
    tools = [{"name": name, "input_schema": closed(a=AHEAD)} for name in "ab"]
    assert reports.constraint(tools=tools, tool_choice={"type": "any"}).mask().any()
    assert reports.dropped == [], "it is searched by a later request"


@pytest.mark.parametrize("form", FORMS)
def test_schemas_beyond_the_limits_of_size_are_refused_as_before(form: str) -> None:
    for schema in (
        closed(a=nested(440)),
        closed(a=nested(900)),
        closed(a={"anyOf": [{"const": "x" * 100 + str(i)} for i in range(4000)]}),
        closed(a={"type": "integer", "multipleOf": 10_000_019}),
    ):
        reports, fields = asked(form, schema)
        with pytest.raises(InvalidRequest, match="schema"):
            reports.constraint(**fields)


def test_a_hostile_schema_takes_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relax, "MOST_SECONDS", 0.5)
    leaves = {f"p{i}": {"type": "null"} for i in range(3000)}
    chain: Json = {"type": "object", "properties": leaves}
    for _ in range(60):
        chain = {"type": "object", "properties": {"c": chain}}
    pointers = ["#" + "/properties/c" * i for i in range(61)]
    for schema in (
        chain | {"anyOf": [{"$ref": pointer} for pointer in pointers], "pattern": "("},
        closed(**{f"p{i}": {"$ref": f"#a{i}"} for i in range(4000)}, bad=AHEAD),
        closed(a={"$ref": "#/properties/" + "9" * 5000}, b={"$ref": "#/required/" + "9" * 5000}),
        closed(**{f"p{i}": {"type": "string", "pattern": f"(?={i})"} for i in range(2000)}),
        closed(a={"type": "string", "pattern": "^(a{1000}){1000}$"}),
    ):
        begin = time.thread_time()
        assert dropped("hermes", schema)
        assert time.thread_time() - begin < relax.MOST_SECONDS + 10


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("depth", [130, 200, 250])
def test_what_is_too_deep_is_cut_off(form: str, depth: int) -> None:
    (left_out,) = dropped(form, closed(a=nested(depth), b={"type": "null"}))
    assert left_out == "" or left_out.startswith("/properties/a")


def test_the_labels_of_the_metric_are_few() -> None:
    labels = {keyword_label(pointer) for pointer in ("", "/a/pattern", "/properties/type", "/x/made-up", "/a/oneOf")}
    assert labels == {"schema", "pattern", "type", "other", "oneOf"}


def test_only_places_of_schemas_are_searched_for_keywords() -> None:
    schema = closed(**{"not": {"type": "null"}, "a": {"enum": [{"not": 1}], "default": {"if": 1}}})
    assert [*unenforced(schema)] == []
