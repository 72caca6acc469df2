"""What a rule could not read is logged once for each shape."""

from __future__ import annotations

import logging
import re

from serve.rules.normalize import Unparsed

# Shapes of unparsed preambles that are logged, and the bytes that each takes, about.
SHAPES, SHAPE_BYTES = 1000, 300

log = logging.getLogger("tokenzero.serving")


def warn_once(odd: Unparsed, reported: set[str]) -> None:
    """Log what a rule could not read, unless its shape is among those `reported`."""
    shape = re.sub(r"=[^;\s]*", "=", odd.text)[:80]  # values may be fresh in every request
    if shape not in reported and len(reported) < SHAPES:
        reported.add(shape)
        log.warning("%s begins like a billing header but does not parse, and stays: %.120r", odd.where, odd.text)
