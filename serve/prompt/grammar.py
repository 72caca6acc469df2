"""The grammar of an answer: the JSON schema or the tool calls that a request demands, as text for llguidance.

A grammar is Lark text with JSON schemas inside, in the dialect of llguidance, which compiles it and computes the masks
(see `masks`): https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md. The text around a tool call comes
from `formats`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any

import msgspec
from llguidance import regex_to_lark

from serve.api.messages import InvalidRequest, MessagesRequest, ToolUseBlock
from serve.api.tools import Tool
from serve.formats.format import Format, tagged_arguments, to_json
from serve.formats.readers import KEY, NAME, SPACE
from serve.formats.schemas import (
    DEFINITIONS,
    Unenforceable,
    alternatives,
    bounded,
    listed_values,
    own_types,
    schema_text,
    tool_schema,
    typed,
    types_of,
)
from serve.limits.bounds import GRAMMAR_CHARS
from serve.prompt.conversation import is_prefilled, wants_thinking
from serve.prompt.offered_tools import offered_tools

# JSON as chat templates and `formats` write it: no free whitespace, which a model may never stop writing.
STRICT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# The client checks a tool's arguments anyway: keywords of its schema that llguidance does not know are left out.
LENIENT = STRICT | {"lenient": True}
ANSWER_FIELD = "output_config.format"
PROBE = "Zq7Zq7Zq7"  # stands for the varying parts of a call; as long as the ids that Mistral's models write
ANY = "/(?s:.*)/"
# Text that is not read as JSON: values of tags are, where their schema allows more than strings.
WORDS = "null|true|false|None|True|False|NaN|Infinity"
NO_JSON = rf'(/([^\s\[{{"0-9\-](?s:.*))?/ & ~/({WORDS})\s*/)'


class Form(Enum):
    """How a schema's values are written: as an answer in JSON, as a call's arguments in JSON, or each in its tag."""

    ANSWER = "answer"
    ARGUMENTS = "arguments"
    PARAMETERS = "parameters"


# Whether parameters in tags can be enforced does not depend on the tags.
TAGS = Format("tags", parameter=("<parameter={}>\n", "\n</parameter>\n"))


@dataclass(frozen=True)
class Grammar:
    """The form of an answer: Lark text, and each schema in it with the name of its field."""

    text: str
    schemas: tuple[tuple[str, str], ...]  # (field, JSON text)


@dataclass(frozen=True)
class Body:
    """One form of an answer after its thinking: the name of a rule, the rules, and the schemas in them."""

    name: str
    rules: str
    schemas: tuple[tuple[str, str], ...]


def grammar_of(
    request: MessagesRequest,
    format: Format,
    thinking_opened: bool,
    added: Mapping[str, int],
    schemas: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> Grammar | None:
    """The grammar that a request demands: calls, JSON or, where it allows both, either; None if it demands nothing.

    `thinking_opened` says that the prompt ends inside thinking; `added` has the ids of the tokenizer's added tokens by
    their text; `schemas`, by field, take the place of the request's own. Raises InvalidRequest if the format has no
    calls, the client has begun the answer, or a schema is too large, Unenforceable if there is no grammar of one.
    """
    choice, wanted = request.tool_choice, request.answer_format
    forced = choice is not None and choice.type in ("any", "tool")
    if not forced and not wanted:
        return None
    field = "tool_choice" if forced else ANSWER_FIELD
    if is_prefilled(request):
        raise InvalidRequest(f"messages: expected the user's message last together with {field}, got the assistant's")
    if forced and not format.call:
        raise InvalidRequest("tool_choice: expected 'auto' or 'none', as this model's chat template has no tool calls")
    tools = demanded_tools(request, format, schemas)
    if forced and not tools:
        named = choice.name if choice and choice.type == "tool" else None
        found = f"{named!r:.80}, which is not loaded or was removed" if named else "none that is loaded"
        raise InvalidRequest(f"tool_choice: expected a tool that may be called at the end of messages, got {found}")
    header = literal(format, format.answer_header, added)
    bodies = [answer(schemas.get(ANSWER_FIELD, wanted.schema), header)] if wanted and not forced else []
    if tools:
        bodies.append(tool_calls(format, tools, not (choice and choice.disable_parallel_tool_use), added))
    return assemble(bodies, thinking(format, thinking_opened, wants_thinking(request), added))


def demanded_tools(
    request: MessagesRequest, format: Format, schemas: Mapping[str, dict[str, Any]]
) -> list[tuple[str, Tool]]:
    """The tools that an answer under a grammar may call, each with its field, and with its schema in `schemas`."""
    choice = request.tool_choice
    if not format.call or (choice and choice.type == "none"):
        return []
    named = choice.name if choice and choice.type == "tool" else None
    return [
        (field, msgspec.structs.replace(tool, input_schema=schemas[field]) if field in schemas else tool)
        for field, tool in offered_tools(request).callable
        if named in (None, tool.name)
    ]


def assemble(bodies: Sequence[Body], thinking: str) -> Grammar:
    """The grammar of thinking, then one of the bodies, then the end of the turn."""
    start = f"start: thinking ({' | '.join(body.name for body in bodies)})\n"
    schemas = tuple(schema for body in bodies for schema in body.schemas)
    return Grammar(start + thinking + "".join(body.rules for body in bodies), schemas)


def schema_grammars(schema: dict[str, Any], form: Form, whole: bool) -> list[str]:
    """Grammars that compile if a schema can be enforced in this form: the whole schema of a field, or one within it.

    Raises Unenforceable if there is no grammar, InvalidRequest if the schema is too large.
    """
    if form is Form.ANSWER:
        return [f"start: %json {schema_text(schema, STRICT, 'schema')}\n"]
    schema = tool_schema(schema, "schema") if whole else schema
    texts = [f"start: %json {schema_text(schema, LENIENT, 'schema')}\n"]
    if form is Form.PARAMETERS:
        value = {key: inner for key, inner in schema.items() if key not in DEFINITIONS}
        definitions = {key: inner for key, inner in schema.items() if key in DEFINITIONS}
        tagged = schema if whole else definitions | {"properties": {"value": value}, "required": ["value"]}
        expression, rules = parameters(TAGS, {}, bounded(tagged), "value", "schema")
        texts.append(f"start: {expression or quoted('')}\n{rules}")
    return texts


def answer(schema: dict[str, Any], header: str) -> Body:
    """A header, in Lark, and one JSON value that is valid for the schema.

    A keyword that llguidance cannot enforce is an error later.
    """
    field = f"{ANSWER_FIELD}.schema"
    text = schema_text(schema, STRICT, field)
    return Body("answer", f"answer: {header} %json {text}\n", ((field, text),))


def thinking(format: Format, opened: bool, thinks: bool, added: Mapping[str, int]) -> str:
    """The rules of the thinking before a body, which the prompt has opened or the model may open.

    It ends with its first closing delimiter, and at once where the request wants none, because a model may not end it
    by itself. In the Lark dialect a text never holds an added token: such tokens stand in a grammar by their ids.
    """
    if not format.think or not format.think_delimiters or not (opened or thinks):
        return 'thinking: ""\n'
    if not thinks:
        return f"thinking: {literal(format, format.think[1], added)}\n"
    close = format.think_delimiters[1]
    lead, _, tail = format.think[1].partition(close)
    text = f"({ANY} & ~({ANY} {quoted(close)} {ANY}))"
    if close in added:
        end = f"<[{added[close]}]> {literal(format, tail, added)}"
        rules = f"thoughts: THOUGHTS {end}\nTHOUGHTS: {text} & ({ANY} {quoted(lead)})\n"
    else:
        rules = f"thoughts[lazy]: THOUGHTS\nTHOUGHTS: {text} {quoted(format.think[1])}\n"
    return f"thinking: {'thoughts' if opened else f'({literal(format, format.think[0], added)} thoughts)?'}\n{rules}"


def tool_calls(format: Format, tools: Sequence[tuple[str, Tool]], parallel: bool, added: Mapping[str, int]) -> Body:
    """A call of one of the tools, or several in a row where `parallel`, as `format` writes them.

    Each tool comes with its field. The arguments are valid for its schema, except for keywords that llguidance does not
    know and, in tags, for keywords that span several parameters (anyOf and the like at the top, minProperties).
    """
    rules, schemas = [], []
    for i, (field, tool) in enumerate(tools):
        head, tail = frame(format, tool.name)
        if quoted(tool.name) not in head and not NAME.fullmatch(tool.name):
            raise InvalidRequest(f"{field}.name: expected no whitespace, brackets or quotes, got {tool.name!r:.80}")
        schema = tool_schema(tool.input_schema, f"{field}.input_schema")
        text = schema_text(schema, LENIENT, f"{field}.input_schema")
        arguments, more = f"%json {text}", ""
        if format.parameter:
            arguments, more = parameters(format, added, bounded(schema), f"value_{i}", f"{field}.input_schema")
        rules.append(f"call_{i}: {literal(format, head, added)} {arguments} {literal(format, tail, added)}\n{more}")
        schemas.append((f"{field}.input_schema", text))
    before, between, after = (literal(format, t, added) for t in (format.before, format.between, format.after))
    if format.between and format.after.startswith(format.between):
        # One text that begins as the other would be read greedily, which leaves no room for another call.
        after = f"{between} {literal(format, format.after.removeprefix(format.between), added)}"
    others = f"({between} call)*" if parallel and not format.ends_with_call else ""
    call = " | ".join(f"call_{i}" for i in range(len(tools)))
    return Body("calls", f"calls: {before} call {others} {after}\ncall: {call}\n" + "".join(rules), tuple(schemas))


def frame(format: Format, name: str) -> tuple[str, str]:
    """The texts that `format` writes before and after the arguments of a call."""
    assert format.call
    given = {PROBE: PROBE}
    arguments = tagged_arguments(given, format.parameter) if format.parameter else to_json(given)
    head, _, tail = format.call(ToolUseBlock(PROBE, name, given)).partition(arguments)
    return head, tail


def literal(format: Format, text: str, added: Mapping[str, int]) -> str:
    """A format's text in Lark: its delimiters as single tokens where the vocabulary has them, else spelled."""
    tokens = {mark: f"<[{added[mark]}]>" for mark in format.delimiters if mark in added}
    tokens[PROBE] = f"/{format.call_id}/"
    cut = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
    return " ".join(tokens.get(piece) or quoted(piece) for piece in re.split(f"({cut})", text) if piece) or '""'


