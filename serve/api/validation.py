"""Error texts for a request's JSON that violates its schema: the field, what was expected and what was found."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec


def explain_error(error: Exception, body: bytes | bytearray, choices: Mapping[str, str]) -> str:
    """An error of msgspec as a sentence that names the field, such as "max_tokens: expected int >= 1, got 0".

    `error` is what decoding `body` raised: ValueError, or RecursionError for JSON that is nested too deeply. `choices`
    maps a field that has a fixed set of values, such as `messages.role`, to a list of them in words.
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
    value, text = value_at(body, field)
    got = len(value) if "of length <=" in expected and isinstance(value, str | list) else text
    return f"{field or 'body'}: expected {expected}, got {got}"


def value_at(body: bytes | bytearray, field: str) -> tuple[Any, str]:
    """The JSON value at a path such as `messages[0].role`, and the start of its text. msgspec does not report it."""
    try:
        value = msgspec.json.decode(body)
        for key, index in re.findall(r"(\w+)|\[(\d+)\]", field):
            value = value[key] if key else value[int(index)]
        text = msgspec.json.encode(value).decode()
    # The rest of the body may be malformed, too deep, or have the same key twice.
    except (ValueError, RecursionError, LookupError, TypeError):
        return None, "an unreadable value"
    return value, text if len(text) <= 80 else f"{text[:80]}..."
