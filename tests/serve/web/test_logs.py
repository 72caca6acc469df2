"""The log: whatever is in a record, it is one line, and one that a client cannot write."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from serve.web.logs import JsonFormatter, TextFormatter

EVIL = "one\n2026-01-01 00:00:00,000 tokenzero all is well\r\x1b[2K\x85\u2028two"


def record(message: str, *args: Any, error: Exception | None = None, **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("tokenzero.x", logging.WARNING, __file__, 1, message, args, None)
    made.exc_info = (type(error), error, error.__traceback__) if error else None
    made.fields = fields
    return made


def raised(message: str) -> Exception:
    try:
        raise ValueError(message)
    except ValueError as error:
        return error


def test_a_line_has_level_message_and_fields() -> None:
    line = TextFormatter().format(record("POST %s", "/v1/messages", status=200, key="alice"))
    assert line.endswith(" tokenzero.x WARNING POST /v1/messages status=200 key=alice")


@pytest.mark.parametrize(
    "made",
    [record(EVIL), record("%s", EVIL), record("x", section=EVIL), record("x", error=raised(EVIL))],
    ids=["message", "argument", "field", "exception"],
)
def test_no_text_begins_a_line_or_moves_the_cursor(made: logging.LogRecord) -> None:
    first, *trace = TextFormatter().format(made).splitlines()
    assert first.startswith("20")
    assert all(line.startswith("  ") for line in trace)
    assert bool(trace) == bool(made.exc_info)
    assert not set("\r\x1b\x85\u2028") & set("".join([first, *trace]))
    (line,) = JsonFormatter().format(made).splitlines()
    assert json.loads(line)["logger"] == "tokenzero.x"


def test_an_object_has_time_level_trace_and_fields() -> None:
    about = json.loads(JsonFormatter().format(record("x", error=raised("y"), status=200)))
    assert {name: about[name] for name in ("level", "message", "status")} == {
        "level": "warning",
        "message": "x",
        "status": 200,
    }
    assert about["trace"].endswith("ValueError: y")
    assert about["time"].endswith("+00:00")
