"""`python -m serve --model DIR`: listen, load a checkpoint, compile the engine's steps, and serve until interrupted.

The port is open while the rest is loaded, see `loading`.
"""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from serve.server.config import ServerConfig, parse_config
from serve.server.loading import load
from serve.server.threads import end_process, in_thread
from serve.web.connections import Connections
from serve.web.logs import set_up_logging
from serve.web.signals import INTERRUPTED

if TYPE_CHECKING:
    import argparse
    from concurrent.futures import Future

    from starlette.applications import Starlette

    from serve.server.progress import StartProgress

C = TypeVar("C", bound=ServerConfig)


def main(argv: Sequence[str], cli: argparse.ArgumentParser | None = None) -> None:
    """Parse, listen, load, and serve until interrupted."""
    config = parse_config(argv, cli)
    set_up_logging(config)
    try:
        check_folder(config.model)
    except (ValueError, OSError) as error:
        sys.exit(f"tokenzero: {error}")
    gc.disable()  # until all is loaded: it stays, so that looking through it finds nothing
    listen(config, load)


def check_folder(model: str) -> None:
    """Raise ValueError or OSError for a local folder or file that is no checkpoint, before anything is loaded."""
    from model.families import load_config
    from model.formats.gguf_file import is_gguf
    from serve.prompt.tokenizer import check_tokenizer_file

    if (folder := Path(model).expanduser()).is_dir() or is_gguf(folder):
        check_tokenizer_file(folder)
        load_config(folder)


def listen(config: C, load: Callable[[C, StartProgress], Starlette]) -> None:
    """Open the port, `load` the application, and serve until interrupted.

    Ends the process if the port cannot be opened or loading fails. Raises SystemExit.
    """
    from serve.server.progress import StartProgress, progress_bars
    from serve.server.starting import StartingApp
    from serve.web.draining import make_server

    connections: Connections[Any] = Connections(config)
    if config.api_key_file:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which reads the file again once requests are served
    progress = StartProgress(progress_bars())
    loading = in_thread(load, config, progress)

    def loaded(loading: Future[Starlette]) -> None:
        progress.close()
        server.should_exit = server.should_exit or loading.exception() is not None
        if not loading.exception():
            connections.on_refused = loading.result().state.context.metrics.count_refused

    app = StartingApp(loading, progress, lambda: server.should_exit, shutdown_seconds=config.shutdown_timeout)
    server = make_server(app, connections, config.host, config.port)
    loading.add_done_callback(loaded)
    status = 0
    try:
        server.run()
    except KeyboardInterrupt:  # raised again once the server has stopped
        status = 0 if loading.done() else INTERRUPTED
    except SystemExit as ended:  # the port could not be opened; the log says why
        status = int(ended.code or 0)
    error = loading.exception() if loading.done() else None
    if not loading.done() or error or app.failure:
        progress.close()
        end_process(error or app.failure, status, config.sources)
    if compiling(app.live):
        end_process(None, status)
    sys.exit(status)


def compiling(live: Starlette | None) -> bool:
    """Whether a thread may still compile, for which Python's own end would wait."""
    if live is None:
        return False
    done, shapes = live.state.context.engine.compiled
    return bool(done < shapes)
