"""What is logged once: shapes of billing headers that a rule could not parse, and other kinds by their names."""

from __future__ import annotations

import logging
import re

from serve.rules.normalize import Unparsed

# What is remembered as logged, and the memory that each takes, approximately.
SHAPES, SHAPE_BYTES = 1000, 300

log = logging.getLogger("tokenzero.server")


def is_new(name: str, reported: set[str]) -> bool:
    """Whether something is to be logged: it is not among what was `reported`, and is added to it."""
    if name in reported or len(reported) >= SHAPES:
        return False
    reported.add(name)
    return True


def warn_once(odd: Unparsed, reported: set[str]) -> None:
    """Log a header that a rule could not parse, unless its shape is among those `reported`."""
    shape = re.sub(r"=[^;\s]*", "=", odd.text)[:80]  # values may differ in every request
    if is_new(shape, reported):
        log.warning("%s begins like a billing header but does not parse, so it was kept: %.120r", odd.where, odd.text)
