"""The application of a server that starts: its port is open from the first second on.

While it starts, `/health` and `/ready` answer at once. Every other request waits until it can be served, since an
answer that comes late costs its client nothing, and an error costs it a retry at least: Anthropic's and OpenAI's SDKs
make two.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AsyncExitStack, suppress

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from serve.server.progress import StartProgress
from serve.web.access import RETRY_SECONDS, error_response
from serve.web.draining import POLL_SECONDS, DrainingApp
from serve.web.paths import api_path

log = logging.getLogger("tokenzero.server")

WAIT_SECONDS = 50.0  # proxies give up on a silent connection after a minute


class StartingApp(DrainingApp):
    """Hands requests to the server's own application from the moment on at which it is live, until it has ended."""

    def __init__(
        self,
        loading: Future[Starlette],
        progress: StartProgress,
        stopping: Callable[[], bool],
        stop: Callable[[], None] = lambda: None,
        shutdown_seconds: float = 0.0,
    ) -> None:
        """`stopping` says that the server ends; requests that wait are refused then."""
        super().__init__(None, stop, shutdown_seconds)
        self.loading, self.progress, self.stopping = loading, progress, stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer by the live application; before it, say how far the start is, or wait."""
        if scope["type"] == "lifespan" or self.live:
            await super().__call__(scope, receive, send)
            return
        answer = self.early_answer(api_path(scope["path"]))
        if answer is None and not self.stopping():
            with suppress(TimeoutError):
                async with asyncio.timeout(WAIT_SECONDS):
                    await self.settled.wait()
            if self.live:
                await self.answer(self.live, scope, receive, send)
                return
        text = "the server is starting: try again later; GET /ready says how far it is"
        refusal = error_response(scope, 503, text, {"retry-after": str(RETRY_SECONDS)})
        await (answer or refusal)(scope, receive, send)

    def early_answer(self, path: str) -> Response | None:
        """The answer that needs no model: the process is alive, and what its start is at."""
        if path == "/health":
            return JSONResponse({"status": "starting"})
        if path == "/ready":
            return JSONResponse(self.progress.report(), 503, {"retry-after": "1"})
        return None

    async def go_live(self, started: AsyncExitStack) -> None:
        """Wait until the application is loaded, and start it; nothing happens if that fails, see `loading`."""
        while not (self.loading.done() or self.stopping()):
            await asyncio.sleep(POLL_SECONDS)
        # In a thread, so that the first one is there before the first request, which would wait for it.
        if self.stopping() or await run_in_threadpool(self.loading.exception) is not None:
            return
        self.app = self.loading.result()
        await super().go_live(started)
        if self.live:
            log.info("ready after %s", self.progress.summary())
