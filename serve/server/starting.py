"""The application of a server that starts, and of one that stops: its port is open from the first second to the last.

While it starts, `/health` and `/ready` answer at once. Every other request waits until it can be served, since an
answer that comes late costs its client nothing, and an error costs it a retry at least: Anthropic's and OpenAI's SDKs
make two. While it stops, answers under way go on for a while; what is new is refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from starlette.routing import Router
from starlette.types import Receive, Scope, Send

from serve.server.progress import StartProgress
from serve.web.access import error_response
from serve.web.paths import api_path

log = logging.getLogger("tokenzero.server")

WAIT_SECONDS = 50.0  # proxies give up on a silent connection after a minute
RETRY_SECONDS = 5  # for a request that has waited so long: SDKs try again after that
POLL_SECONDS = 0.02
TICK_SECONDS = 0.1  # between two looks at whether a signal has come
LAST_SECONDS = 5.0  # for the last bytes of answers that were ended


class StartingApp:
    """Hands requests to the server's own application from the moment on at which it is live, until it has ended."""

    def __init__(
        self,
        loading: Future[Starlette],
        progress: StartProgress,
        stopping: Callable[[], bool],
        stop: Callable[[], None] = lambda: None,
        shutdown_seconds: float = 0.0,
    ) -> None:
        """`stopping` says that the server ends; requests that wait are refused then. `stop` ends it.

        Answers under way have `shutdown_seconds` from the moment on at which `draining` is set.
        """
        self.loading, self.progress, self.stopping, self.stop = loading, progress, stopping, stop
        self.shutdown_seconds = shutdown_seconds
        self.draining = False  # set by a signal: nothing new is taken, and the server ends after the answers under way
        self.answering = 0  # requests that the live application has and that are not reads
        self.live: Starlette | None = None
        self.failure: Exception | None = None  # of the loaded application, as it was started

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer by the live application; before it, say how far the start is, or wait."""
        if scope["type"] == "lifespan":
            await Router(lifespan=self.lifespan)(scope, receive, send)
            return
        answer = None if self.live else self.early_answer(api_path(scope["path"]))
        if answer is None:
            await self.until_live()
        if self.live:
            await self.answer(self.live, scope, receive, send)
            return
        text = "the server is starting: try again later; GET /ready says how far it is"
        refusal = error_response(scope, 503, text, {"retry-after": str(RETRY_SECONDS)})
        await (answer or refusal)(scope, receive, send)

    async def answer(self, live: Starlette, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request to the live application, and count it while it is answered."""
        counted = scope["type"] == "http" and scope["method"] not in ("GET", "HEAD")
        self.answering += counted
        try:
            await live({**scope, "stopping": self.draining}, receive, send)
        finally:
            self.answering -= counted

    def early_answer(self, path: str) -> Response | None:
        """The answer that needs no model: the process is alive, and what its start is at."""
        if path == "/health":
            return JSONResponse({"status": "starting"})
        if path == "/ready":
            return JSONResponse(self.progress.report(), 503, {"retry-after": "1"})
        return None

    async def until_live(self) -> None:
        """Return when requests are served, when they never will be, or when a connection may last no longer."""
        loop = asyncio.get_running_loop()
        end = loop.time() + WAIT_SECONDS
        while not self.live and not self.stopping() and loop.time() < end:
            await asyncio.sleep(POLL_SECONDS)

    @asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[None]:
        """Start the application once it is loaded, and stop it in the end."""
        async with AsyncExitStack() as started:
            task = asyncio.create_task(self.live_and_end(started))
            yield
            task.cancel()

    async def live_and_end(self, started: AsyncExitStack) -> None:
        """Start the application once it is loaded; stop it and end the server once it is `draining`."""
        await self.go_live(started)
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
        """Wait until the application is loaded, and start it; nothing happens if that fails, see `loading`."""
        while not self.loading.done():
            await asyncio.sleep(POLL_SECONDS)
        # In a thread, so that the first one is there before the first request, which would wait for it.
        if not await run_in_threadpool(self.loading.exception):
            app = self.loading.result()
            try:
                await started.enter_async_context(app.router.lifespan_context(app))
            except Exception as error:  # no request would ever be served
                self.failure = error
                self.stop()
                return
            self.live = app
            log.info("ready after %s", self.progress.summary())
