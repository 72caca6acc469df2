"""When an engine's tokens come: what the benchmarks that run one in their own process have in common."""

from __future__ import annotations

import queue
import time
from typing import Any

import numpy as np

from serve.engine import Engine, Failed, Finished, GenerationRequest, Sampled


def timed_tokens(engine: Engine, prompt: np.ndarray, count: int) -> list[tuple[float, int]]:
    """Up to `count` greedy tokens behind `prompt` ([tokens] int32), each with the seconds since it was submitted.

    The engine must be started. Raises RuntimeError if the request fails.
    """
    events: queue.Queue[tuple[float, Any]] = queue.Queue()
    begin = time.perf_counter()
    engine.submit(GenerationRequest(prompt, count), lambda event: events.put((time.perf_counter(), event)))
    sampled: list[tuple[float, int]] = []
    while True:
        at, event = events.get()
        if isinstance(event, Failed):
            raise RuntimeError(event.message)
        if isinstance(event, Finished):
            return sampled
        if isinstance(event, Sampled):
            sampled.append((at - begin, event.token))
