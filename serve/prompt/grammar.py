"""Constrained decoding: what a request demands of its answer as a grammar, and which tokens the grammar allows next.

A grammar is Lark text with JSON schemas inside, in the dialect of llguidance, which compiles it and computes the masks:
https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md. What stands around a tool call comes from `formats`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import llguidance.hf
import numpy as np
import psutil
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark

from serve.api.messages import InvalidRequest, MessagesRequest, Tool, ToolUseBlock
from serve.formats.families import Format, to_json, xml_call
from serve.formats.readers import KEY, NAME
from serve.formats.schemas import (
    alternatives,
    bounded,
    listed_values,
    own_types,
    schema_text,
    tool_schema,
    typed,
    types_of,
)
from serve.limits.bounds import DEFAULT_BOUNDS
from serve.limits.recent import Recent
from serve.prompt.conversation import is_prefilled, wants_thinking

# JSON as chat templates and `formats` write it: no free whitespace, which a model may never stop writing.
STRICT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Whoever gave a tool checks its arguments anyway: what llguidance does not know of its schema is left out.
LENIENT = STRICT | {"lenient": True}
GRAMMAR_CHARS = 2**20  # of all schemas together
TEXT_BYTES = 100  # of memory that a character of a grammar takes, at least
REHEARSED = 4  # choices after which a schema that has no finite text, or too many choices, has shown it
REASON_CHARS = 300
PROBE = "Zq7Zq7Zq7"  # stands in a call for what varies; as long as the ids that Mistral's models write
ANY = "/(?s:.*)/"
XML_END = "\n</parameter>\n"
FREE = f'({ANY} & ~({ANY} "</parameter>" {ANY}))'
# Text that is not read as JSON: values of tags are, where their schema allows more than strings.
WORDS = "null|true|false|None|True|False|NaN|Infinity"
NO_JSON = rf'(/([^\s\[{{"0-9\-](?s:.*))?/ & ~/({WORDS})\s*/)'


class ConstraintError(Exception):
    """A constraint that cannot go on: its parser hit a limit, or was fed a token that it had not allowed."""


@dataclass(frozen=True)
class Grammar:
    """What an answer must be: Lark text, and each schema in it with the name of its field."""

    text: str
    schemas: tuple[tuple[str, str], ...]  # (field, JSON text)


@dataclass(frozen=True)
class Body:
    """What an answer may be behind its thinking: the name of a rule, the rules, and the schemas in them."""

    name: str
    rules: str
    schemas: tuple[tuple[str, str], ...]


def constraint_of(
    request: MessagesRequest, constrainer: Constrainer, format: Format, thinking_opened: bool
) -> Constraint | None:
    """The constraint of a request's answer, None if it demands nothing: see `grammar_of` and `Constrainer.start`."""
    grammar = grammar_of(request, format, thinking_opened, constrainer.marks)
    return constrainer.start(grammar) if grammar else None


def grammar_of(
    request: MessagesRequest, format: Format, thinking_opened: bool, marks: Mapping[str, int]
) -> Grammar | None:
    """What a request demands of its answer: calls, JSON or, where it allows both, either; None if it demands nothing.

    `thinking_opened` says that the prompt ends inside thinking; `marks` are the tokenizer's added tokens by their text.
    Raises InvalidRequest if the format knows no calls, the client has begun the answer, or a schema is none.
    """
    choice, config = request.tool_choice, request.output_config
    forced = choice is not None and choice.type in ("any", "tool")
    wanted = config.format if config else None
    if not forced and not wanted:
        return None
    field = "tool_choice" if forced else "output_config.format"
    if is_prefilled(request):
        raise InvalidRequest(f"messages: expected the user's message last together with {field}, got the assistant's")
    if forced and not format.call:
        raise InvalidRequest("tool_choice: expected 'auto' or 'none', as this model's chat template has no tool calls")
    named = choice.name if choice and choice.type == "tool" else None
    tools = [(f"tools[{i}]", tool) for i, tool in enumerate(request.tools or ()) if named in (None, tool.name)]
    bodies = [answer(wanted.schema)] if wanted and not forced else []
    if tools and format.call and (choice is None or choice.type != "none"):
        bodies.append(tool_calls(format, tools, not (choice and choice.disable_parallel_tool_use), marks))
    return assemble(bodies, thinking(format, thinking_opened, wants_thinking(request), marks))


