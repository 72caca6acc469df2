"""The application of a server that can be told to stop: answers under way go on for a while, what is new is refused."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Router
from starlette.types import Receive, Scope, Send

from serve.web.connection import limited
from serve.web.connections import Connections
from serve.web.signals import INTERRUPTED, end_at_once

log = logging.getLogger("tokenzero.server")

POLL_SECONDS = 0.02
TICK_SECONDS = 0.1  # between two looks at whether a signal has come
LAST_SECONDS = 5.0  # for the last bytes of answers that were ended
# That an event waits for the interpreter while threads compute; Python's own 5 ms are too long, as a request waits
# for it a dozen times.
SWITCH_SECONDS = 5e-4


class DrainingApp:
    """Hands requests to an application from its start to its end, and ends it in order once it is to stop."""

    def __init__(
        self, app: Starlette | None = None, stop: Callable[[], None] = lambda: None, shutdown_seconds: float = 0.0
    ) -> None:
        """`stop` ends the server. Answers under way have `shutdown_seconds` from the moment on at which it drains."""
        self.app, self.stop, self.shutdown_seconds = app, stop, shutdown_seconds
        self.draining = False  # set by a signal: nothing new is taken, and the server ends after the answers under way
        self.answering = 0  # requests that the live application has and that are not reads
        self.live: Starlette | None = None
        self.failure: Exception | None = None  # of the application, as it was started
        self.settled = asyncio.Event()  # it is live, or never will be

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer by the live application."""
        if scope["type"] == "lifespan":
            await Router(lifespan=self.lifespan)(scope, receive, send)
            return
        await self.settled.wait()
        if self.live:
            await self.answer(self.live, scope, receive, send)

    async def answer(self, live: Starlette, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request to the live application, and count it while it is answered."""
        counted = scope["type"] == "http" and scope["method"] not in ("GET", "HEAD")
        self.answering += counted
        try:
            await live({**scope, "stopping": self.draining}, receive, send)
        finally:
            self.answering -= counted

    @asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[None]:
        """Start the application, and stop it in the end."""
        async with AsyncExitStack() as started:
            task = asyncio.create_task(self.live_and_end(started))
            yield
            task.cancel()

    async def live_and_end(self, started: AsyncExitStack) -> None:
        """Start the application; stop it and end the server once it is `draining`."""
        await self.go_live(started)
        self.settled.set()
        while not self.draining:
            await asyncio.sleep(TICK_SECONDS)
        log.info("stopping: %d answers under way have %g s", self.answering, self.shutdown_seconds)
        await self.until_answered(self.shutdown_seconds)
        if self.answering:
            log.warning("%d answers end with an error, as --shutdown-timeout is over", self.answering)
        try:
            await started.aclose()
            await self.until_answered(LAST_SECONDS)
        except Exception:
            log.exception("the application did not end in order")
        finally:
            self.stop()

    async def until_answered(self, seconds: float) -> None:
        """Return when no request is being answered, or after so many seconds."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while self.answering and loop.time() < end:
            await asyncio.sleep(POLL_SECONDS)

    async def go_live(self, started: AsyncExitStack) -> None:
        """Start the application; if that fails, there is a `failure`, and the server ends."""
        assert self.app is not None
        try:
            await started.enter_async_context(self.app.router.lifespan_context(self.app))
        except Exception as error:  # no request would ever be served
            self.failure = error
            self.stop()
            return
        self.live = self.app

    def on_signal(self, number: int) -> bool:
        """Stop in order, but at the second Ctrl-C at once. Whether it is taken: not while nothing is served yet."""
        if self.draining and number == signal.SIGINT:
            end_at_once(INTERRUPTED)
        self.draining = self.live is not None
        return self.draining


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


def make_server(
    app: DrainingApp, connections: Connections[Any], host: str, port: int, open_files: int = 1, **options: Any
) -> SignalledServer:
    """The HTTP server of an application, with limits on its connections; each takes so many open files.

    `app.stop` is set to what ends it. `options` are uvicorn's.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    config = uvicorn.Config(
        app,
        http=limited(connections, open_files),
        ws="none",
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
        **options,
    )
    server = SignalledServer(config, app.on_signal)

    def stop() -> None:
        server.should_exit = True

    app.stop = stop
    return server
