"""JSON as models write it, and JSON schemas as clients write them: what a schema says of a value, and its limits.

Schemas are the client's, and may look little like one: `schema_text` tells, nothing that reads values stumbles.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from decimal import Decimal
from math import lcm
from typing import Any

import msgspec

from serve.api.messages import InvalidRequest

KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null", list: "array"}
PYTHON = {"True": "true", "False": "false", "None": "null"}  # as templates print them, and models after them
# The keywords that hold a schema, a list of them, and a mapping to them.
ONE, MANY = ("items", "additionalProperties"), ("anyOf", "oneOf", "allOf", "prefixItems")
NAMED = ("properties", "patternProperties", "$defs", "definitions")
SCHEMA_CHARS = 2**18
# Where a schema sets no bound: what 64 bits and a double hold, so that no number overflows where it is read.
INTEGERS, NUMBERS = 2**63 - 1024, 10**15
MULTIPLES = 100_000  # states that llguidance may spend on multipleOf


def decode_json(text: str) -> Any:
    """JSON as models write it, line breaks in strings included.

    Raises ValueError for what is none, and for what the wire cannot carry: infinity, NaN, halves of surrogate pairs,
    endless nesting.
    """
    try:
        value = json.loads(text, strict=False)
        carried = msgspec.json.decode(msgspec.json.encode(value)) == value  # infinity and NaN become null
    except (OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None
    if not carried:
        raise ValueError("infinity and NaN are not JSON")
    return value


def typed(text: str, types: set[str]) -> Any:
    """Text as the JSON value of one of the types that its schema names; else as it is."""
    try:
        value: Any = decode_json(PYTHON.get(text, text)) if types - {"string"} else text
    except ValueError:
        return text
    kind = kind_of(value)
    if kind == "number" and "number" not in types and value.is_integer():
        value, kind = int(value), "integer"  # 1.0 is an integer in JSON schema
    fits = kind in types or (kind == "integer" and "number" in types)
    return value if fits and kind != "string" else text


def kind_of(value: object) -> str:
    """The name of a value's JSON type."""
    return KINDS.get(type(value), "object")


def types_of(schema: object, root: Mapping[str, Any]) -> set[str]:
    """The JSON types that a schema names, in itself or its alternatives; empty if it names none."""
    return {kind for part in alternatives(schema, root) for kind in own_types(part)}


def own_types(schema: Mapping[str, Any]) -> set[str]:
    """The JSON types that a schema names in itself; those of its values where it lists them."""
    if (values := listed_values(schema)) is not None:
        return {kind_of(value) for value in values}
    types = schema.get("type")
    return {kind for kind in (types if isinstance(types, list) else [types]) if isinstance(kind, str)}


def listed_values(schema: Mapping[str, Any]) -> list[Any] | None:
    """The values that a schema lists, if it does."""
    if isinstance(values := schema.get("enum"), list):
        return values
    return [schema["const"]] if "const" in schema else None


def alternatives(schema: object, root: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema, its alternatives and what they refer to, one by one; a schema that lists its values ends there.

    A reference is followed once: alternatives may refer to each other.
    """
    parts, followed = [schema], set()
    for part in parts:  # grows as it goes
        if not isinstance(part, dict):
            continue
        yield part
        if listed_values(part) is not None:
            continue
        parts += [inner for key in ("anyOf", "oneOf", "allOf") for inner in listed(part.get(key))]
        reference = part.get("$ref")
        if isinstance(reference, str) and reference not in followed:
            followed.add(reference)
            parts.append(resolve(root, reference))


def listed(value: object) -> list[Any]:
    """A list as it is; nothing for anything else."""
    return value if isinstance(value, list) else []


def resolve(root: Mapping[str, Any], reference: str) -> object:
    """The part of a schema at a path such as `#/$defs/Point`; None if it is not there, or in another document."""
    document, *path = reference.split("/")
    part: object = None if document != "#" else root
    for key in path:
        part = member(part, key)
    return part


def member(value: object, key: str) -> Any:
    """A member of a JSON object; None if it is not there, or the value no object."""
    return value.get(key) if isinstance(value, dict) else None


def tool_schema(schema: dict[str, Any], field: str) -> dict[str, Any]:
    """The schema of a tool's arguments, which are an object even where it does not say so."""
    if schema.get("type", "object") != "object":
        raise InvalidRequest(f"{field}.type: expected 'object', got {schema['type']!r:.80}")
    return schema | {"type": "object"}


def schema_text(schema: dict[str, Any], options: Mapping[str, Any], field: str) -> str:
    """A schema as llguidance takes it, its options included. Raises InvalidRequest for one that is too large."""
    try:
        text = json.dumps(bounded(schema) | {"x-guidance": options}, allow_nan=False)
        many = lcm(*multiples(schema))
    # Nested too deeply, or shaped so little like a schema that it cannot be walked through.
    except (RecursionError, ValueError, TypeError, ArithmeticError) as error:
        raise InvalidRequest(f"{field}: expected a JSON schema, got one that cannot be read: {error}") from None
    if len(text) > SCHEMA_CHARS:
        raise InvalidRequest(f"{field}: expected at most {SCHEMA_CHARS} characters, got {len(text)}")
    if many > MULTIPLES:
        raise InvalidRequest(f"{field}: expected multipleOf with a common multiple of at most {MULTIPLES}, got {many}")
    return text


def bounded(schema: Any) -> Any:
    """The schema with bounds for the numbers that have none."""
    if not isinstance(schema, dict):
        return schema
    result = dict(schema)
    for key, inner in schema.items():
        if key in ONE:
            result[key] = bounded(inner)
        elif key in MANY and isinstance(inner, list):
            result[key] = [bounded(part) for part in inner]
        elif key in NAMED and isinstance(inner, dict):
            result[key] = {name: bounded(part) for name, part in inner.items()}
    types = schema.get("type")
    types = set(types if isinstance(types, list) else [types])
    if types & {"integer", "number"}:
        limit = NUMBERS if "number" in types else INTEGERS
        low, high = numbers(schema, "minimum", "exclusiveMinimum"), numbers(schema, "maximum", "exclusiveMaximum")
        if not low and all(bound > -limit for bound in high):
            result["minimum"] = -limit
        if not high and all(bound < limit for bound in low):
            result["maximum"] = limit
    return result


def numbers(schema: dict[str, Any], *keys: str) -> list[float]:
    """The numbers under these keys."""
    values = [schema.get(key) for key in keys]
    return [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]


def multiples(schema: Any) -> list[int]:
    """Every multipleOf in a schema as the whole number that it is without its decimal point."""
    if isinstance(schema, list):
        return [found for part in schema for found in multiples(part)]
    if not isinstance(schema, dict):
        return []
    own = [Decimal(str(value)) for value in numbers(schema, "multipleOf") if value > 0]
    whole = [int(value.scaleb(max(0, -int(value.as_tuple().exponent)))) for value in own]
    return whole + multiples(list(schema.values()))
