"""The step loop: admit, prefill in chunks, decode in batches, publish what was computed to the prefix store.

One thread owns the device, the pool and the store; everybody else talks to it through `submit` and `cancel`. A sequence
is at any time `tokens[:length]` of which `tokens[:computed]` are in the pool: with one token pending it decodes, with
more it prefills, and a preempted or cancelled one leaves what it computed in the store. While the host reads what one
step has sampled, the next one runs: it takes the tokens that nobody has seen yet from the device.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import jax
import numpy as np

from cache.pool import PoolExhausted
from cache.prefix_cache import PrefixCache
from cache.tiers import Tiers
from model.config import ModelConfig
from model.kv import KVPool, empty_pool
from model.params import Params
from serve.engine.cost import Constants, cost_model
from serve.engine.inbox import Inbox, Overloaded
from serve.engine.paging import Pager
from serve.engine.prompt_lookup import propose_draft
from serve.engine.request import Event, Failed, Finished, GenerationRequest, Started, TokenEvent, Waiting
from serve.engine.schedule import by_urgency, most_urgent
from serve.engine.sequence import InFlightStep, ScheduledSequence, Sequence, SequenceOutput, UnsampledStep
from serve.engine.steps import SequenceInput, batch_buckets, compile_steps, pack, pack_masks, smallest_bucket, warm_up

log = logging.getLogger("tokenzero.engine")

# Of the waiting requests, those whose pages are read ahead.
RESTORED_WHILE_WAITING = 2
# Of the waiting requests, those among which the next one is chosen.
CHOSEN_FROM = 8
# Of the mean time that an answer takes, what the latest one counts for.
ANSWER_SHARE = 0.1
# The longest nap while all that runs waits for the tiers.
IDLE_SECONDS = 0.1


@dataclass(frozen=True)
class EngineSettings:
    """Sizes the engine is built with."""

    num_pages: int
    max_model_len: int  # tokens of prompt and output together
    page_size: int = 64
    max_num_seqs: int = 16  # sequences that run at the same time
    max_queue: int = 256  # requests that may queue before new ones are refused
    max_prefill_tokens: int = 1024
    # Chunk while others decode: what their next token may have to wait for.
    max_mixed_prefill_tokens: int = 256
    # Tokens that a decoding sequence runs on trial in each step, where its text repeats itself; 0 for none.
    speculative_tokens: int = 0
    restore_bytes: int = 1 << 30  # of pages that were read back and are not in the pool yet
    stop_seconds: float = 30.0  # that `Engine.stop` takes at most
    dtype: str = "float32"
    audit_pages: int = 0  # beside the others, for the auditor to compute in

    def __post_init__(self) -> None:
        """No chunk is longer in company than alone."""
        object.__setattr__(
            self, "max_mixed_prefill_tokens", min(self.max_mixed_prefill_tokens, self.max_prefill_tokens)
        )


@dataclass
class Counters:
    """What the engine has done since the start; read by the metrics page."""

    steps: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    failures: int = 0


class IdleWork(Protocol):
    """Work for the engine's thread while it has no requests, one short step at a time. Its methods never raise."""

    def turn(self, engine: Engine) -> None:
        """Do one step, if the engine is idle."""

    def nap(self, engine: Engine) -> float | None:
        """Seconds that an idle engine may sleep before the next step; None for as long as it likes."""

    def reused(self, sequence: Sequence, first: int) -> None:
        """Take note of a sequence whose first token was sampled just now."""


