"""An HTTP server whose owner decides what SIGINT and SIGTERM do."""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType

import uvicorn


class SignalledServer(uvicorn.Server):
    """Calls `on_signal` with a signal's number, between two instructions of the main thread.

    Where that returns false, uvicorn takes the signal: it serves nothing more, and raises the signal again in the end.
    """

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[int], bool]) -> None:
        super().__init__(config)
        self.on_signal = on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal; uvicorn makes this the handler while it serves."""
        if not self.on_signal(sig):
            super().handle_exit(sig, frame)