def assemble(bodies: Sequence[Body], thinking: str) -> Grammar:
    """Thinking, then one of the bodies, then the end of the turn."""
    start = f"start: thinking ({' | '.join(body.name for body in bodies)})\n"
    schemas = tuple(schema for body in bodies for schema in body.schemas)
    return Grammar(start + thinking + "".join(body.rules for body in bodies), schemas)


def answer(schema: dict[str, Any]) -> Body:
    """One JSON value that is valid for the schema; a keyword that llguidance cannot enforce is an error."""
    field = "output_config.format.schema"
    text = schema_text(schema, STRICT, field)
    return Body("answer", f"answer: %json {text}\n", ((field, text),))


def thinking(format: Format, opened: bool, thinks: bool, marks: Mapping[str, int]) -> str:
    """The rules of what may come ahead of a body: thinking that the prompt has opened, or that the model may open.

    It ends with its first closing mark, and at once where the request wants none: a model may never end it by itself.
    Text never holds a token that is a mark, as such tokens must be asked for.
    """
    if not format.think or not format.think_marks or not (opened or thinks):
        return 'thinking: ""\n'
    if not thinks:
        return f"thinking: {literal(format, format.think[1], marks)}\n"
    close = format.think_marks[1]
    lead, _, tail = format.think[1].partition(close)
    text = f"({ANY} & ~({ANY} {quoted(close)} {ANY}))"
    if close in marks:
        rules = f"thoughts: THOUGHTS <[{marks[close]}]> {quoted(tail)}\nTHOUGHTS: {text} & ({ANY} {quoted(lead)})\n"
    else:
        rules = f"thoughts[lazy]: THOUGHTS\nTHOUGHTS: {text} {quoted(format.think[1])}\n"
    return f"thinking: {'thoughts' if opened else f'({literal(format, format.think[0], marks)} thoughts)?'}\n{rules}"


def tool_calls(format: Format, tools: Sequence[tuple[str, Tool]], parallel: bool, marks: Mapping[str, int]) -> Body:
    """A call of one of the tools, or several in a row where `parallel`, as `format` writes them.

    Each tool comes with its field. The arguments are valid for its schema, but for keywords that llguidance does not
    know, and in tags for what spans several parameters (anyOf and the like at the top, minProperties).
    """
    rules, schemas = [], []
    for i, (field, tool) in enumerate(tools):
        head, tail = frame(format, tool.name)
        if quoted(tool.name) not in head and not NAME.fullmatch(tool.name):
            raise InvalidRequest(f"{field}.name: expected no blanks, brackets or quotes, got {tool.name!r:.80}")
        schema = tool_schema(tool.input_schema, f"{field}.input_schema")
        text = schema_text(schema, LENIENT, f"{field}.input_schema")
        arguments, more = f"%json {text}", ""
        if format.call is xml_call:
            arguments, more = tagged_arguments(bounded(schema), f"value_{i}", f"{field}.input_schema")
        rules.append(f"call_{i}: {literal(format, head, marks)} {arguments} {literal(format, tail, marks)}\n{more}")
        schemas.append((f"{field}.input_schema", text))
    before, between, after = (literal(format, t, marks) for t in (format.before, format.between, format.after))
    others = f"({between} call)*" if parallel else ""
    call = " | ".join(f"call_{i}" for i in range(len(tools)))
    return Body("calls", f"calls: {before} call {others} {after}\ncall: {call}\n" + "".join(rules), tuple(schemas))


def frame(format: Format, name: str) -> tuple[str, str]:
    """What `format` writes ahead of the arguments of a call, and behind them."""
    assert format.call
    arguments = f"<parameter={PROBE}>\n{PROBE}{XML_END}" if format.call is xml_call else to_json({PROBE: PROBE})
    head, _, tail = format.call(ToolUseBlock(PROBE, name, {PROBE: PROBE})).partition(arguments)
    return head, tail


def literal(format: Format, text: str, marks: Mapping[str, int]) -> str:
    """A format's text in Lark: its marks as single tokens where the vocabulary has them, else spelled."""
    tokens = {mark: f"<[{marks[mark]}]>" for mark in format.marks if mark in marks} | {PROBE: "/[A-Za-z0-9]{9}/"}
    cut = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
    return " ".join(tokens.get(piece) or quoted(piece) for piece in re.split(f"({cut})", text) if piece) or '""'


def quoted(text: str) -> str:
    """A string in Lark and in JSON."""
    return json.dumps(text)


# Arguments in tags.


