"""The log: one line for each record, as text or as JSON, in which nothing that a client sends can begin a line."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

from serve.web.flags import flag

LEVELS = ("debug", "info", "warning", "error")
TEXT, JSON = "text", "json"
# What a terminal or a reader of lines would act on: C0 and C1 controls, and Unicode's two separators of lines.
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class LogFlags(Protocol):
    """The flags of the log."""

    @property
    def log_format(self) -> str:
        """TEXT or JSON."""

    @property
    def log_level(self) -> str:
        """One of LEVELS."""


def log_format_flag(group: str) -> Any:
    """A field for the form of the log's lines."""
    return flag("form of the log's lines", group, TEXT, choices=(TEXT, JSON))


def log_level_flag(group: str) -> Any:
    """A field for what is logged."""
    return flag("the least that is logged; debug has a line for each GET as well", group, "info", choices=LEVELS)


def set_up_logging(flags: LogFlags) -> None:
    """Log to standard error as the flags ask for, what libraries log included."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if flags.log_format == JSON else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in ("tokenzero", "uvicorn"):  # at debug, libraries say too much
        logging.getLogger(name).setLevel(flags.log_level.upper())


def fields_of(record: logging.LogRecord) -> Mapping[str, Any]:
    """The named values of a record, which `extra={"fields": ...}` gives it."""
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return fields


class TextFormatter(logging.Formatter):
    """Time, logger, level where it is not info, message, and fields as `name=value`; the lines of a trace are indented.

    Control characters are escaped, so that a line always begins with a time or, in a trace, with a space.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The lines of a record."""
        level = () if record.levelno == logging.INFO else (record.levelname,)
        fields = (f"{name}={value}" for name, value in fields_of(record).items())
        words = (self.formatTime(record), record.name, *level, record.getMessage(), *fields)
        lines = [escaped(" ".join(words)), *(f"  {escaped(line)}" for line in self.trace(record))]
        return "\n".join(lines)

    def trace(self, record: logging.LogRecord) -> list[str]:
        """The lines of a record's exception."""
        return self.formatException(record.exc_info).split("\n") if record.exc_info else []


class JsonFormatter(logging.Formatter):
    """A JSON object a line: `time`, `level`, `logger`, `message`, `trace` if there is one, and the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        about = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        trace = {"trace": self.formatException(record.exc_info)} if record.exc_info else {}
        return json.dumps({**about, **trace, **fields_of(record)}, default=str)


def escaped(text: str) -> str:
    """A text without control characters: each as Python writes it, such as `\\n`."""
    return CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)
