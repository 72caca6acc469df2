"""Errors that an engine reports within a stream: what status each would have had as an answer of its own."""

from __future__ import annotations

import re
from typing import Any

import msgspec

# By type in the Messages API, https://docs.claude.com/en/api/errors, and by type or code elsewhere. Those of a request
# are not here: another engine would say the same.
STATUSES = {
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "overloaded_error": 529,
    "unavailable_error": 503,  # llama.cpp
    "api_error": 500,
    "server_error": 500,
    "timeout_error": 504,
    "InternalServerError": 500,  # vLLM and SGLang
}
MAY_BE_ERROR = re.compile(rb'"error": ?\{|"(?:type|object)": ?"error"')
DATA = re.compile(rb"^data: ?([^\r\n]+)", re.MULTILINE)


def error_status(events: bytes) -> int | None:
    """The status of the first error among whole events, in any of the three APIs.

    None where there is no error, or one of a kind that is not known.
    """
    if not MAY_BE_ERROR.search(events):
        return None
    return next(filter(None, map(status_in, DATA.findall(events))), None)


def status_in(data: bytes) -> int | None:
    """The status of the error in an event's data, if it has one."""
    try:
        event: Any = msgspec.json.decode(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict):
        return None
    response = event.get("response")  # of `response.failed`
    error = (response if isinstance(response, dict) else event).get("error")
    if error is None and "error" in (event.get("type"), event.get("object")):
        error = event
    if not isinstance(error, dict):
        return None
    code, kind = error.get("code"), error.get("type")
    if isinstance(code, int) and 400 <= code < 600:
        return code
    known = (STATUSES.get(each) for each in (code, kind) if isinstance(each, str))
    return next(filter(None, known), None)
