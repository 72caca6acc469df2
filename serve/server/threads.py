"""Threads that load, and the end of a process in which some still do."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from threading import Thread
from typing import ParamSpec, TypeVar

from cache.lmdb_env import StoreError
from serve.web.settings import placed
from serve.web.signals import end_at_once

P = ParamSpec("P")
T = TypeVar("T")


def in_thread(run: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Call `run` on a thread that ends with the process; what it raises, be it SystemExit, is raised by `result`."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(run(*args, **kwargs))
        except BaseException as error:  # belongs to whoever asks for the result
            future.set_exception(error)

    Thread(target=call, name=f"tokenzero-{run.__name__}", daemon=True).start()
    return future


def end_process(error: BaseException | None, status: int, sources: Mapping[str, str] | None = None) -> None:
    """End at once, with a sentence about an error that a user can mend, or with the trace of any other.

    `sources` are the places of flags, of which the sentence names one.
    Python's own end would take away what threads that still compile are using, which crashes them.
    """
    if isinstance(error, ValueError | OSError | StoreError):
        print(f"tokenzero: {placed(str(error), sources or {})}", file=sys.stderr)
    elif isinstance(error, SystemExit):
        print(placed(str(error.code), sources or {}), file=sys.stderr)
    elif error:
        traceback.print_exception(error)
    end_at_once(1 if error else status)