def quoted(text: str) -> str:
    """A string in Lark and in JSON."""
    return json.dumps(text)


def parameters(
    format: Format, added: Mapping[str, int], schema: dict[str, Any], name: str, field: str
) -> tuple[str, str]:
    """Arguments in tags, in the schema's order: a Lark expression and its rules, named after `name`."""
    assert format.parameter
    opening = format.parameter[0]
    try:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        open = {key: None for key in required if key not in properties}
        if open and schema.get("additionalProperties") is False:
            raise Unenforceable(f"{field}.required: expected names of properties, got {next(iter(open))!r:.80}")
        written, rules, chars = [], [], 0
        for i, (key, value) in enumerate((properties | open).items()):
            if not key or not KEY.fullmatch(key) or value is False:
                if key in required:
                    raise Unenforceable(f"{field}: expected {key!r:.80} to be possible, as it is required")
                continue
            expression, rule = tagged_value(format, added, value, schema, f"{name}_{i}")
            parameter = f"{literal(format, opening.replace('{}', key), added)} {expression}"
            written.append(parameter if key in required else f"({parameter})?")
            rules.append(rule)
            # Each parameter brings all definitions that it refers to, so that few of them can make a long grammar.
            if (chars := chars + len(parameter) + len(rule)) > GRAMMAR_CHARS:
                raise InvalidRequest(f"{field}: expected parameters of at most {GRAMMAR_CHARS} characters, got {chars}")
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise Unenforceable(f"{field}: expected a JSON schema, got one that cannot be read: {error}") from None
    return " ".join(written), "".join(rules)


