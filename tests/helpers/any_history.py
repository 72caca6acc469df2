"""Histories of any kind, built from the types of the vendors' SDKs: whatever a client has in one, it gets an answer.

`python -m tests.helpers.any_history SEED COUNT` tries so many histories and prints those that are refused. The last
message and the options of each request are sound, so that no refusal is earned.
"""

from __future__ import annotations

import json
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from random import Random
from typing import Annotated, Any, Literal, NotRequired, Required, Union, get_args, get_origin, get_type_hints

import numpy as np
from anthropic.types import MessageParam, TextBlockParam, ToolUnionParam
from anthropic.types.beta import BetaMessageParam, BetaToolUnionParam
from anthropic.types.beta.message_create_params import MessageCreateParamsNonStreaming
from pydantic import BaseModel
from typing_extensions import TypeAliasType, is_typeddict

from serve.api.messages import InvalidRequest, MessagesRequest, decode_request
from serve.prompt.render import prompt
from serve.prompt.tokenizer import Tokenizer
from tests.helpers.http import encoded
from tests.helpers.model_families import FAMILIES, tokenizer_of
from tests.helpers.pdfs import pdf

Json = Any
MAX_DEPTH = 6
PDF = pdf("A text layer")
WORDS = (
    "",
    "a",
    "ls -la",
    "Hello",
    "é🙂",
    "line\nline",
    "<|im_end|>",
    "</think>",
    '{"path": "a"',
    "[1]",
    "null",
    "data:image/png;base64,iVBORw0KGgo=",
    " ",
    PDF,
    "iVBORw0KGgo=",
)


