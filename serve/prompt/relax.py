"""Schemas without what a grammar cannot enforce: the innermost keywords that keep them from compiling are left out.

Clients generate schemas for validators, which know more than llguidance: look-ahead in patterns, references to other
documents, types that JSON does not have. What is left of such a schema is still enforced.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from serve.formats.schemas import DEFINITIONS, LIST_KEYS, MAPPING_KEYS, SCHEMA_KEYS, member

Schema = dict[str, Any]
Path = tuple[str, ...]  # of keys and list indices

MOST_NODES = 2**16  # schemas within a schema, its definitions written out
MOST_ATTEMPTS, MOST_SECONDS = 1000, 5.0  # to compile, for all schemas of a request
# Keywords that llguidance leaves out by itself, and the formats that it enforces.
UNENFORCED = (
    *("not", "if", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames", "dependencies"),
    *("dependentRequired", "dependentSchemas", "unevaluatedProperties", "unevaluatedItems", "$dynamicRef"),
)
FORMATS = ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "unknown", "uri", "uuid")
# What a schema is about is left out last, in this order.
STRUCTURE = (
    *("patternProperties", "additionalProperties", "required", "enum", "const", "$ref", "allOf", "anyOf", "oneOf"),
    *("prefixItems", "items", "properties", "type"),
)
# Without the first, the others would allow less than before.
TOGETHER = {
    "properties": ("patternProperties", "additionalProperties"),
    "patternProperties": ("additionalProperties",),
    "prefixItems": ("items",),
}
# These constrain nothing.
ANNOTATIONS = (*DEFINITIONS, "$comment", "title", "description", "default", "examples", "deprecated", "readOnly")
IDENTIFIERS = ("$schema", "$id", "$anchor")
LABELS = frozenset(("pattern", "format", "minimum", "maximum", *UNENFORCED, *STRUCTURE))


@dataclass(frozen=True)
class Relaxed:
    """A schema that compiles, and the JSON pointers of the keywords that it is enforced without."""

    schema: Schema | None  # None: the schema as it was given
    dropped: tuple[str, ...]


@dataclass
class Budget:
    """How often, and until when, one request may still try to compile a part of its schemas; for one thread."""

    attempts: int = MOST_ATTEMPTS
    until: float = field(default_factory=lambda: time.thread_time() + MOST_SECONDS)  # seconds of that clock

    @property
    def spent(self) -> bool:
        """Whether nothing may be tried any more."""
        return self.attempts < 1 or time.thread_time() > self.until


def relax(schema: Schema, compiles: Callable[[Schema, bool], bool], empty: Schema, budget: Budget) -> Relaxed:
    """A schema that does not compile, without the innermost keywords that it fails for; `empty` if time runs out.

    `compiles` is asked about the whole schema (True) and about schemas within it (False), each of which comes with the
    definitions that it refers to.
    """
    try:
        found = localized(schema)
        search = Search(found.definitions, found.origins, list(found.dropped), compiles, budget)
        result = search.relaxed(found.schema, (), True)
        if search.compiles(result, True):
            return Relaxed(search.document(result), tuple(dict.fromkeys(search.dropped)))
    except (RecursionError, TooManyNodes):
        pass
    return Relaxed(empty, (pointer(),))


class TooManyNodes(Exception):
    """The definitions of a schema contain each other so often that it is not worth to search it."""


@dataclass(frozen=True)
class Localized:
    """A schema whose references all lead to `definitions`, which have the paths `origins` in the schema as given."""

    schema: Any
    definitions: dict[str, Any]
    origins: dict[str, Path]
    dropped: tuple[str, ...]  # pointers of references that lead nowhere


def localized(root: Schema) -> Localized:
    """The schema with what it refers to as definitions, so that each schema within it can stand alone.

    Raises TooManyNodes, RecursionError.
    """
    names: dict[Path, str] = {}
    definitions: dict[str, Any] = {}
    dropped: list[str] = []
    anchors = dict(anchored(root, ()))
    nodes = 0

    def visit(schema: Any, path: Path) -> Any:
        nonlocal nodes
        if (nodes := nodes + 1) > MOST_NODES:
            raise TooManyNodes
        if not isinstance(schema, dict):
            return schema
        own = {key: value for key, value in schema.items() if key not in (*IDENTIFIERS, *DEFINITIONS)}
        own = mapped(own, lambda where, inner: visit(inner, path + where))
        if "$ref" not in own:
            return own
        target = resolved(root, own.pop("$ref"), anchors)
        if target is None:
            dropped.append(pointer(*path, "$ref"))
            return own
        if target not in names:
            names[target] = f"d{len(names)}"
            definitions[names[target]] = visit(at(root, target), target)
        return own | {"$ref": f"#/$defs/{names[target]}"}

    schema = visit(root, ())
    return Localized(schema, definitions, {name: path for path, name in names.items()}, tuple(dropped))


def resolved(root: Schema, reference: object, anchors: Mapping[str, Path]) -> Path | None:
    """The path of the schema that a reference leads to; None if there is none in this document."""
    document, _, fragment = reference.partition("#") if isinstance(reference, str) else ("?", "", "")
    if document and document != root.get("$id"):
        return None
    if fragment and not fragment.startswith("/"):
        return anchors.get(fragment)
    keys = [unquote(key).replace("~1", "/").replace("~0", "~") for key in fragment.split("/")[1:]]
    return tuple(keys) if isinstance(at(root, tuple(keys)), dict | bool) else None


def anchored(schema: Any, path: Path) -> Iterator[tuple[str, Path]]:
    """The anchors within a schema, and the paths of what they name."""
    if not isinstance(schema, dict):
        return
    if isinstance(name := schema.get("$anchor"), str):
        yield name, path
    if isinstance(name := schema.get("$id"), str) and name.startswith("#"):
        yield name[1:], path
    for where, inner in children(schema):
        yield from anchored(inner, path + where)


def at(value: Any, path: Path) -> Any:
    """What is at a path of a JSON value; None if it is missing."""
    for key in path:
        if isinstance(value, list):
            value = next((part for i, part in enumerate(value) if str(i) == key), None)
        else:
            value = member(value, key)
    return value


@dataclass
class Search:
    """The search for the keywords that keep a schema from compiling."""

    definitions: dict[str, Any]  # relaxed as the search comes to them
    origins: dict[str, Path]
    dropped: list[str]
    ask: Callable[[Schema, bool], bool]
    budget: Budget

    def document(self, schema: Schema) -> Schema:
        """A schema with all definitions."""
        return {"$defs": self.definitions} | schema if self.definitions else schema

    def compiles(self, schema: Schema, whole: bool) -> bool:
        """Whether a schema compiles; False when the budget is spent."""
        if self.budget.spent:
            return False
        self.budget.attempts -= 1
        return self.ask(self.document(schema), whole)

    def relaxed(self, schema: Any, path: Path, whole: bool = False, name: str | None = None) -> Any:
        """The schema as it is if it compiles, or else without what keeps it from that; `name` if it is a definition."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            self.dropped.append(pointer(*path))
            return {}
        if self.budget.spent or self.compiles(schema, whole):
            return schema
        if name:
            self.definitions[name] = {}  # what refers to it from within is judged by what else it has
        before = len(self.dropped)
        if (reference := str(schema.get("$ref", "")).removeprefix("#/$defs/")) in self.definitions:
            self.definitions[reference] = self.relaxed(
                self.definitions[reference], self.origins[reference], name=reference
            )
        inner = mapped(schema, lambda where, inner: self.relaxed(inner, path + where))
        if len(self.dropped) > before and self.fits(inner, whole, name):
            return inner
        return self.without_keywords(inner, path, whole, name)

    def fits(self, schema: Schema, whole: bool, name: str | None) -> bool:
        """Whether a schema compiles in place of the definition `name`, if it is one."""
        if name:
            self.definitions[name] = schema
        return self.compiles(schema, whole)

    def without_keywords(self, schema: Schema, path: Path, whole: bool, name: str | None) -> Schema:
        """The schema without one keyword of its own, or without as many as it takes."""
        keys = sorted((key for key in schema if key not in ANNOTATIONS), key=rank)
        if "oneOf" in schema and "anyOf" not in schema:
            less = {"anyOf" if key == "oneOf" else key: value for key, value in schema.items()}
            if self.fits(less, whole, name):
                self.dropped.append(pointer(*path, "oneOf"))
                return less
        for key in keys:
            if self.fits(less := without(schema, key), whole, name):
                self.dropped.append(pointer(*path, key))
                return less
        for key in keys:
            self.dropped.append(pointer(*path, key))
            if self.fits(schema := without(schema, key), whole, name):
                break
        return schema


