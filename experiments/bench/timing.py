"""The times of an engine's tokens, and of its passes alone: for benchmarks that run an engine in-process."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from cache.pool import pages_for
from model.kv import empty_pool
from serve.engine.buckets import GREEDY, SequenceInput, pack, smallest_bucket
from serve.engine.engine import Engine
from serve.engine.request import Event, Failed, Finished, GenerationRequest, Started, TokenEvent
from serve.engine.steps import run_alone


class Asked:
    """A prompt ([tokens] int32) submitted to a started engine for up to `count` greedy tokens, and their times.

    Times are those of `time.perf_counter`, taken on the engine's thread as the token is sent.
    """

    def __init__(self, engine: Engine, prompt: np.ndarray, count: int) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []
        self.started: Started | None = None
        self.ended: Finished | Failed | None = None
        self.changed = threading.Condition()
        self.submitted = time.perf_counter()
        self.number = engine.submit(GenerationRequest(prompt, count), self.take)

    def take(self, event: Event) -> None:
        """Record an event; called by the engine."""
        now = time.perf_counter()
        with self.changed:
            if isinstance(event, Started):
                self.started = event
            elif isinstance(event, TokenEvent):
                self.times.append(now)
                self.tokens.append(event.token)
            elif isinstance(event, Finished | Failed):
                self.ended = event
            self.changed.notify_all()

    def wait(self, count: int | None = None) -> None:
        """Return after `count` tokens, or at its end. Raises RuntimeError if it fails or ends too soon."""
        with self.changed:
            self.changed.wait_for(lambda: self.ended or (count is not None and len(self.times) >= count))
            if isinstance(self.ended, Failed):
                raise RuntimeError(self.ended.message)
            if count is not None and len(self.times) < count:
                raise RuntimeError(f"the request ended after {len(self.times)} tokens, expected at least {count}")

    @property
    def ttft(self) -> float:
        """Seconds to the first token, which must have come."""
        return self.times[0] - self.submitted


@dataclass(frozen=True)
class StepParts:
    """Seconds of the parts of a decode step that is run alone, one part after the other."""

    pack: float  # its batch, on the host
    dispatch: float  # until the call of the forward pass returns, which may compute meanwhile
    forward: float  # until its logits are there, the dispatch included
    sampling: float  # from then until the host has the token


class Passes:
    """An engine's compiled steps called by hand, on a pool of their own that holds a prompt's keys and values.

    Use it only while the engine is idle: it times the model's pass and its sampling, and nothing else.
    """

    def __init__(self, engine: Engine, prompt: np.ndarray) -> None:
        settings = engine.settings
        self.engine, self.prompt = engine, prompt
        self.pool = empty_pool(engine.config, settings.num_pages, settings.page_size, jnp.dtype(settings.dtype))
        for start in range(0, len(prompt), settings.max_prefill_tokens):
            self.seconds(start, min(settings.max_prefill_tokens, len(prompt) - start))

    def seconds(self, prefix: int, count: int, draft: int = 0) -> float:
        """Run tokens [prefix, prefix + count) of the prompt in the fewest chunks: seconds until all is computed.

        With `draft` > 0, the last so many tokens are draft tokens, and all are one chunk.
        """
        runner, taken, largest = self.engine.core.runner, 0.0, self.engine.settings.max_prefill_tokens
        for start in range(prefix, prefix + count, largest):
            tokens = self.prompt[start : min(start + largest, prefix + count)]
            bucket = smallest_bucket(runner.buckets, [len(tokens)], sample_all_tokens=draft > 0)
            self.pool, seconds = run_alone(runner.steps, runner.params, self.pool, bucket, tokens, start, draft)
            taken += seconds
        return taken

    def decode_parts(self, prefix: int) -> StepParts:
        """Run token `prefix` of the prompt as a decode step, and time its parts."""
        runner, size = self.engine.core.runner, self.engine.settings.page_size
        token, pages = self.prompt[prefix : prefix + 1], np.arange(pages_for(prefix + 1, size), dtype=np.int32)
        bucket = smallest_bucket(runner.buckets, [1])
        times = [time.perf_counter()]
        batch, sampling = pack([SequenceInput(token, prefix, pages, GREEDY)], bucket, runner.steps.table_pages)
        times.append(time.perf_counter())
        step = runner.steps.run[bucket]
        logits, self.pool = step.forward(runner.params, self.pool, batch, runner.steps.nothing)
        times.append(time.perf_counter())
        jax.block_until_ready((logits, self.pool))
        times.append(time.perf_counter())
        np.asarray(step.sample(logits, sampling))
        times.append(time.perf_counter())
        begin, packed, dispatched, computed, sampled = times
        return StepParts(packed - begin, dispatched - packed, computed - packed, sampled - computed)


def timed_tokens(engine: Engine, prompt: np.ndarray, count: int) -> list[tuple[float, int]]:
    """Up to `count` greedy tokens after `prompt` ([tokens] int32), each with the seconds since the submission.

    The engine must be started. Raises RuntimeError if the request fails.
    """
    asked = Asked(engine, prompt, count)
    asked.wait()
    return [(at - asked.submitted, token) for at, token in zip(asked.times, asked.tokens, strict=True)]