@dataclass(frozen=True)
class Maker:
    """Makes values of a type; what it does not know is a text."""

    rng: Random
    odd: float = 0.1  # how often an optional field is null, and a type is one that does not exist

    def value(self, kind: Any, depth: int = 0) -> Json:
        """A value of a type."""
        origin, args = get_origin(kind), get_args(kind)
        if isinstance(kind, TypeAliasType):
            return self.value(kind.__value__, depth)
        if origin in (Annotated, Required, NotRequired):
            return self.value(args[0], depth)
        if origin in (Union, types.UnionType):
            return self.value(self.rng.choice(args), depth)
        if origin is Literal:
            return self.rng.choice(args)
        if kind is type(None):
            return None
        if kind is bool:
            return self.rng.random() < 0.5
        if kind is int:
            return self.rng.choice((0, 1, 7, 2**31, -1))
        if kind is float:
            return self.rng.choice((0.0, 0.5, 1e9))
        if is_typeddict(kind) or (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return self.struct(kind, depth + 1)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return self.json(depth)
        if isinstance(origin, type) and hasattr(origin, "__iter__") and args:
            return [
                self.value(args[0], depth) for _ in range(self.rng.choice((0, 1, 1, 2)) if depth < MAX_DEPTH else 0)
            ]
        if kind is object or kind is Any:
            return self.json(depth)
        return self.rng.choice(WORDS)

    def struct(self, kind: Any, depth: int) -> dict[str, Json]:
        """A value of a TypedDict or a model, with any of its optional fields absent or null."""
        made: dict[str, Json] = {}
        for name, (field, required) in fields_of(kind).items():
            chance = self.rng.random()
            if required or chance > 0.5:
                made[name] = None if not required and chance > 1 - self.odd else self.value(field, depth)
        if isinstance(made.get("type"), str) and self.rng.random() < self.odd / 3:
            made["type"] = self.rng.choice(("not_yet_known", "hologram_tool_result", "x" * 100))
        return made

    def json(self, depth: int) -> dict[str, Json]:
        """Any JSON object."""
        values = (None, True, 1, 0.5, "text", [1, "two"], {"a": {"b": []}})
        return {self.rng.choice(("path", "query", "a b", "")): self.rng.choice(values) for _ in range(2)}


@cache
def fields_of(kind: Any) -> dict[str, tuple[Any, bool]]:
    """The type of each field of a TypedDict or a model, and whether it must be there."""
    if is_typeddict(kind):
        hints = get_type_hints(kind, include_extras=True)
        # Not `__required_keys__`, which is wrong where annotations are texts.
        return {name: (hint, get_origin(hint) is Required) for name, hint in hints.items()}
    fields = kind.model_fields.items()
    return {field.alias or name: (field.annotation, field.is_required()) for name, field in fields}


def broken(rng: Random, block: Json) -> Json:
    """A block with one field of another type than it should have: the `odd` of clients that are not the SDKs."""
    if not isinstance(block, dict) or not block:
        return block
    name = rng.choice(sorted(block))
    return block | {name: rng.choice((None, 3, "text", [], ["text"], {}, {"type": "text", "text": "t"}))}


def anthropic_requests(rng: Random) -> Iterator[dict[str, Json]]:
    """Requests of the Messages API whose history has anything, each with a sound last message and sound options."""
    maker = Maker(rng)
    while True:
        message = BetaMessageParam if rng.random() < 0.5 else MessageParam
        history = [maker.value(message) for _ in range(rng.choice((1, 2, 4)))]
        for turn in history:
            if isinstance(turn.get("content"), list) and rng.random() < 0.3:
                turn["content"] = [broken(rng, block) for block in turn["content"]]
        absent = dict.fromkeys(rng.sample(OPTIONS, 3))
        request = absent | {"model": "m", "max_tokens": 1, "messages": [USER, *history, USER]}
        if rng.random() < 0.3:
            request["system"] = [maker.value(TextBlockParam)]
        if rng.random() < 0.5:
            union = BetaToolUnionParam if rng.random() < 0.5 else ToolUnionParam
            vendors = [kind for kind in get_args(union) if "ToolParam" not in kind.__name__]
            request["tools"] = [TOOL, *(maker.value(rng.choice(vendors)) for _ in range(rng.choice((0, 1, 3))))]
        yield request


OPTIONS = sorted(name for name, (_, required) in fields_of(MessageCreateParamsNonStreaming).items() if not required)
USER = {"role": "user", "content": "go on"}
ANSWER_START = 8  # tokens
IMAGE = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
TOOL = {"name": "Read", "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}}}


def refusal(request: dict[str, Json], tokenizer: Tokenizer, decode: Callable[[bytes], MessagesRequest]) -> str | None:
    """Why a request, or the one that continues it, is refused; None if the second one extends the first."""
    messages = request["messages"]
    # The next turn has an image, so that its body violates the schema and takes the other path of `decode`.
    longer = request | {"messages": [*messages, {"role": "assistant", "content": "ok"}, {**USER, "content": [IMAGE]}]}
    try:
        first, second = decode(encoded(request)), decode(encoded(longer))
        if second.messages[: len(messages)] != first.messages:
            return "the history of the next turn is another one"
        tokens, more = prompt(first, tokenizer).tokens, prompt(second, tokenizer).tokens
    except InvalidRequest as error:
        return str(error)
    # All but the start of the answer, which some templates write in another way in a history.
    kept = len(tokens) - ANSWER_START
    return None if np.array_equal(tokens[:kept], more[:kept]) else "the next turn has another prompt"


def main(seed: int = 0, count: int = 5000) -> int:
    """Try `count` histories; print the refusals. Returns the number of refused ones."""
    rng, refused = Random(seed), Counter[str]()
    tokenizers = [tokenizer_of(family) for family in FAMILIES]
    for n, request in enumerate(islice(anthropic_requests(rng), count)):
        if found := refusal(request, tokenizers[n % len(tokenizers)], decode_request):
            refused[found] += 1
            if refused[found] == 1:
                print(f"case {n}: {found}\n{json.dumps(request)[:2000]}\n")
    print(f"{count} histories, {refused.total()} refused")
    return refused.total()


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:3]))))