def tagged_arguments(schema: dict[str, Any], name: str, field: str) -> tuple[str, str]:
    """Qwen3-Coder's parameters in the schema's order: a Lark expression and its rules, which are named after `name`."""
    try:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        open = {key: None for key in required if key not in properties}
        if open and schema.get("additionalProperties") is False:
            raise InvalidRequest(f"{field}.required: expected names of properties, got {next(iter(open))!r:.80}")
        parameters, rules, chars = [], [], 0
        for i, (key, value) in enumerate((properties | open).items()):
            if not key or not KEY.fullmatch(key) or value is False:
                if key in required:
                    raise InvalidRequest(f"{field}: expected {key!r:.80} to be possible, as it is required")
                continue
            expression, rule = tagged_value(value, schema, f"{name}_{i}")
            parameter = f"{quoted(f'<parameter={key}>' + chr(10))} {expression}"
            parameters.append(parameter if key in required else f"({parameter})?")
            rules.append(rule)
            # Each parameter brings all that it refers to: few definitions can make much.
            if (chars := chars + len(parameter) + len(rule)) > GRAMMAR_CHARS:
                raise InvalidRequest(f"{field}: expected parameters of at most {GRAMMAR_CHARS} characters, got {chars}")
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InvalidRequest(f"{field}: expected a JSON schema, got one that cannot be read: {error}") from None
    return " ".join(parameters), "".join(rules)


def tagged_value(schema: Any, root: dict[str, Any], name: str) -> tuple[str, str]:
    """A value and its closing tag as a Lark expression and its rules: text, or JSON of the types that are not."""
    types = types_of(schema, root)
    options, rules = [], ""
    if others := sorted(types - {"string"}):
        defined = {key: root[key] for key in ("$defs", "definitions") if key in root}
        text = json.dumps(defined | schema | {"type": others, "x-guidance": LENIENT})
        options.append(f"%json {text} {quoted(XML_END)}")
    if "string" in types or not types:
        free = f"{FREE} & {NO_JSON}" if others else FREE
        parts = list(alternatives(schema, root)) or [{}]
        texts = " | ".join(text for part in parts for text in texts_of(part, types)) or "/[^\\s\\S]/"
        options.append(name)
        rules = f"{name}[lazy]: {name.upper()}\n{name.upper()}: (({texts}) & {free}) {quoted(XML_END)}\n"
    return f"({' | '.join(options)})", rules


def texts_of(part: dict[str, Any], types: set[str]) -> list[str]:
    """The texts that one alternative of a schema allows, in Lark: those it lists, or by length and pattern.

    None if it has alternatives itself. A text that is read as another of the schema's types is none.
    """
    if (values := listed_values(part)) is not None:
        return [quoted(value) for value in values if isinstance(value, str) and typed(value, types) == value]
    if part.keys() & {"$ref", "anyOf", "oneOf", "allOf"} or "string" not in (own_types(part) or {"string"}):
        return []
    length = f"{part.get('minLength', 0)},{part.get('maxLength', '')}"
    text = ANY if length == "0," else f"/(?s:.{{{length}}})/"
    return [f"({text} & {searched(part['pattern'])})" if "pattern" in part else text]


def searched(pattern: str) -> str:
    """The texts in which a pattern is found, in Lark, which has no anchors: those at the pattern's ends are read here.

    Anchors beside alternatives are left out with the pattern.
    """
    first, last = pattern.startswith("^"), re.search(r"(?<!\\)(\\\\)*\$$", pattern) is not None
    body = pattern[first : len(pattern) - last]
    outside = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "", body[:1000])
    while (less := re.sub(r"\([^()]*\)", "", outside)) != outside:
        outside = less
    if (first or last) and ("|" in outside or len(body) > 1000):
        return ANY
    return f"/{'' if first else '(?s:.*)'}({regex_to_lark(body, 'dw')}){'' if last else '(?s:.*)'}/"


# Masks.


@dataclass(frozen=True, eq=False)
class Compiled:
    """A grammar at its start."""

    matcher: LLMatcher
    bytes: int  # of memory, about: llguidance does not say


