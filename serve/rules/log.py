"""Logs each shape of billing header that a rule could not parse once."""

from __future__ import annotations

import logging
import re

from serve.rules.normalize import Unparsed

# Shapes of unparsed headers that are logged, and the memory that each takes, approximately.
SHAPES, SHAPE_BYTES = 1000, 300

log = logging.getLogger("tokenzero.server")


def warn_once(odd: Unparsed, reported: set[str]) -> None:
    """Log a header that a rule could not parse, unless its shape is among those `reported`."""
    shape = re.sub(r"=[^;\s]*", "=", odd.text)[:80]  # values may differ in every request
    if shape not in reported and len(reported) < SHAPES:
        reported.add(shape)
        log.warning("%s begins like a billing header but does not parse, so it was kept: %.120r", odd.where, odd.text)