def rank(keyword: str) -> int:
    """The place of a keyword in the order in which they are left out."""
    return STRUCTURE.index(keyword) + 1 if keyword in STRUCTURE else 0


def without(schema: Schema, key: str) -> Schema:
    """The schema without a keyword, and without those that would allow less if it were not there."""
    return {name: value for name, value in schema.items() if name not in (key, *TOGETHER.get(key, ()))}


def mapped(schema: Schema, change: Callable[[Path, Any], Any]) -> Schema:
    """The schema with each schema within it replaced by what `change` returns for its path and itself."""
    result = dict(schema)
    for key, inner in schema.items():
        if isinstance(inner, list) and key in (*LIST_KEYS, "items"):
            result[key] = [change((key, str(i)), part) for i, part in enumerate(inner)]
        elif isinstance(inner, dict) and key in MAPPING_KEYS:
            result[key] = {name: change((key, name), part) for name, part in inner.items()}
        elif key in SCHEMA_KEYS:
            result[key] = change((key,), inner)
    return result


def children(schema: Schema) -> list[tuple[Path, Any]]:
    """The schemas within a schema, with their paths."""
    found: list[tuple[Path, Any]] = []
    mapped(schema, lambda path, inner: found.append((path, inner)))
    return found


def unenforced(schema: Any, path: Path = ()) -> Iterator[str]:
    """The JSON pointers of the keywords that a schema compiles with and that are not enforced."""
    if not isinstance(schema, dict):
        return
    yield from (pointer(*path, key) for key in UNENFORCED if key in schema)
    if schema.get("type") == "string" and schema.get("format", FORMATS[0]) not in FORMATS:
        yield pointer(*path, "format")
    for where, inner in children(schema):
        yield from unenforced(inner, path + where)


def pointer(*path: str) -> str:
    """A path as a JSON pointer."""
    return "".join("/" + key.replace("~", "~0").replace("/", "~1") for key in path)


def keyword_label(pointer: str) -> str:
    """The keyword at the end of a pointer: `schema` for a whole one, `other` for one that is not well known."""
    keyword = pointer.rpartition("/")[2]
    return keyword if keyword in LABELS else "other" if keyword else "schema"