class Engine:
    """The model, its pool, its store and the thread that steps them."""

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
        room = (settings.num_pages - 1) * settings.page_size
        if settings.max_model_len > room:
            raise ValueError(
                f"max_model_len is {settings.max_model_len} tokens, but {settings.num_pages} pages of "
                f"{settings.page_size} hold {room}: lower --max-model-len or raise --kv-pool-bytes"
            )
        self.params, self.config, self.settings, self.fingerprint = params, config, settings, fingerprint
        self.pool = self.fresh_pool()
        self.store = PrefixCache(settings.num_pages, settings.page_size, fingerprint)
        self.buckets = batch_buckets(
            settings.max_num_seqs,
            settings.max_prefill_tokens,
            settings.max_mixed_prefill_tokens,
            settings.speculative_tokens,
        )
        self.steps = compile_steps(params, self.pool, config, self.buckets, settings.max_model_len, on_progress)
        self.cost = cost_model(config, costs)
        self.inbox = Inbox()
        self.pager = (
            Pager(tiers, self.pool, fingerprint, self.cost, self.inbox.wake, settings.restore_bytes) if tiers else None
        )
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.flight: InFlightStep | None = None
        self.answer_s = 0.0  # what answers take, from first token to last: a moving mean
        self.landed_at = 0.0  # when the latest step had been read, by `time.perf_counter`
        self.full = False  # the next request has no room until one that runs has ended
        self.idle = False  # the last step found nothing to do, because all wait for the tiers
        self.counters = Counters()
        self.device_s = 0.0  # what the steps of requests took the device
        self.numbers = 0
        self.thread = threading.Thread(target=self.loop, name="tokenzero-engine", daemon=True)
        self.pool, (start, stop), seconds = warm_up(self.steps, params, self.pool, settings.max_model_len)
        self.prefilled(start, stop, seconds)
        self.idle_work: IdleWork | None = None

    # Called from any thread.

    def start(self) -> None:
        """Start the step loop."""
        self.thread.start()

    def stop(self) -> None:
        """Finish the step under way, fail what is still running, end the thread, and write what the tiers lack.

        It takes `stop_seconds` at most, half of them for the pages of sequences that have ended: what hangs is left.
        """
        end = time.monotonic() + self.settings.stop_seconds
        self.inbox.stop()
        self.thread.join(self.settings.stop_seconds)
        if self.thread.is_alive():
            log.warning("the engine's thread has not ended within %g s: it is left alone", self.settings.stop_seconds)
        if self.pager:
            self.pager.tiers.close(max(0.0, end - time.monotonic()))

    def submit(self, request: GenerationRequest, emit: Callable[[Event], object]) -> int:
        """Queue a request; `emit` is called on the engine's thread with each of its events. Returns its number.

        Raises Overloaded when the queue is full or the engine has stopped, ValueError when prompt and one token exceed
        `max_model_len`, and for numbers that no step can take.
        """
        for name, value, least, most in (
            ("max_tokens", request.max_tokens, 1, 2**31),
            ("top_k", request.sampling.top_k, 0, 2**31),
            ("seed", request.sampling.seed, 0, 2**32),
        ):
            if not least <= value < most:
                raise ValueError(f"{name} is {value}, expected {least} to {most - 1}")
        prompt = np.asarray(request.tokens, np.int32)
        room = self.settings.max_model_len - len(prompt)
        if len(prompt) == 0 or room < 1:
            raise ValueError(f"prompt has {len(prompt)} tokens, expected 1 to {self.settings.max_model_len - 1}")
        tokens = np.zeros(len(prompt) + min(request.max_tokens, room), np.int32)
        tokens[: len(prompt)] = prompt
        with self.inbox.changed:
            if len(self.inbox.submissions) + len(self.waiting) >= self.settings.max_queue:
                raise Overloaded(f"{self.settings.max_queue} requests are waiting already")
            self.numbers += 1
            sequence = Sequence(self.numbers, request, emit, tokens, len(prompt), submitted=time.perf_counter())
            self.inbox.submit(sequence)
        return sequence.number

    def cancel(self, number: int) -> None:
        """End a request without a further event; nothing happens if it has ended already."""
        self.inbox.cancel(number)

    # The engine's thread.

    def loop(self) -> None:
        """Step until stopped; a step that raises fails the requests that were running and no others."""
        try:
            while (cancelled := self.receive()) is not None:
                try:
                    self.drop(cancelled)
                    self.step()
                    if self.idle_work:
                        self.idle_work.turn(self)
                except Exception as error:
                    log.exception("a step failed: %d running requests end with an error", len(self.running))
                    self.recover(f"{type(error).__name__}: {error}")
        finally:
            self.inbox.stop()
            late, _ = self.inbox.read()
            ended = [*self.running, *self.waiting, *late]
            for sequence in ended:
                try:
                    if sequence.lease is not None:
                        self.retire(sequence)
                except Exception:  # the others are to hear of the end, too
                    log.exception("request %d leaves nothing in the store", sequence.number)
                self.tell(sequence, Failed("the engine has stopped"))
            if self.pager:
                self.pager.drain(self.pool, self.store, self.settings.stop_seconds / 2)

    def receive(self) -> set[int] | None:
        """Take what other threads sent, waiting for it when there is nothing to do: who is cancelled; None to stop."""
        unfinished = bool(self.waiting or self.running or (self.pager and self.pager.parked))
        if not unfinished or self.idle:
            spare = self.idle_work.nap(self) if self.idle_work and not unfinished else None
            self.inbox.sleep(IDLE_SECONDS if unfinished else spare)
        submissions, cancelled = self.inbox.read()
        self.waiting.extend(submissions)
        return None if self.inbox.stopping else cancelled

    def drop(self, cancelled: set[int]) -> None:
        """End the requests with these numbers."""
        if cancelled:
            for sequence in [s for s in self.waiting if s.number in cancelled]:
                self.waiting.remove(sequence)
                if self.pager:
                    self.pager.forget(sequence)
            for sequence in [s for s in self.running if s.number in cancelled]:
                self.retire(sequence)

    def step(self) -> None:
        """Admit, launch a step for all that decodes and one prefill chunk, then read the step before it."""
        read = self.landed_at
        if self.settings.speculative_tokens:
            self.land()  # what may come next depends on what came
        self.admit()
        restored = self.restore_pages()
        launched = self.launch(self.plan())
        self.land()
        if launched:
            self.pick(launched)  # what a constraint allows depends on what came, too, but the model's pass does not
        self.flight = launched
        if launched and not any(seat.samples and seat.sequence.lease for seat in launched.seats):
            self.land()  # nobody is waiting for its token, and whoever comes now should wait for one chunk at most
        self.idle = not (launched or restored or self.landed_at > read)
        self.counters.steps += 1

    def plan(self) -> list[ScheduledSequence]:
        """Who runs in the next step, and what: all that decode, behind a chunk of one that prefills."""
        decoding = [s for s in self.running if s.decodes]
        prefilling = [s for s in self.running if s.pending > 1 and not (self.pager and self.pager.blocked(s))]
        if not prefilling:
            return [ScheduledSequence(s, 1, self.guesses(s)) for s in decoding]
        now = time.perf_counter()
        sequence = most_urgent(
            prefilling, lambda s: now - s.submitted, lambda s: self.cost.prefill_s(s.computed, s.length)
        )
        self.adopt(sequence)
        count = min(
            sequence.pending, self.settings.max_mixed_prefill_tokens if decoding else self.settings.max_prefill_tokens
        )
        if self.pager:
            count = min(count, self.pager.until_restore(sequence) or count)
        return [ScheduledSequence(sequence, count), *(ScheduledSequence(s, 1) for s in decoding)]

    def guesses(self, sequence: Sequence) -> tuple[int, ...]:
        """Tokens that may come next but one in a sequence, to be run on trial."""
        if not self.settings.speculative_tokens or sequence.request.constraint:
            return ()
        count = min(self.settings.speculative_tokens, sequence.room - 1)
        return tuple(propose_draft(sequence.tokens[: sequence.length], count).tolist())

    def admit(self) -> None:
        """Move waiting sequences to the running ones while there is room for their prompts."""
        while self.waiting and len(self.running) < self.settings.max_num_seqs and not self.full:
            sequence, others = self.in_line()[0], list(self.running)
            self.waiting.remove(sequence)
            # Counted as running before anything can raise: a request that breaks a step must not be tried again.
            self.running.append(sequence)
            sequence.lease = self.store.match(sequence.known, sequence.request.salt)
            stats = self.store.stats()
            room = (stats.pages_free + stats.pages_cached) * self.settings.page_size
            promised = sum(max(0, s.length - s.lease.length) for s in others if s.lease)
            sequence.computed = sequence.lease.reused
            sequence.sealed = sequence.computed // self.settings.page_size
            if others and sequence.pending + promised > room:
                # What was read ahead for it stays, and nothing of it is new to the store.
                self.store.release(sequence.lease)
                sequence.lease, sequence.computed = None, 0
                self.running.remove(sequence)
                self.waiting.appendleft(sequence)
                self.full = True
                return
            if not sequence.sampled:
                sequence.taken_over = sequence.computed
            if not sequence.started:  # one that was preempted has computed some of what it matches now
                sequence.started, sequence.reused = time.perf_counter(), sequence.computed
            elif not sequence.sampled:  # and some of what it had taken over may be gone
                sequence.reused = min(sequence.reused, sequence.computed)
                sequence.restored.clear()

    def in_line(self) -> list[Sequence]:
        """Of the requests that have waited longest, the next to admit, and so on."""
        if len(self.waiting) <= 1:
            return list(self.waiting)
        now = time.perf_counter()
        return by_urgency(
            islice(self.waiting, CHOSEN_FROM),
            lambda s: now - s.submitted,
            # Its place is taken for the answer, too: of no time at all, cached prompts would pass all others.
            lambda s: self.cost.prefill_s(self.store.peek(s.known, s.request.salt), s.length) + self.answer_s,
        )

    def restore_pages(self) -> bool:
        """Copy in what the tiers have brought, and read ahead, for those next in line too. Whether anything came."""
        if self.pager is None:
            return False
        came = False
        for sequence in list(self.running):
            if sequence.lease is None:
                continue
            if sequence.restore is None or sequence.computed < sequence.restore.held:
                self.pager.begin(sequence, sequence.computed)
            self.pager.read_ahead(sequence)
            if (loaded := self.pager.ready(sequence)) is None:
                continue
            self.adopt(sequence)  # another may have brought the same pages meanwhile
            self.pager.read_ahead(sequence)
            if self.pager.ready(sequence) is not loaded:
                continue
            came = True
            if self.make_room(sequence, max(loaded.stop, sequence.computed)):
                self.pool = self.pager.copy_in(sequence, loaded, self.pool)
                self.publish(sequence)
        for sequence in self.in_line()[:RESTORED_WHILE_WAITING]:
            if sequence.restore is None:
                # Looked up, not leased: it may be long until its turn, and others need the pages.
                self.pager.begin(sequence, self.store.peek(sequence.known, sequence.request.salt))
            self.pager.read_ahead(sequence)
        if self.pager.save_parked(self.pool, self.store):
            self.full = False
        return came

    def prefilled(self, start: int, stop: int, seconds: float) -> None:
        """Learn from a chunk of tokens [start, stop) what computing costs here."""
        self.cost = self.cost.prefilled(start, stop, seconds)
        if self.pager:
            self.pager.cost = self.pager.cost.prefilled(start, stop, seconds)

    def adopt(self, sequence: Sequence) -> None:
        """Take over what another request has computed of the same prompt since this one last looked."""
        assert sequence.lease is not None
        lease = self.store.match(sequence.tokens[: sequence.length - 1], sequence.request.salt)
        if lease.reused <= sequence.computed:
            self.store.release(lease)
            return
        self.store.release(sequence.lease)
        sequence.lease = lease
        sequence.take_over(lease.reused, self.settings.page_size)

    def launch(self, plan: list[ScheduledSequence]) -> InFlightStep | None:
        """Start the step that a plan asks for; None if there is nothing to run."""
        chosen = [t for t in plan if self.make_room(t.sequence, t.sequence.computed + t.count + len(t.guesses))]
        # A later one may have preempted an earlier one.
        rows = [(t, self.row(t)) for t in chosen if t.sequence.lease is not None]
        if not rows:
            return None
        bucket = smallest_bucket(self.buckets, [len(row.tokens) for _, row in rows], any(row.draft for _, row in rows))
        batch, sampling = pack([row for _, row in rows], bucket, self.steps.table_pages)
        before = self.steps.nothing
        if self.flight:
            assert self.flight.sampled is not None, "a step is picked before the next one is launched"
            before = self.flight.sampled
        launched = time.perf_counter()
        step = self.steps.run[bucket]
        logits, self.pool = step.forward(self.params, self.pool, batch, before)
        (turn, first), alone = rows[0], len(rows) == 1
        chunk = (first.prefix, first.prefix + turn.count) if alone and turn.count > 1 else None
        flight, at = InFlightStep([], launched, chunk, UnsampledStep(step, logits, sampling)), 0
        for turn, _ in rows:
            sequence, prefills = turn.sequence, turn.sequence.pending > 1
            sequence.computed += turn.count
            samples = sequence.computed >= sequence.length
            sequence.flight = flight if samples else None
            flight.seats.append(SequenceOutput(sequence, at, turn.guesses, samples))
            at += 1 + len(turn.guesses)
            self.counters.draft_tokens += len(turn.guesses)
            if prefills:
                self.counters.prefilled_tokens += turn.count
                self.publish(sequence)
        if not any(seat.sequence.request.constraint for seat in flight.seats):
            self.pick(flight)
        return flight

    def pick(self, flight: InFlightStep) -> None:
        """Sample from the logits of a step whose sequences' tokens are all known, once.

        A sequence whose constraint cannot go on ends here.
        """
        if flight.unpicked is None:
            return
        unpicked, flight.unpicked = flight.unpicked, None
        masks = [mask for seat in flight.seats for mask in [self.mask(seat)] * (1 + len(seat.guesses))]
        sampling = replace(unpicked.sampling, mask=pack_masks(masks, len(unpicked.sampling.seeds)))
        flight.sampled = unpicked.step.pick(unpicked.logits, sampling)

    def mask(self, seat: SequenceOutput) -> np.ndarray | None:
        """The tokens that a sequence in a step may go on with, as `pack_masks` wants them."""
        sequence, constraint = seat.sequence, seat.sequence.request.constraint
        if constraint is None or not seat.samples or sequence.lease is None:
            return None
        try:
            return constraint.mask()
        except Exception as error:
            self.fail(sequence, error)
            return None

    def tell(self, sequence: Sequence, event: Event) -> None:
        """Send an event; a request whose caller cannot be told any more ends."""
        try:
            sequence.emit(event)
        except Exception as error:
            log.warning("request %d ends: its caller takes no events: %s", sequence.number, error)
            self.inbox.cancel(sequence.number)

    def land(self) -> bool:
        """Wait for the step in the air and take what it has sampled. False if there is none."""
        flight, self.flight = self.flight, None
        if flight is None:
            return False
        tokens = np.asarray(flight.sampled)
        now = time.perf_counter()
        if flight.chunk:
            # Until the step before had been read, the device may not have begun.
            self.prefilled(*flight.chunk, now - max(flight.launched, self.landed_at))
        self.device_s += now - max(flight.launched, self.landed_at)
        self.landed_at = now
        for seat in flight.seats:
            sequence = seat.sequence
            if sequence.lease is None:
                continue  # it has ended while the step was in the air
            if sequence.flight is flight:
                sequence.flight = None
            if seat.samples:
                self.take_all(sequence, tokens[seat.at : seat.at + 1 + len(seat.guesses)].tolist(), seat.guesses)
            if self.pager and sequence.lease:
                self.pager.save(sequence, self.pool)
        return True

    def take_all(self, sequence: Sequence, sampled: list[int], guesses: tuple[int, ...]) -> None:
        """Take the first sampled token, and the one behind each guess as long as the guesses were right."""
        self.take(sequence, sampled[0])
        for token, right, behind in zip(guesses, sampled, sampled[1:], strict=False):
            if token != right or sequence.lease is None:
                return
            self.counters.accepted_tokens += 1
            sequence.computed += 1
            self.take(sequence, behind)

    def row(self, turn: ScheduledSequence) -> SequenceInput:
        """A sequence's share of a step."""
        sequence = turn.sequence
        assert sequence.lease is not None
        if sequence.flight:
            new = np.asarray([-1 - sequence.flight.at(sequence)], np.int32)
        else:
            new = sequence.tokens[sequence.computed : sequence.computed + turn.count]
        if turn.guesses:
            new = np.concatenate([new, np.asarray(turn.guesses, np.int32)])
        return SequenceInput(new, sequence.computed, sequence.lease.pages, sequence.request.sampling, len(turn.guesses))

    def make_room(self, sequence: Sequence, length: int) -> bool:
        """Extend a sequence's lease to `length` tokens, preempting the youngest sequences where the pool is full.

        False if the sequence itself had to give way.
        """
        while sequence.lease is not None:
            try:
                sequence.lease, copies = self.store.extend(sequence.lease, length)
            except PoolExhausted:
                if self.land() or (self.pager and self.pager.drop_parked(self.store)):
                    continue
                self.preempt(max(self.running, key=lambda s: s.number))
                continue
            for copy in copies:
                self.copy_page(copy.source, copy.target)
            return True
        return False

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page of the pool to another, over all layers."""
        self.pool = self.steps.copy(self.pool, np.asarray([source], np.int32), np.asarray([target], np.int32))

    def compute(self, row: SequenceInput) -> np.ndarray:
        """Run a row alone, in a shape that is compiled anyway: the logits behind its last token, [vocab] float32."""
        bucket = smallest_bucket(self.buckets, [len(row.tokens)])
        batch, _ = pack([row], bucket, self.steps.table_pages)
        logits, self.pool = self.steps.run[bucket].forward(self.params, self.pool, batch, self.steps.nothing)
        last: np.ndarray = np.asarray(logits)[0]
        return last

    @property
    def quiet(self) -> bool:
        """Whether no request is in the engine, and no page of one waits to be saved."""
        return not (self.waiting or self.running or self.flight or (self.pager and self.pager.parked))

    def preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the queue; it resumes from what the store still has of it."""
        assert sequence.flight is None, "a token in the air has nowhere to land"
        assert len(self.running) > 1, "one sequence alone always fits: max_model_len is below the pool's size"
        log.info("request %d is preempted at %d tokens: the pool is full", sequence.number, sequence.length)
        self.counters.preemptions += 1
        self.retire(sequence)
        self.waiting.appendleft(sequence)

    def publish(self, sequence: Sequence) -> None:
        """Let other requests reuse what this one has computed so far."""
        assert sequence.lease is not None
        self.store.insert(sequence.lease, sequence.tokens[: sequence.computed])

    def retire(self, sequence: Sequence) -> None:
        """Leave what was computed in the store and give the pages back."""
        assert sequence.lease is not None
        # The pass that runs ahead computes one token more, of which nobody knows which it is until it was taken.
        sequence.computed = min(sequence.computed, sequence.length)
        # A lease that only matched holds nothing of its own to publish.
        if sequence.computed > sequence.lease.reused:
            self.publish(sequence)
        if self.pager:
            self.pager.forget(sequence)
            self.pager.retire(sequence, self.pool, self.store)
        else:
            self.store.release(sequence.lease)
        sequence.lease, sequence.flight, sequence.computed = None, None, 0
        self.running.remove(sequence)
        self.full = False

    def take(self, sequence: Sequence, token: int) -> None:
        """Append a sampled token, tell the client, and retire the sequence if it was the last one."""
        if sequence.request.constraint:
            try:
                sequence.request.constraint.accept(token)
            except Exception as error:
                self.fail(sequence, error)
                return
        if sequence.sampled == 0:
            now, prompt = time.perf_counter(), sequence.length
            sequence.answered = now
            self.counters.requests += 1
            self.counters.prompt_tokens += prompt
            self.counters.reused_tokens += sequence.reused
            if self.idle_work:
                self.idle_work.reused(sequence, token)
            self.tell(
                sequence,
                Started(
                    prompt,
                    sequence.reused,
                    sequence.started - sequence.submitted,
                    now - sequence.started,
                    dict(sequence.restored),
                ),
            )
        sequence.tokens[sequence.length] = token
        sequence.length += 1
        sequence.sampled += 1
        self.counters.generated_tokens += 1
        stopped = token in sequence.request.stop_ids
        if not stopped:
            self.tell(sequence, TokenEvent(token))
        if stopped or sequence.length == len(sequence.tokens):
            self.answer_s += ANSWER_SHARE * (time.perf_counter() - sequence.answered - self.answer_s)
            self.retire(sequence)
            self.tell(sequence, Finished("stop" if stopped else "length"))

    def fail(self, sequence: Sequence, error: Exception) -> None:
        """End one request whose constraint cannot go on."""
        log.warning("request %d ends with an error: %s: %s", sequence.number, type(error).__name__, error)
        self.retire(sequence)
        self.counters.failures += 1
        self.tell(sequence, Failed(f"{type(error).__name__}: {error}"))

    def recover(self, message: str) -> None:
        """After a step that raised: fail what was running, and start from an empty pool if the step took it along."""
        failed, self.running, self.flight, self.full = self.running, [], None, False
        self.counters.failures += len(failed)
        for sequence in failed:
            if sequence.lease is not None:
                self.store.release(sequence.lease)
                sequence.lease = None
            if self.pager:
                self.pager.forget(sequence)
            self.tell(sequence, Failed(message))
        self.check_pool()

    def check_pool(self) -> None:
        """Start from an empty pool if the last step took it along."""
        if not usable(self.pool):
            for lost in jax.tree.leaves(self.pool):
                lost.delete()  # there may be no room for two
            self.pool = self.fresh_pool()
            self.store = PrefixCache(self.settings.num_pages, self.settings.page_size, self.fingerprint)
            if self.pager:
                self.pager.parked.clear()

    def fresh_pool(self) -> KVPool:
        """An empty device pool of the configured size."""
        settings = self.settings
        pages = settings.num_pages + settings.audit_pages
        return empty_pool(self.config, pages, settings.page_size, jax.numpy.dtype(settings.dtype))


def usable(pool: KVPool) -> bool:
    """Whether the pool outlived the last step: neither donated and lost, nor the result of a step that failed."""
    try:
        jax.block_until_ready(pool)
    except RuntimeError:
        return False
    return True


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
                event = Waiting()
            yield event
            if isinstance(event, Finished | Failed):
                return
    finally:
        engine.cancel(number)
