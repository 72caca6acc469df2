"""A tiny model in an engine: how the engine's tests ask it, and what the answer is without any cache."""

import queue
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from cache.tiers import Tiers
from model.batch import Batch
from model.decoder import forward
from model.kv import empty_pool
from serve.cost.model import CostModel, Rate
from serve.engine.request import GenerationRequest, Started, TokenEvent
from serve.engine.settings import EngineSettings

VOCAB, PAGE = 128, 8
SMALL = EngineSettings(
    num_pages=96, max_model_len=320, page_size=PAGE, max_num_seqs=4, max_prefill_tokens=32, max_mixed_prefill_tokens=16
)
# Room for one sequence of `max_model_len`. The rest of the pool lies idle, so that what is compiled for SMALL fits.
CRAMPED = replace(SMALL, num_pages=41, audit_pages=SMALL.num_pages - 41)

one_shot = jax.jit(forward, static_argnames="config")


def submit(engine, tokens, max_tokens=8, **options):
    """A queue on which the request's events arrive, and the request's number."""
    events = queue.Queue()
    request = GenerationRequest(np.asarray(tokens, np.int32), max_tokens, **options)
    return events, engine.submit(request, events.put)


def outcome(events):
    """(tokens, Started, last event) of a request, once it has ended."""
    tokens, started = [], None
    while True:
        event = events.get(timeout=60)
        if isinstance(event, Started):
            started = event
        elif isinstance(event, TokenEvent):
            tokens.append(event.token)
        else:
            return tokens, started, event


def generate(engine, tokens, max_tokens=8, **options):
    return outcome(submit(engine, tokens, max_tokens, **options)[0])


def logits_of(model, tokens):
    """Logits [vocab] after `tokens`, computed in one shot with no store and no engine."""
    config, params = model
    size, pages = SMALL.max_model_len, SMALL.max_model_len // PAGE
    batch = Batch(
        tokens=np.pad(np.asarray(tokens, np.int32), (0, size - len(tokens))),
        starts=np.asarray([0, len(tokens)], np.int32),
        prefix=np.zeros(1, np.int32),
        block_table=np.arange(pages, dtype=np.int32)[None],
        logit_indices=np.asarray([len(tokens) - 1], np.int32),
        max_chunk=size,
    )
    return np.asarray(one_shot(params, batch, empty_pool(config, pages, PAGE, jnp.float32), config)[0])[0]


def reference(model, tokens, count, known):
    """Greedy output with the cache off, remembered by prompt."""
    key = tuple(tokens)
    output = known.setdefault(key, [])
    while len(output) < count:
        output.append(int(np.argmax(logits_of(model, [*tokens, *output]))))
    return output[:count]


def assert_same_or_tied(model, prompt, actual, expected, flips):
    """Equal token for token, or first different where the two best logits lie within 1e-4 of their scale."""
    if actual == expected:
        return
    at = next(i for i, pair in enumerate(zip(actual, expected, strict=True)) if pair[0] != pair[1])
    logits = logits_of(model, [*prompt, *expected[:at]])
    assert logits[expected[at]] - logits[actual[at]] <= 1e-4 * np.abs(logits).max(), f"token {at} differs"
    flips.append((len(prompt), at))


def tiers_of(folder, host=0, **options):
    return Tiers(str(folder) if folder else None, 64 << 20, host, **({"flush_seconds": 0.05} | options))


class Always(CostModel):
    """Restores whatever is there, and is not corrected by measurements."""

    def worth_restoring(self, tier, start, stop, size):
        return True

    def prefilled(self, start, stop, seconds, decoding=0):
        return self

    def was_read(self, tier, size, seconds):
        return self


# A token takes a second to compute.
ALWAYS = Always(1.0, 0.0, Rate(1.0))


def prompt(seed, length=200):
    return np.random.default_rng(seed).integers(3, VOCAB, length).astype(np.int32)


def tick(engine):
    """One turn of the loop of an engine that was not started; False where it has nothing to do."""
    if not engine.core.unfinished and not engine.inbox.submissions and not engine.inbox.cancellations:
        return False
    if engine.core.idle:
        time.sleep(0.002)
        engine.core.idle = False
    engine.core.cancel(engine.receive())
    engine.core.step()
    return True
