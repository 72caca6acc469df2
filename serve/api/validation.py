"""What is wrong with a request's JSON, in a sentence that names the field, what was expected and what was found."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec


def explain(error: Exception, body: bytes | bytearray, choices: Mapping[str, str]) -> str:
    """Turn msgspec's "Expected `int` >= 1 - at `$.max_tokens`" into "max_tokens: expected int >= 1, got 0".

    `error` is what decoding `body` raised: ValueError, or RecursionError for JSON nested too deeply. `choices` are the
    values of the fields that take one of a few, keyed like `messages.role`.
    """
    if not isinstance(error, msgspec.ValidationError):
        return f"body: expected a JSON object in UTF-8: {error}"
    problem, located, path = str(error).rpartition(" - at `$")
    problem, field = (problem, path.strip("`.")) if located else (path, "")
    if problem.startswith("Object missing required field"):
        missing = problem.split("`")[1]
        return f"{field}.{missing}: field required".lstrip(".")
    if field == "messages" and "length" in problem:
        return "messages: at least one message is required"
    if problem.startswith("Expected"):
        expected = problem.removeprefix("Expected ").partition(", got ")[0].replace("`", "")
    elif problem.startswith("Invalid"):
        expected = choices.get(re.sub(r"\[\d+\]", "", field), "a known value")
    else:
        return f"{field}: {problem}".removeprefix(": ")
    value, text = found(body, field)
    got = len(value) if "of length <=" in expected and isinstance(value, str | list) else text
    return f"{field or 'body'}: expected {expected}, got {got}"


def found(body: bytes | bytearray, field: str) -> tuple[Any, str]:
    """The JSON value at a path such as `messages[0].role`, which msgspec does not tell, and the start of its text."""
    try:
        value = msgspec.json.decode(body)
        for key, index in re.findall(r"(\w+)|\[(\d+)\]", field):
            value = value[key] if key else value[int(index)]
        text = msgspec.json.encode(value).decode()
    # The rest of the body may be malformed, nest too deeply, or hold the same key again with another value.
    except (ValueError, RecursionError, LookupError, TypeError):
        return None, "an unreadable value"
    return value, text if len(text) <= 80 else f"{text[:80]}..."