@dataclass(frozen=True)
class Constrainer:
    """What constrained decoding knows of a tokenizer; made once, as it reads the whole vocabulary."""

    marks: Mapping[str, int]  # added tokens by their text
    words: int  # of a mask: ceil(vocab / 32)
    compile: Callable[[str], LLMatcher]  # Lark text -> a fresh state; raises ConstraintError, remembers, any thread
    compiled: Recent[str, Compiled]

    def start(self, grammar: Grammar) -> Constraint:
        """The constraint of a new answer. Raises InvalidRequest, naming the field, for what does not compile.

        May take some seconds for the largest schemas: not to be called on the engine's thread.
        """
        if len(grammar.text) > GRAMMAR_CHARS:
            raise InvalidRequest(
                f"tools: expected at most {GRAMMAR_CHARS} characters of schemas, got {len(grammar.text)}"
            )
        # Each schema by itself first, so that the error names it.
        for field, text in (
            *((field, f"start: %json {schema}\n") for field, schema in grammar.schemas),
            ("tools", grammar.text),
        ):
            try:
                matcher = self.compile(text)
            except ConstraintError as error:
                raise InvalidRequest(f"{field}: {error}") from None
        return Constraint(matcher, self.words)


def make_constrainer(
    hf: Any, stop_ids: Collection[int], vocab: int, most_bytes: int = DEFAULT_BOUNDS.grammars
) -> Constrainer:
    """The Constrainer of a fast Hugging Face tokenizer and a model with `vocab` logits; it remembers grammars.

    Raises ValueError if there is no stop id or llguidance cannot read the tokenizer.
    """
    tokens = max(len(hf), vocab)
    stops = sorted(id for id in stop_ids if 0 <= id < tokens)
    if not stops:
        raise ValueError(f"stop ids: expected one below {tokens}, got {sorted(stop_ids)}")
    tokenizer = llguidance.hf.from_tokenizer(hf, n_vocab=tokens, eos_token=stops)
    compiled: Recent[str, Compiled] = Recent(most_bytes, lambda kept: kept.bytes)

    def compile(text: str) -> LLMatcher:
        if (kept := compiled.get(text)) is None:
            kept = sized(text, tokenizer)
            compiled.put(text, kept)
        return kept.matcher.deep_copy()

    marks = {str(token): id for id, token in hf.added_tokens_decoder.items()}
    return Constrainer(marks, -(-vocab // 32), compile, compiled)


def sized(text: str, tokenizer: LLTokenizer) -> Compiled:
    """A grammar at its start, and what it takes: what the process has grown by meanwhile, or by its length."""
    process = psutil.Process()
    before = process.memory_info().rss
    matcher = compile_grammar(text, tokenizer)
    return Compiled(matcher, max(process.memory_info().rss - before, TEXT_BYTES * len(text)))


def compile_grammar(text: str, tokenizer: LLTokenizer) -> LLMatcher:
    """A grammar at its start. Raises ConstraintError if it is none, or if its first tokens lead nowhere."""
    # Not verbose: its errors go to clients.
    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(text), log_level=0, limits=limits)
    trial = Constraint(matcher.deep_copy(), -(-tokenizer.vocab_size // 32))
    for _ in range(REHEARSED):
        allowed = np.flatnonzero(np.unpackbits(trial.mask().view(np.uint8), bitorder="little"))
        if trial.finished:
            break
        for token in trial.matcher.compute_ff_tokens() or [int(allowed[0])]:
            trial.accept(token)
    return matcher


class Constraint:
    """The state of one answer: which tokens may come next. It belongs to its sequence and outlives preemptions."""

    def __init__(self, matcher: LLMatcher, words: int) -> None:
        self.matcher = matcher
        self.words = words

    def mask(self) -> np.ndarray:
        """The tokens that may come next, [words] uint32 as `pack_masks` wants it; stop ids where the answer may end.

        Asking twice changes nothing. Raises ConstraintError when the grammar is too complex to go on.
        """
        mask = np.frombuffer(self.matcher.compute_bitmask(), np.uint32)[: self.words]
        # A matcher that failed allows the end of the turn, which would pass for a complete answer.
        if self.matcher.is_error():
            raise ConstraintError(reason(self.matcher))
        return mask

    def accept(self, token: int) -> None:
        """Take the token that was sampled. Raises ConstraintError if it was not allowed."""
        if not self.matcher.consume_token(token):
            raise ConstraintError(reason(self.matcher))

    @property
    def finished(self) -> bool:
        """Whether the answer is complete: nothing but a stop id may follow, or one has come."""
        return self.matcher.is_stopped()


def reason(matcher: LLMatcher) -> str:
    """What llguidance has against a grammar or a token, without the excerpt of the grammar that follows it."""
    text = matcher.get_error().partition("\n   1 |")[0].removesuffix("<non-verbose/>")
    text = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", text)
    return " ".join(text.split())[:REASON_CHARS] or "no text obeys the schema"
