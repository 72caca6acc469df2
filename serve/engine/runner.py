"""Steps on the device: from scheduled sequences to a packed batch, its forward pass, its sampling, and its tokens.

While the host reads the tokens of one step, the next one runs: it takes tokens that the host has not read from the
device. The runner reads sequences and never writes to them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from model.params import Params
from model.sampling import Sampling
from serve.cost.steps import Step, StepTracker
from serve.engine.buckets import Bucket, SequenceInput, find_bucket, pack, pack_masks, smallest_bucket
from serve.engine.memory import Memory
from serve.engine.scheduler import ScheduledSequence, narrowed
from serve.engine.sequence import Sequence as RunningSequence
from serve.engine.steps import CompiledStep, Steps


@dataclass(frozen=True)
class SequenceOutput:
    """A sequence's share of a step in flight."""

    sequence: RunningSequence
    index: int  # of its first token, among those that the step samples
    count: int  # known tokens that it ran
    draft_tokens: tuple[int, ...]  # that it ran after these
    accepts: bool  # whether these were all known tokens, so that the first sampled token is its next one

    @property
    def num_samples(self) -> int:
        """How many tokens the step samples for it."""
        return 1 + len(self.draft_tokens)


@dataclass(frozen=True, eq=False)
class UnsampledStep:
    """The result of a step's forward pass, before its tokens are sampled."""

    step: CompiledStep
    logits: jax.Array  # [samples, vocab] float32
    sampling: Sampling  # without masks


@dataclass(eq=False)
class InFlightStep:
    """A step that was dispatched and not collected."""

    number: int
    outputs: list[SequenceOutput]
    dispatched_at: float  # seconds, `time.perf_counter`
    chunk: tuple[int, int] | None  # tokens [start, stop) of a prompt, if the step has some
    size: Step
    unsampled: UnsampledStep | None  # until it is sampled
    sampled: jax.Array | None = None  # [samples of the largest shape] int32, from then on


class Runner:
    """Runs the compiled steps over the pool of one engine's memory."""

    def __init__(self, params: Params, steps: Steps, memory: Memory) -> None:
        self.params, self.steps, self.memory = params, steps, memory
        self.buckets = list(steps.by_bucket)
        self.dispatched = 0  # steps
        self.collected_at = 0.0  # when the latest step had been read, seconds, `time.perf_counter`
        self.device_s = 0.0  # seconds that the device took for all steps
        self.tracker = StepTracker()

    def dispatch(self, scheduled: Sequence[ScheduledSequence], before: InFlightStep | None) -> InFlightStep:
        """Start the forward pass of a step for sequences whose leases have room for it; nothing is sampled yet.

        `before` is the step in flight, which must be sampled: it may sample tokens that this step runs.
        """
        inputs = [sequence_input(each) for each in scheduled]
        bucket = self.choose(*shape_of(scheduled))
        batch, sampling = pack(inputs, bucket, self.steps.table_pages)
        tokens_before = self.steps.nothing
        if before:
            assert before.sampled is not None, "a step is sampled before the next one is dispatched"
            tokens_before = before.sampled
        now, step = time.perf_counter(), self.steps.run[bucket]
        logits, self.memory.pool = step.forward(self.params, self.memory.pool, batch, tokens_before)
        outputs, index = list[SequenceOutput](), 0
        for each in scheduled:
            accepts = each.count >= each.sequence.pending
            outputs.append(SequenceOutput(each.sequence, index, each.count, each.draft_tokens, accepts))
            index += outputs[-1].num_samples
        first, count = inputs[0].prefix, scheduled[0].count
        chunk = (first, first + count) if count > 1 else None
        size = Step(bucket.tokens, first, sum(each.prefix for each in inputs[1:]))
        self.dispatched += 1
        return InFlightStep(self.dispatched, outputs, now, chunk, size, UnsampledStep(step, logits, sampling))

    def narrowed(self, plan: list[ScheduledSequence], chunk_was_last: bool) -> list[ScheduledSequence]:
        """A plan, or the part of it that has a compiled shape, see serve.engine.scheduler."""
        return narrowed(plan, self.runs_at_once, chunk_was_last)

    def runs_at_once(self, scheduled: Sequence[ScheduledSequence]) -> bool:
        """Whether a shape that is compiled has room; the smallest shape that has is compiled next."""
        counts, drafts = shape_of(scheduled)
        wanted = find_bucket(self.steps.usable(), counts, drafts)
        ready = find_bucket(self.steps.ready(), counts, drafts)
        if wanted and wanted != ready:
            self.steps.need(wanted)
        return ready is not None

    def choose(self, counts: Sequence[int], drafts: bool = False) -> Bucket:
        """The smallest compiled shape that has room, or else the smallest to wait for."""
        return find_bucket(self.steps.ready(), counts, drafts) or smallest_bucket(self.buckets, counts, drafts)

    def sample(self, step: InFlightStep, mask: Callable[[RunningSequence], np.ndarray | None]) -> None:
        """Start the sampling of a step, unless that was done; `mask` returns a sequence's mask, see `pack_masks`."""
        if step.unsampled is None:
            return
        unsampled, step.unsampled = step.unsampled, None
        masks = [each for output in step.outputs for each in [mask(output.sequence)] * output.num_samples]
        sampling = replace(unsampled.sampling, mask=pack_masks(masks, len(unsampled.sampling.seeds)))
        step.sampled = unsampled.step.sample(unsampled.logits, sampling)

    def collect(self, step: InFlightStep) -> tuple[np.ndarray, float]:
        """Wait for the tokens that a step samples. Returns them, [samples] int32, and the seconds the device took."""
        tokens = np.asarray(step.sampled)
        now = time.perf_counter()
        # The device may not have begun before the step before was read.
        seconds = now - max(step.dispatched_at, self.collected_at)
        self.device_s += seconds
        self.collected_at = now
        self.tracker.ran(replace(step.size, seconds=seconds))
        return tokens, seconds

    def compute(self, row: SequenceInput) -> np.ndarray:
        """Run one sequence input alone, in a compiled shape: the logits after its last token, [vocab] float32."""
        bucket = self.choose([len(row.tokens)])
        batch, _ = pack([row], bucket, self.steps.table_pages)
        forward = self.steps.run[bucket].forward
        logits, self.memory.pool = forward(self.params, self.memory.pool, batch, self.steps.nothing)
        last: np.ndarray = np.asarray(logits)[0]
        return last


def shape_of(scheduled: Sequence[ScheduledSequence]) -> tuple[list[int], bool]:
    """New tokens of each scheduled sequence, its draft included, and whether any has a draft."""
    counts = [each.count + len(each.draft_tokens) for each in scheduled]
    return counts, any(each.draft_tokens for each in scheduled)


def sequence_input(scheduled: ScheduledSequence) -> SequenceInput:
    """What a step runs for a scheduled sequence: its next known tokens, or the one in flight, and its draft."""
    sequence = scheduled.sequence
    assert sequence.lease is not None
    if sequence.in_flight:
        new = np.asarray([-1 - sequence.in_flight.offset], np.int32)
    else:
        new = sequence.tokens[sequence.computed : sequence.computed + scheduled.count]
    if scheduled.draft_tokens:
        new = np.concatenate([new, np.asarray(scheduled.draft_tokens, np.int32)])
    draft = len(scheduled.draft_tokens)
    return SequenceInput(new, sequence.computed, sequence.lease.pages, sequence.request.sampling, draft)
