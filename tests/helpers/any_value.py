"""JSON values of any type that an SDK defines: its typed dictionaries, and the unions, lists and literals in them."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from functools import cache
from random import Random
from typing import Annotated, Any, Literal, Required, Union, get_args, get_origin

from typing_extensions import TypeAliasType, get_type_hints, is_typeddict

WORDS = ["", "a", "Hi 😀\n", "null", "{}", "[1]", '{"path": "a', "data:image/png;base64,iVBORw0KGgo=", "<tool_call>"]
NUMBERS = [0, 1, -1, 2**40]
MAX_DEPTH = 6  # below it optional fields are left out and lists are empty


def any_value(kind: Any, random: Random, depth: int = 0) -> Any:
    """A JSON value of a type: required fields always, others by chance, null where it is allowed."""
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, TypeAliasType):
        return any_value(kind.__value__, random, depth)
    if origin in (Annotated, Required):
        return any_value(arguments[0], random, depth)
    if origin is Literal:
        return random.choice(arguments)
    if origin in (Union, types.UnionType):
        return any_value(random.choice(arguments), random, depth)
    if is_typeddict(kind):
        return any_fields(kind, random, depth)
    if kind is str:
        return random.choice(WORDS)
    if kind in (int, float):
        return random.choice(NUMBERS)
    if kind is bool:
        return random.random() < 0.5
    if kind is type(None):
        return None
    if arguments and isinstance(origin, type) and issubclass(origin, Mapping):
        return {word: any_value(arguments[1], random, depth + 1) for word in some(["a", "b"], random, depth)}
    if arguments and (origin is list or issubclass_of_iterable(origin)):
        return [any_value(arguments[0], random, depth + 1) for _ in some(range(3), random, depth)]
    return random.choice([None, "a", 1, {"type": "object"}, ["a"]])  # `object`, and protocols of files


def issubclass_of_iterable(origin: Any) -> bool:
    """Whether a generic type is a list in JSON."""
    return isinstance(origin, type) and (issubclass(origin, Iterable) or "Sequence" in origin.__name__)


def any_fields(kind: Any, random: Random, depth: int) -> dict[str, Any]:
    """A typed dictionary."""
    hints = hints_of(kind)
    chance = 0.4 if depth < MAX_DEPTH else 0.0
    names = [name for name, hint in hints.items() if get_origin(hint) is Required or random.random() < chance]
    return {name: any_value(hints[name], random, depth + 1) for name in names}


@cache
def hints_of(kind: Any) -> dict[str, Any]:
    """The fields of a typed dictionary with their types."""
    return get_type_hints(kind, include_extras=True)


def some(values: Iterable[Any], random: Random, depth: int) -> list[Any]:
    """Some of the values; none below the greatest depth."""
    return [value for value in values if depth < MAX_DEPTH and random.random() < 0.5]
