"""The engine: token ids in, token ids out. A thread that turns the core's step loop, and what other threads call.

The engine's thread owns the device, its pages and all sequences. Other threads use `Engine.submit` and `Engine.cancel`,
which leave a note in the inbox. One turn of the thread:

    inbox:  new requests, cancellations    sleep here while there is nothing to do
    core:   cancel, then one step          see serve.engine.core for the parts of a step
    idle:   preload pages of the store,    only while no request is in the engine
            one short step of an audit

A step that raises fails the requests that were running, and no others.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

import jax
import numpy as np

from cache.eviction import State
from cache.tiers import Tiers
from model.config import ModelConfig
from model.fingerprint import with_pages
from model.params import Params
from serve.cost.model import Constants, CostModel
from serve.engine.core import EngineCore
from serve.engine.counters import Counters
from serve.engine.fairness import Queue, owner_of
from serve.engine.forecast import Forecaster, asked
from serve.engine.inbox import Answered, Inbox, Overloaded, QueueFull
from serve.engine.read_ahead import ReadAhead
from serve.engine.request import Event, Failed, Finished, Forecast, GenerationRequest, Waiting
from serve.engine.sequence import Sequence
from serve.engine.sessions import KnownAgents, agents_now
from serve.engine.settings import EngineSettings

log = logging.getLogger("tokenzero.engine")

# The longest sleep while all that runs waits for the tiers.
IDLE_SECONDS = 0.1
# Between two steps, for questions: then the requests have their turn.
ANSWER_SECONDS = 0.005
# Between two looks at what is read, before the thread starts.
PRELOAD_SECONDS = 0.001


class IdleWork(Protocol):
    """Work for the engine's thread while it has no requests, one short step at a time. Its methods never raise."""

    def step(self, engine: Engine) -> None:
        """Do one step, if the engine is idle."""

    def sleep_s(self, engine: Engine) -> float | None:
        """Seconds that an idle engine may sleep before the next step; None for no limit."""

    def on_first_token(self, sequence: Sequence, token: int) -> None:
        """Take note of a sequence whose first token was sampled just now."""


