"""The engine's core: sequences that wait and run, and one turn of the step loop. Only the engine's thread calls it.

One turn, `EngineCore.step`:

    admit        waiting sequences, while the pool has pages for their prompts        scheduler, memory
    restore      copy in what the tiers brought, read ahead for those next in line    restorer
    plan         all that decode, and one chunk of a sequence that prefills           scheduler
    dispatch     make room, run the model over the plan's tokens, publish the chunk   memory, runner
    collect      read the tokens of the step dispatched the turn before, emit them    runner
    sample       start the sampling of this turn's step                               runner
    save         what was filled, queued for the tiers as each step is collected      saver

A step without constraints is sampled as it is dispatched. A constrained one is sampled only after `collect`, since what
may come next depends on what came; its forward pass does not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from cache.prefix_cache import PrefixCache
from cache.tiers import Tiers
from model.config import ModelConfig
from model.kv import empty_pool
from model.kv_rows import pool_dtype
from model.params import Params
from model.sharding import make_mesh, pool_sharding
from serve.cost.model import Constants, CostTracker, cost_model
from serve.engine.counters import Counters
from serve.engine.fairness import Queue, Shares, gives_way, line_of, make_place
from serve.engine.inbox import Inbox
from serve.engine.memory import Memory
from serve.engine.page_copies import make_page_copies
from serve.engine.page_names import PageNames
from serve.engine.preload import Preloader
from serve.engine.programs import COPIES_RANK, user_programs
from serve.engine.request import Event, Failed, Finished, Started, TokenEvent
from serve.engine.restore import Restorer
from serve.engine.retaining import Retainer
from serve.engine.runner import InFlightStep, Runner, SequenceOutput
from serve.engine.saving import Saver
from serve.engine.scheduler import ScheduledSequence, admission_order, fits, plan_step
from serve.engine.sequence import DECODING, ENDED, WAITING, InFlightToken, Sequence, SequenceState
from serve.engine.settings import EngineSettings
from serve.engine.steps import make_steps, warm_up

log = logging.getLogger("tokenzero.engine")

RESTORED_WHILE_WAITING = 2  # of the waiting requests, those whose pages are read ahead
ANSWER_WEIGHT = 0.1  # of the latest answer in the moving mean of the time that answers take


class EngineCore:
    """The model, its memory, and the sequences that use them.

    A sequence is in `waiting`, in `running`, or ended. What it has computed stays in the prefix cache, also when it is
    preempted or cancelled.
    """

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        settings: EngineSettings,
        fingerprint: bytes,
        tiers: Tiers | None,
        inbox: Inbox,
        on_progress: Callable[[int, int], None],
        costs: Constants | None,
    ) -> None:
        self.settings, self.inbox = settings, inbox
        self.programs = user_programs(make_mesh(config, settings.tensor_parallel))

        pages, dtype = settings.num_pages + settings.audit_pages, pool_dtype(settings.page_dtype)
        place = pool_sharding(config, self.programs.mesh)
        new_pool = partial(empty_pool, config, pages, settings.page_size, dtype, place)
        names = PageNames(fingerprint, settings.page_size)
        self.retainer = Retainer(settings, names, lambda: self.memory.prefix_cache, inbox.wake)
        kept = self.retainer.retentions.resumed
        new_cache = partial(PrefixCache, settings.num_pages, settings.page_size, fingerprint, kept=kept)
        pool = new_pool()
        self.programs.busy = lambda: bool(self.running or self.waiting)
        steps = make_steps(self.programs, params, pool, config, settings)
        copies = make_page_copies(self.programs, pool, COPIES_RANK) if tiers else None
        self.programs.compile(steps.base() if settings.compile_in_background else self.programs.all, on_progress)
        pool, warmed_up, seconds = warm_up(steps, params, pool, settings.max_model_len)
        self.costs = CostTracker(cost_model(config, costs))
        self.costs.prefilled(*warmed_up, seconds)
        self.memory = Memory(pool, new_pool, steps.copy, new_cache)
        self.runner = Runner(params, steps, self.memory)
        self.tiers, self.restorer, self.preloader, self.saver = tiers, None, None, None
        if tiers and copies:
            self.restorer = Restorer(tiers, copies, names, self.costs, inbox.wake, settings.restore_bytes)
            self.preloader = Preloader(self.restorer, self.memory, inbox.wake, settings.preload_bytes, list(kept))
            self.saver = Saver(tiers.writer, self.memory, copies, names)
        self.waiting, self.running = Queue(), list[Sequence]()
        self.in_flight: InFlightStep | None = None
        self.answer_s = 0.0  # seconds from an answer's first token to its last: a moving mean
        self.chunk_was_last = False  # whether the latest step ran a part of a prompt
        self.full: str | None = None  # the line whose next request has no room until a running one has ended
        self.idle = False  # the last step found nothing to do, because all sequences wait for the tiers
        self.counters, self.shares = Counters(), Shares()
        self.on_first_token: Callable[[Sequence, int], None] = lambda sequence, token: None

    @property
    def unfinished(self) -> bool:
        """Whether any request is in the engine, or any page of one waits to be saved."""
        return bool(self.waiting or self.running or (self.saver and self.saver.pending_writes))

    @property
    def quiet(self) -> bool:
        """Whether nothing is left to do, and no step is in flight."""
        return not self.unfinished and self.in_flight is None

    # One turn.

    def step(self) -> None:
        """One turn of the loop, see the top of this file."""
        collected_at = self.runner.collected_at
        if self.settings.speculative_tokens:
            self.collect()  # the draft that comes next depends on what came
        self.retainer.step()
        self.admit()
        restored = self.restore()
        dispatched = self.dispatch(self.plan())
        self.collect()
        if dispatched:
            self.runner.sample(dispatched, self.mask)
        self.in_flight = dispatched
        if dispatched and not any(output.sequence.in_flight for output in dispatched.outputs):
            self.collect()  # no client waits for its tokens, and a request that comes now waits for one chunk at most
        self.idle = not (dispatched or restored or self.runner.collected_at > collected_at)
        self.counters.steps += 1

    def admit(self) -> None:
        """Move waiting sequences to the running ones while there is room for their prompts."""
        while self.waiting and make_place(self.running, self.waiting, self.is_full, self.collect, self.preempt):
            sequence, others = self.in_line()[0], list(self.running)
            self.waiting.remove(sequence)
            # Counted as running before anything can raise: a request that breaks a step must not be tried again.
            self.running.append(sequence)
            lease = self.memory.match(sequence)
            if fits(sequence.length - lease.reused, others, self.memory.free_tokens):
                sequence.admit(lease, time.perf_counter())
                self.waiting.admitted(sequence)
                continue
            self.memory.release(lease)
            self.running.remove(sequence)
            self.waiting.put_back(sequence)
            self.full = line_of(sequence)

    def is_full(self) -> bool:
        """Whether the batch has no place, or the pool no room, for the next request."""
        return len(self.running) >= self.settings.max_num_seqs or self.full == self.waiting.next_owner(self.running)

    def in_line(self) -> list[Sequence]:
        """The next few requests to admit, in this order."""

        def takes_s(sequence: Sequence) -> float:
            return self.costs.model.prefill_s(self.memory.cached_tokens(sequence), sequence.length) + self.answer_s

        return admission_order(self.waiting.next_line(self.running), time.perf_counter(), takes_s)

    def restore(self) -> bool:
        """Copy in what the tiers have brought, and read ahead, also for those next in line. Whether anything came."""
        if self.restorer is None or self.preloader is None or self.saver is None:
            return False
        came = [s for s in list(self.running) if self.preloader.restore(s, self.make_room)]
        for sequence in self.running:
            if sequence.state is not DECODING:
                sequence.wait_for_pages(self.restorer.waits(sequence))
        for sequence in self.in_line()[:RESTORED_WHILE_WAITING]:
            if not self.restorer.looked_up(sequence):
                # Without a lease: it may wait for long, and others need the pages.
                self.restorer.look_up(sequence, self.memory.cached_tokens(sequence))
            self.restorer.read_ahead(sequence)
        if self.saver.save_pending():
            self.full = None
        return bool(came)

    def plan(self) -> list[ScheduledSequence]:
        """Who runs in the next step, and what."""
        decoding = [s for s in self.running if s.decodes]
        now, prefill_s = time.perf_counter(), self.costs.model.prefill_s
        prefill, tokens_before_page = self.shares.next_prefill(self.running, now, prefill_s), 0
        if prefill:
            self.memory.refresh_match(prefill)
            tokens_before_page = self.restorer.tokens_before_page(prefill) if self.restorer else 0
        whole = plan_step(decoding, prefill, tokens_before_page, self.settings)
        plan = self.runner.narrowed(whole, self.chunk_was_last)
        self.chunk_was_last = prefill is not None and plan[0].sequence is prefill
        return self.shares.noted(plan)

    def dispatch(self, plan: list[ScheduledSequence]) -> InFlightStep | None:
        """Start the step that a plan asks for; None if there is nothing to run."""
        roomy = [t for t in plan if self.make_room(t.sequence, t.sequence.computed + t.count + len(t.draft_tokens))]
        # A later one may have preempted an earlier one.
        scheduled = [t for t in roomy if t.sequence.lease is not None]
        if not scheduled:
            return None
        step = self.runner.dispatch(scheduled, self.in_flight)
        for output in step.outputs:
            sequence, prefills = output.sequence, output.sequence.pending > 1
            sequence.dispatch(output.count, InFlightToken(step.number, output.index))
            self.counters.draft_tokens += len(output.draft_tokens)
            if prefills:
                self.counters.prefilled_tokens += output.count
                self.memory.publish(sequence)
        if not any(output.sequence.request.constraint for output in step.outputs):
            self.runner.sample(step, self.mask)
        return step

    def mask(self, sequence: Sequence) -> np.ndarray | None:
        """The tokens that a sequence in a step may go on with, see `pack_masks`; fails it where it cannot go on."""
        constraint = sequence.request.constraint
        if constraint is None or sequence.in_flight is None:
            return None
        try:
            return constraint.mask()
        except Exception as error:
            self.fail(sequence, error)
            return None

    def collect(self) -> bool:
        """Wait for the step in flight, and accept the tokens that it samples. False if there is none."""
        step, self.in_flight = self.in_flight, None
        if step is None:
            return False
        tokens, seconds = self.runner.collect(step)
        if step.chunk:
            self.costs.prefilled(*step.chunk, seconds, decoding=len(step.outputs) - 1)
        for output in step.outputs:
            sequence = output.sequence
            if sequence.lease is None:
                continue  # it has ended while the step was in flight
            sampled = tokens[output.index : output.index + output.num_samples].tolist()
            sequence.collect(step.number)
            if output.accepts:
                self.accept_tokens(output, sampled)
            if self.saver and sequence.lease:
                self.saver.save(sequence)
        return True

    def accept_tokens(self, output: SequenceOutput, sampled: list[int]) -> None:
        """Accept the first sampled token, and the one after each draft token for as long as the draft was right."""
        sequence = output.sequence
        self.accept_token(sequence, sampled[0])
        for drafted, right, following in zip(output.draft_tokens, sampled, sampled[1:], strict=False):
            if drafted != right or sequence.lease is None:
                return
            self.counters.accepted_tokens += 1
            sequence.accept_draft()
            self.accept_token(sequence, following)

    def accept_token(self, sequence: Sequence, token: int) -> None:
        """Append a sampled token, send it to the client, and finish the sequence if it was the last one."""
        if sequence.request.constraint:
            try:
                sequence.request.constraint.accept(token)
            except Exception as error:
                self.fail(sequence, error)
                return
        if sequence.sampled == 0:
            self.start_answer(sequence, token)
        if not sequence.remaining_tokens:  # only the prompt was wanted
            self.finish(sequence, "length")
            return
        sequence.accept_token(token)
        self.counters.generated_tokens += 1
        stopped = token in sequence.request.stop_ids
        if not stopped:
            self.emit(sequence, TokenEvent(token))
        if stopped or not sequence.remaining_tokens:
            self.answer_s += ANSWER_WEIGHT * (time.perf_counter() - sequence.answered - self.answer_s)
            self.finish(sequence, "stop" if stopped else "length")

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence that has all its tokens, and send its last event."""
        self.release(sequence, ENDED)
        self.emit(sequence, Finished(reason))

    def start_answer(self, sequence: Sequence, token: int) -> None:
        """Count a prompt that is computed, and send the event that comes before its first token."""
        now, prompt = time.perf_counter(), sequence.length
        sequence.start_answer(now)
        self.counters.started(prompt, sequence.reused)
        self.on_first_token(sequence, token)
        queued_s, prefill_s = sequence.started - sequence.submitted, now - sequence.started
        kept, restored, reused = self.retainer.started(sequence), dict(sequence.restored), sequence.reused
        self.emit(sequence, Started(prompt, reused, queued_s, prefill_s, restored, sequence.forecast, kept))

    def emit(self, sequence: Sequence, event: Event) -> None:
        """Send an event; a request whose client takes no more events is cancelled."""
        try:
            sequence.emit(event)
        except Exception as error:
            log.warning("request %d ends: its caller takes no events: %s", sequence.number, error)
            self.inbox.cancel(sequence.number)

    # Giving pages back.

    def make_room(self, sequence: Sequence, length: int) -> bool:
        """Extend a sequence's lease to `length` tokens; False if the sequence itself had to give way, or ended."""
        return self.memory.make_room(sequence, length, self.reclaim)

    def reclaim(self) -> None:
        """Free some pages of a full pool: collect the step in flight, drop pages that wait to be saved, or preempt.

        A sequence that runs alone takes what is retained.
        """
        if self.collect() or (self.saver and self.saver.drop_oldest()):
            return
        if len(self.running) > 1 or not self.retainer.retentions.give_up():
            self.preempt(gives_way(self.running))

    def preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the queue; it resumes from what the prefix cache still has of it."""
        assert len(self.running) > 1, "one sequence alone always fits: max_model_len is below the pool's size"
        log.info("request %d gives way at %d tokens", sequence.number, sequence.length)
        self.counters.preemptions += 1
        self.release(sequence, WAITING)
        self.waiting.put_back(sequence)

    def release(self, sequence: Sequence, state: SequenceState) -> None:
        """Publish what a running sequence has computed, save it, and give its pages back."""
        self.memory.publish_last(sequence)
        if self.restorer:
            self.restorer.cancel(sequence)
        if self.saver:
            pages = self.saver.last_pages(sequence)
            self.saver.finish(sequence.leave(state), pages)
        else:
            self.memory.release(sequence.leave(state))
        self.running.remove(sequence)
        self.full = None

    def cancel(self, numbers: set[int]) -> None:
        """End the requests with these numbers, without an event."""
        if not numbers:
            return
        for sequence in [s for s in self.waiting if s.number in numbers]:
            self.waiting.remove(sequence)
            self.full = None
            sequence.end()
            if self.restorer:
                self.restorer.cancel(sequence)
        for sequence in [s for s in self.running if s.number in numbers]:
            self.release(sequence, ENDED)

    def fail(self, sequence: Sequence, error: Exception) -> None:
        """End one request whose constraint cannot go on."""
        log.warning("request %d ends with an error: %s: %s", sequence.number, type(error).__name__, error)
        self.release(sequence, ENDED)
        self.counters.failures += 1
        self.emit(sequence, Failed(f"{type(error).__name__}: {error}"))

    def recover(self, message: str) -> None:
        """After a step that raised: fail what was running, and start from an empty pool if the step lost it."""
        failed, self.running, self.in_flight, self.full = self.running, [], None, None
        self.counters.failures += len(failed)
        for sequence in failed:
            if sequence.lease is not None:
                self.memory.release(sequence.leave(ENDED))
            sequence.end()
            if self.restorer:
                self.restorer.cancel(sequence)
            self.emit(sequence, Failed(message))
        self.check_pool()

    def check_pool(self) -> None:
        """Start from an empty pool and an empty prefix cache if the last step lost the pool."""
        if self.memory.replace_if_lost():
            self.retainer.retentions.cleared()
            if self.saver:
                self.saver.pending_writes.clear()  # their leases are of the cache that is gone

    def stop(self, late: list[Sequence]) -> None:
        """Fail all that runs and waits, and `late` submissions; then write what has been computed."""
        for sequence in [*self.running, *self.waiting, *late]:
            try:
                if sequence.lease is not None:
                    self.release(sequence, ENDED)
                sequence.end()
            except Exception:  # the others have to get their last event, too
                log.exception("request %d leaves nothing in the prefix cache", sequence.number)
            self.emit(sequence, Failed("the engine has stopped", temporary=True))
        self.retainer.close(self.settings.stop_seconds / 4)
        if self.saver:
            self.saver.drain(self.settings.stop_seconds / 2)
