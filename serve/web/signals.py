"""The end of a process at once."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

INTERRUPTED = 130  # the exit status of what Ctrl-C has ended, as shells count it


def end_at_once(status: int) -> NoReturn:
    """End the process without waiting for its threads."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