class Engine:
    """A model that generates for many requests at a time; reuses, keeps and restores the keys and values of prefixes.

    `params` lie on the devices that `tensor_parallel` of the settings asks for, see model.sharding. Raises ValueError
    if `max_model_len` tokens do not fit into the pool.
    """

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        settings: EngineSettings,
        fingerprint: bytes = b"",
        tiers: Tiers | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        costs: Constants | None = None,
    ) -> None:
        capacity = (settings.num_pages - 1) * settings.page_size
        if settings.max_model_len > capacity:
            raise ValueError(
                f"max_model_len is {settings.max_model_len} tokens, but {settings.num_pages} pages of "
                f"{settings.page_size} hold {capacity}: lower --max-model-len or raise --kv-pool-bytes"
            )
        self.config, self.settings, self.fingerprint = config, settings, with_pages(fingerprint, settings.kv_dtype)
        self.inbox = Inbox()
        self.core = EngineCore(params, config, settings, self.fingerprint, tiers, self.inbox, on_progress, costs)
        self.core.on_first_token = self._on_first_token
        self.forecaster, self.read_ahead = Forecaster(self.core), ReadAhead(self.core)
        self.idle_work: IdleWork | None = None
        self.submitted = 0  # requests; the latest one's number
        self.thread = threading.Thread(target=self.loop, name="tokenzero-engine", daemon=True)

    # Called before the thread starts.

    def preload(self, enough: Callable[[], bool]) -> None:
        """Until `enough()`: read pages of the store that are likely to be asked for, and load programs from disk."""
        preloader, programs = self.core.preloader, self.core.programs.load_kept()
        try:
            while not enough():
                reads = preloader is not None and preloader.step(quiet=True)
                if next(programs, None) is None:
                    if not reads:
                        break
                    time.sleep(PRELOAD_SECONDS)
        except Exception:
            log.exception("nothing more is preloaded")
            self.core.check_pool()

    # Called from any thread.

    def start(self) -> None:
        """Start the step loop, and compile in the background what is not compiled yet."""
        self.thread.start()
        self.core.programs.start()

    def stop(self) -> None:
        """Finish the step under way, fail what is still running, end the thread, and write what the tiers lack.

        It takes `stop_seconds` at most, half of them for the pages of sequences that have ended; a thread that hangs is
        left alone.
        """
        end = time.monotonic() + self.settings.stop_seconds
        self.core.programs.stop()
        self.inbox.stop()
        self.thread.join(self.settings.stop_seconds)
        if self.thread.is_alive():
            log.warning("the engine's thread has not ended within %g s: it is left alone", self.settings.stop_seconds)
        if self.core.tiers:
            self.core.tiers.close(max(0.0, end - time.monotonic()))

    def submit(self, request: GenerationRequest, emit: Callable[[Event], object]) -> int:
        """Queue a request; `emit` is called on the engine's thread with each of its events. Returns its number.

        Raises Overloaded when the queue is full or the engine has stopped, ValueError when prompt and one token exceed
        `max_model_len`, for numbers that no step can take, and for a head that is not whole pages of the prompt.
        """
        sequence = self.new_sequence(request, emit)
        with self.inbox.changed:
            submitted = sum(owner_of(sequence) == request.owner for sequence in self.inbox.submissions)
            if submitted + self.core.waiting.count(request.owner) >= self.settings.max_queue:
                raise QueueFull(
                    f"{self.settings.max_queue} requests are waiting already: try again, or raise --max-queue"
                )
            self.submitted += 1
            number = self.submitted
            self.inbox.submit(replace(sequence, number=number, submitted=time.perf_counter()))
        return number

    def new_sequence(self, request: GenerationRequest, emit: Callable[[Event], object]) -> Sequence:
        """A sequence for a request, which has no number yet. Raises ValueError as `submit` does."""
        check_numbers(request)
        settings = self.settings
        prompt = np.asarray(request.tokens, np.int32)
        longest = settings.max_model_len - len(prompt)
        if len(prompt) == 0 or longest < 1:
            raise ValueError(f"prompt has {len(prompt)} tokens, expected 1 to {settings.max_model_len - 1}")
        if request.head % settings.page_size or not 0 <= request.head < len(prompt):
            raise ValueError(f"head has {request.head} tokens, expected whole pages of a prompt of {len(prompt)}")
        tokens = np.zeros(len(prompt) + min(request.max_tokens, longest), np.int32)
        tokens[: len(prompt)] = prompt
        return Sequence(0, request, emit, tokens, len(prompt), settings.page_size, time.perf_counter())

    async def forecast(self, request: GenerationRequest) -> Forecast | None:
        """What a request would find if it came now, see serve.engine.forecast; it is not a use of what is cached.

        None until a prefill was measured, or once the engine has stopped. Raises ValueError as `submit` does.
        """
        sequence = self.new_sequence(request, lambda event: None)
        with suppress(Overloaded):
            answer = await asyncio.to_thread(asked, self.forecaster, sequence, self.inbox.ask)
            return await asyncio.wrap_future(answer)
        return None

    def expect(self, agent: str) -> None:
        """A request of this agent is on its way, whose tokens are not known yet."""
        with suppress(Overloaded):
            self.inbox.ask(lambda: self.read_ahead.expect(agent))

    async def sessions(self, owner: str | None) -> KnownAgents | None:
        """The latest sessions that clients of an `owner` name, or of all; None once the engine has stopped."""
        with suppress(Overloaded):
            return await agents_now(self.core, self.read_ahead, owner, self.inbox.ask)
        return None

    def expected(self, number: int) -> Forecast | None:
        """What was expected of a request that waits or runs, as it came; None if nothing was."""
        found = (sequence for sequence in [*self.waiting, *self.running] if sequence.number == number)
        return next((sequence.forecast for sequence in found), None)

    def cancel(self, number: int) -> None:
        """End a request without a further event; nothing happens if it has ended already."""
        self.inbox.cancel(number)

    def answered(self, id: str, state: State, ended_session: str = "") -> None:
        """Say how the answer to the request with this id ended, and whether its session asks for nothing more.

        Called after its last event was taken; what its agent does now decides what is evicted.
        """
        with suppress(Overloaded):
            self.inbox.ask(lambda: self.core.memory.note(Answered(id, state, ended_session)))

    def drop_pin(self, name: str) -> None:
        """Keep a pinned prefix no longer; nothing happens if there is none of this name."""
        self.core.retainer.drop_pin(name)

    def pinned(self, name: str) -> bool:
        """Whether a prefix is pinned under this name: a request that needs the whole pool, or a fault, ends pins."""
        return name in self.core.retainer.retentions.pins

    def generate(self, request: GenerationRequest, waiting_s: float | None = None) -> AsyncGenerator[Event, None]:
        """Submit a request from an event loop, see `generate`."""
        return generate(self, request, waiting_s)

    @property
    def alive(self) -> bool:
        """Whether the step loop turns."""
        return self.thread.is_alive()

    @property
    def idle(self) -> bool:
        """Whether no request is in the queue or in the batch."""
        return not (self.waiting or self.running)

    @property
    def device(self) -> str:
        """The kind of device that the model is on."""
        return str(jax.devices()[0].device_kind)

    @property
    def vocab_size(self) -> int:
        """Logits of the model."""
        return self.config.vocab_size

    @property
    def compiled(self) -> tuple[int, int]:
        """Shapes of steps that are compiled, and shapes in all: the rest is compiled while requests are served."""
        steps = self.core.runner.steps
        return len(steps.ready()), len(steps.by_bucket)

    @property
    def counters(self) -> Counters:
        """What the engine has done since the start."""
        return self.core.counters

    @property
    def steps(self) -> int:
        """Turns of the step loop since the start."""
        return self.core.counters.steps

    @property
    def waiting(self) -> Queue:
        """The requests in the queue; for other threads to count."""
        return self.core.waiting

    @property
    def running(self) -> list[Sequence]:
        """The requests in the batch; for other threads to count."""
        return self.core.running

    @property
    def cost(self) -> CostModel:
        """What prefills and reads take here, by the latest measurements."""
        return self.core.costs.model

    # The engine's thread.

    def loop(self) -> None:
        """Turn until stopped."""
        try:
            while (cancelled := self.receive()) is not None:
                self.turn(cancelled)
        finally:
            self.inbox.stop()
            self.inbox.answer()
            late, _ = self.inbox.read()
            self.core.stop(list(late))

    def turn(self, cancelled: set[int]) -> None:
        """Cancel these requests, do one step, and one of the idle work."""
        problem = ""
        try:
            self.core.cancel(cancelled)
            if self.core.saver:
                self.core.saver.demote()
            self.core.step()
            if self.core.preloader:
                self.core.preloader.step(self.core.quiet)
            if self.idle_work:
                self.idle_work.step(self)
        except Exception as error:
            log.exception("a step failed: %d running requests end with an error", len(self.running))
            problem = f"{type(error).__name__}: {error}"
        if problem:  # only now, as the trace holds the step's arrays, for which a device may have no room left
            self.core.recover(problem)

    def receive(self) -> set[int] | None:
        """Queue the requests in the inbox, waiting for some while there is nothing to do.

        Returns the numbers of the requests to cancel; None to stop.
        """
        unfinished = self.core.unfinished
        if not unfinished or self.core.idle:
            longest = self.idle_work.sleep_s(self) if self.idle_work and not unfinished else None
            self.inbox.sleep(IDLE_SECONDS if unfinished else longest)
        self.inbox.answer(ANSWER_SECONDS)
        submissions, cancelled = self.inbox.read()
        for sequence in submissions:
            self.forecaster.arrived(sequence)
            self.core.waiting.extend([sequence])
        return None if self.inbox.stopping else cancelled

    def _on_first_token(self, sequence: Sequence, token: int) -> None:
        self.forecaster.answered(sequence)
        self.read_ahead.answered(sequence)
        if self.idle_work:
            self.idle_work.on_first_token(sequence, token)


def check_numbers(request: GenerationRequest) -> None:
    """Raise ValueError for numbers in a request that no step can take."""
    for name, value, least, limit in (
        ("max_tokens", request.max_tokens, 0, 2**31),
        ("top_k", request.sampling.top_k, 0, 2**31),
        ("seed", request.sampling.seed, 0, 2**32),
    ):
        if not least <= value < limit:
            raise ValueError(f"{name} is {value}, expected {least} to {limit - 1}")


async def generate(
    engine: Engine, request: GenerationRequest, waiting_s: float | None = None
) -> AsyncGenerator[Event, None]:
    """Submit a request and yield its events; leaving the iterator early cancels it.

    Yields `Waiting` whenever `waiting_s` seconds pass without one. Raises what `Engine.submit` raises.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[Event] = asyncio.Queue()
    number = engine.submit(request, lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
    try:
        while True:
            try:
                # Not `wait_for`: before Python 3.12 it loses a cancellation that comes together with an event.
                async with asyncio.timeout(waiting_s):
                    event: Event = await events.get()
            except TimeoutError:
                event = Waiting(engine.expected(number))
            yield event
            if isinstance(event, Finished | Failed):
                return
    finally:
        engine.cancel(number)