def tagged_value(
    format: Format, added: Mapping[str, int], schema: Any, root: dict[str, Any], name: str
) -> tuple[str, str]:
    """A value and its closing tag as a Lark expression and its rules: text, or JSON of the types that are not."""
    assert format.parameter
    closing = format.parameter[1]
    tag = closing.strip(SPACE)
    types = types_of(schema, root)
    options, rules = [], ""
    if others := sorted(types - {"string"}):
        defined = {key: root[key] for key in DEFINITIONS if key in root}
        text = json.dumps(defined | schema | {"type": others, "x-guidance": LENIENT})
        options.append(f"%json {text} {literal(format, closing, added)}")
    if "string" in types or not types:
        free = f"({ANY} & ~({ANY} {quoted(tag)} {ANY}))" + (f" & {NO_JSON}" if others else "")
        parts = list(alternatives(schema, root)) or [{}]
        texts = " | ".join(text for part in parts for text in texts_of(part, types)) or "/[^\\s\\S]/"
        options.append(name)
        rules = f"{name}[lazy]: {name.upper()}\n{name.upper()}: (({texts}) & {free}) {quoted(closing)}\n"
        if tag in added:  # which no text holds
            rules = f"{name}: {name.upper()} {literal(format, closing, added)}\n{name.upper()}: ({texts}) & {free}\n"
    return f"({' | '.join(options)})", rules


def texts_of(part: dict[str, Any], types: set[str]) -> list[str]:
    """The texts that one alternative of a schema allows, in Lark: those it lists, or by length and pattern.

    Return an empty list if this part has alternatives of its own. Texts that would be read as another of the schema's
    types are left out.
    """
    if (values := listed_values(part)) is not None:
        return [quoted(value) for value in values if isinstance(value, str) and typed(value, types) == value]
    if part.keys() & {"$ref", "anyOf", "oneOf", "allOf"} or "string" not in (own_types(part) or {"string"}):
        return []
    length = f"{part.get('minLength', 0)},{part.get('maxLength', '')}"
    text = ANY if length == "0," else f"/(?s:.{{{length}}})/"
    return [f"({text} & {searched(part['pattern'])})" if "pattern" in part else text]


def searched(pattern: str) -> str:
    """The texts in which a pattern is found, in Lark.

    Lark has no anchors: those at the pattern's ends are translated here. Where a pattern has both anchors and
    alternatives, any text is allowed.
    """
    first, last = pattern.startswith("^"), re.search(r"(?<!\\)(\\\\)*\$$", pattern) is not None
    body = pattern[first : len(pattern) - last]
    outside = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "", body[:1000])
    while (less := re.sub(r"\([^()]*\)", "", outside)) != outside:
        outside = less
    if (first or last) and ("|" in outside or len(body) > 1000):
        return ANY
    return f"/{'' if first else '(?s:.*)'}({regex_to_lark(body, 'dw')}){'' if last else '(?s:.*)'}/"
