"""JSON schemas as clients write them: the types that a schema names, values of these types, and a schema's limits.

Schemas come from clients and may be malformed: only `schema_text` refuses them, the other functions ignore what they
cannot read. Keywords: https://json-schema.org/draft/2020-12/json-schema-validation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from decimal import Decimal
from math import lcm
from typing import Any

from serve.api.messages import InvalidRequest
from serve.formats.lenient import decode_json, decode_lenient

KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null", list: "array"}
PYTHON = {"True": "true", "False": "false", "None": "null"}  # as templates print them, and models that imitate them
# The keywords whose value is a schema, a list of schemas, or a mapping of names to schemas.
SCHEMA_KEYS, LIST_KEYS = ("items", "additionalProperties"), ("anyOf", "oneOf", "allOf", "prefixItems")
DEFINITIONS = ("$defs", "definitions")
MAPPING_KEYS = ("properties", "patternProperties", *DEFINITIONS)
SCHEMA_CHARS = 2**18
# Bounds for numbers without one, within 64 bits and a double, so that clients can read every number.
MAX_INTEGER, MAX_NUMBER = 2**63 - 1024, 10**15
# Of multipleOf. llguidance has a state for each remainder: 4,999 work in every form that was tried, some numbers of
# 9,973 fail in the middle of an answer.
MAX_MULTIPLE = 5000


class Unenforceable(InvalidRequest):
    """A schema that no grammar can be made of, though it may be used for all else."""


def typed(text: str, types: set[str]) -> Any:
    """Text as a JSON value, if it is one of the types that its schema names; otherwise the text itself.

    Where a text cannot be meant, an object or array may have the faults of `lenient`, such as Python's literals.
    """
    decode = decode_lenient if "string" not in types and types & {"object", "array"} else decode_json
    try:
        value: Any = decode(PYTHON.get(text, text)) if types - {"string"} else text
    except ValueError:
        return text
    kind = kind_of(value)
    if kind == "number" and "number" not in types and value.is_integer():
        value, kind = int(value), "integer"  # in JSON Schema 1.0 is an integer
    fits = kind in types or (kind == "integer" and "number" in types)
    return value if fits and kind != "string" else text


def kind_of(value: object) -> str:
    """The name of a value's JSON type."""
    return KINDS.get(type(value), "object")


def value_types(schema: object, root: Mapping[str, Any]) -> set[str]:
    """The JSON types that a written value may have. A schema that names none allows objects, arrays and text."""
    return types_of(schema, root) or ({"string", "object", "array"} if isinstance(schema, dict) else set())


def types_of(schema: object, root: Mapping[str, Any]) -> set[str]:
    """The JSON types that a schema or its alternatives name; empty if they name none."""
    return {kind for part in alternatives(schema, root) for kind in own_types(part)}


def own_types(schema: Mapping[str, Any]) -> set[str]:
    """The JSON types that a schema names, without its alternatives. If it lists its values, their types."""
    if (values := listed_values(schema)) is not None:
        return {kind_of(value) for value in values}
    types = schema.get("type")
    return {kind for kind in (types if isinstance(types, list) else [types]) if isinstance(kind, str)}


def listed_values(schema: Mapping[str, Any]) -> list[Any] | None:
    """The values that a schema lists (enum or const), or None."""
    if isinstance(values := schema.get("enum"), list):
        return values
    return [schema["const"]] if "const" in schema else None


def alternatives(schema: object, root: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema, its alternatives, and the schemas that they refer to, without those of schemas that list their values.

    Each reference is followed once, as alternatives may refer to each other.
    """
    parts, followed = [schema], set()
    for part in parts:  # the loop appends to it
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
    """A list as it is; an empty list for other values."""
    return value if isinstance(value, list) else []


def resolve(root: Mapping[str, Any], reference: str) -> object:
    """The part of a schema at a path such as `#/$defs/Point`; None if it is missing or in another document."""
    document, *path = reference.split("/")
    part: object = None if document != "#" else root
    for key in path:
        part = member(part, key)
    return part


def member(value: object, key: str) -> Any:
    """A member of a JSON object; None if it is missing or the value is not an object."""
    return value.get(key) if isinstance(value, dict) else None


def properties_of(schema: object) -> dict[str, Any]:
    """The properties of a schema; none if it has no object of them."""
    properties = member(schema, "properties")
    return properties if isinstance(properties, dict) else {}


def tool_schema(schema: dict[str, Any], field: str) -> dict[str, Any]:
    """The schema of a tool's arguments, with `type: object` if it names no type. Raises Unenforceable for another."""
    if schema.get("type", "object") != "object":
        raise Unenforceable(f"{field}.type: expected 'object', got {schema['type']!r:.80}")
    return schema | {"type": "object"}


def schema_text(schema: dict[str, Any], options: Mapping[str, Any], field: str) -> str:
    """A schema as JSON for llguidance, with its options. Raises InvalidRequest if it is too large or cannot be read."""
    try:
        text = json.dumps(bounded(schema) | {"x-guidance": options}, allow_nan=False)
        multiple = lcm(*multiples(schema))
    # Nested too deeply, or of types that a schema does not have.
    except (RecursionError, ValueError, TypeError, ArithmeticError) as error:
        raise InvalidRequest(f"{field}: expected a JSON schema, got one that cannot be read: {error}") from None
    if len(text) > SCHEMA_CHARS:
        raise InvalidRequest(f"{field}: expected at most {SCHEMA_CHARS} characters, got {len(text)}")
    if multiple > MAX_MULTIPLE:
        raise InvalidRequest(
            f"{field}: expected multipleOf with a common multiple of at most {MAX_MULTIPLE}, got {multiple}: leave it "
            "out, and check the answer"
        )
    return text


def bounded(schema: Any) -> Any:
    """The schema, with bounds for the numbers that have none."""
    if not isinstance(schema, dict):
        return schema
    result = dict(schema)
    for key, inner in schema.items():
        if key in SCHEMA_KEYS:
            result[key] = bounded(inner)
        elif key in LIST_KEYS and isinstance(inner, list):
            result[key] = [bounded(part) for part in inner]
        elif key in MAPPING_KEYS and isinstance(inner, dict):
            result[key] = {name: bounded(part) for name, part in inner.items()}
    types = {kind for kind in listed(schema.get("type")) or [schema.get("type")] if isinstance(kind, str)}
    if types & {"integer", "number"}:
        limit = MAX_NUMBER if "number" in types else MAX_INTEGER
        low, high = numbers(schema, "minimum", "exclusiveMinimum"), numbers(schema, "maximum", "exclusiveMaximum")
        if not low and all(bound > -limit for bound in high):
            result["minimum"] = -limit
        if not high and all(bound < limit for bound in low):
            result["maximum"] = limit
    return result


def numbers(schema: dict[str, Any], *keys: str) -> list[float]:
    """The values of these keys that are numbers."""
    values = [schema.get(key) for key in keys]
    return [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]


def multiples(schema: Any) -> list[int]:
    """Each multipleOf in a schema, as an integer: its digits without the decimal point."""
    if isinstance(schema, list):
        return [multiple for part in schema for multiple in multiples(part)]
    if not isinstance(schema, dict):
        return []
    own = [Decimal(str(value)) for value in numbers(schema, "multipleOf") if value > 0]
    whole = [int(value.scaleb(max(0, -int(value.as_tuple().exponent)))) for value in own]
    return whole + multiples(list(schema.values()))
