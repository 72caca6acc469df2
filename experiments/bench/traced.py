"""A server that notes when its stages begin and end: `python -m experiments.bench.traced SPANS --model DIR ...`.

It wraps the functions of `STAGES` and runs the server. When that ends, SPANS gets a line of JSON for each call: stage,
thread, start and stop in seconds of `time.perf_counter`, which on Linux all processes share.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Stage -> the functions that it is spent in, as `module:name` or `module:class.name`.
STAGES = {
    "prepare": "serve.server.prepare:prepare",  # in it: template and tokens
    "template": "serve.prompt.render:write_chat",
    "tokens": "serve.prompt.render:encode_segments",
    "look up": "cache.tiers:look",
    "read": "cache.tier:TieredPages.read",  # from all tiers into memory, checked
    "to device": "serve.engine.restore:Restorer.load",
    "turn": "serve.engine.core:EngineCore.step",  # in it: name pages, copy in, dispatch, collect
    "preload": "serve.engine.preload:Preloader.step",
    "take over": "serve.engine.preload:Preloader.take",
    "name pages": "serve.engine.page_names:PageNames.extend",
    "copy in": "serve.engine.restore:Restorer.copy_in",
    "publish": "serve.engine.memory:Memory.publish",
    "dispatch": "serve.engine.runner:Runner.dispatch",
    "collect": "serve.engine.runner:Runner.collect",
    "sleep": "serve.engine.inbox:Inbox.sleep",
}


@dataclass(frozen=True)
class Span:
    """One call of a stage's function."""

    stage: str
    thread: str
    start: float  # seconds, `time.perf_counter`
    stop: float


def wrap(path: str, stage: str, spans: list[Span]) -> None:
    """Replace a function by one that adds a span for each call."""
    module, _, name = path.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, last = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    function: Callable[..., Any] = getattr(owner, last)
    for place in [owner, *sys.modules.values()]:  # a function may have been imported by name
        if getattr(place, last, None) is function:
            setattr(place, last, timed(function, stage, spans))


def timed(function: Callable[..., Any], stage: str, spans: list[Span]) -> Callable[..., Any]:
    """The function, which adds a span for each call."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spans.append(Span(stage, threading.current_thread().name, start, time.perf_counter()))

    return call


def read_spans(path: Path) -> list[Span]:
    """The spans that a server has written."""
    return [Span(**json.loads(line)) for line in path.read_text().splitlines()]


def main() -> None:
    """Run the server with the arguments after the first."""
    cli: Any = importlib.import_module("serve.server.cli")
    cli.compiling = lambda live: False  # it ends as Python does, so that the spans are written
    out, spans = Path(sys.argv[1]), list[Span]()
    importlib.import_module("serve.server.app")
    for stage, path in STAGES.items():
        wrap(path, stage, spans)
    try:
        cli.main(sys.argv[2:])
    finally:
        out.write_text("".join(json.dumps(asdict(span)) + "\n" for span in spans))


if __name__ == "__main__":
    main()
