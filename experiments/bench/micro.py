"""The steps of a request's host path, each timed by itself: `make bench-small`.

Not part of the tests: nothing here fails for being slow. `experiments.bench.host_path` times such steps in a row.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.keys import page_keys, root_key
from cache.prefix_cache import PrefixCache
from experiments.bench.host_path import session_of
from experiments.harness.provenance import PACKAGES, provenance
from experiments.harness.report import write_json
from experiments.workloads.demo_model import TINY, write_demo_model
from experiments.workloads.sessions import with_question
from serve.api.answers import ContentBlockDelta, TextDelta, encode_event
from serve.api.messages import MessagesRequest, decode_request
from serve.engine.buckets import GREEDY, Bucket, SequenceInput, pack
from serve.prompt.render import prompt
from serve.prompt.tokenizer import Tokenizer, load_tokenizer
from serve.rules.normalize import normalize

RESULTS = Path("experiments/results/bench/micro.json")
PAGE = 64  # tokens
TOKENS = 52_000
RULES = frozenset(["strip-preamble"])
Time = Any  # pytest-benchmark's fixture, which has no types


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, dict[str, float]]]:
    """The times by name; written at the end."""
    found: dict[str, dict[str, float]] = {}
    yield found
    made = {"unit": "us", "rows": found} | provenance((*PACKAGES, "pytest-benchmark"))
    write_json(RESULTS, made)


@pytest.fixture(autouse=True)
def recorded(request: pytest.FixtureRequest, benchmark: Any, results: dict[str, dict[str, float]]) -> Iterator[None]:
    """Keep a test's times; a failed one has none."""
    yield
    if benchmark.stats:
        stats = benchmark.stats.stats
        times = {name: round(1e6 * getattr(stats, name), 2) for name in ("min", "median", "iqr")}
        results[request.node.name.removeprefix("test_")] = times | {"rounds": stats.rounds}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The demo's tokenizer, which caches the segments that it has seen."""
    folder = tmp_path_factory.mktemp("model")
    write_demo_model(folder, config=TINY)
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def asked() -> Callable[[], bytes]:
    """A session's request of some 52K tokens, with another question at its end every time."""
    body, numbers = session_of(TOKENS) | {"max_tokens": 8}, itertools.count()
    return lambda: json.dumps(with_question(body, next(numbers))).encode()


def ids(tokens: int) -> np.ndarray:
    """Random token ids, [tokens] int32."""
    return np.random.default_rng(0).integers(0, 128_256, tokens, dtype=np.int32)


def with_fresh(benchmark: Time, function: Callable[[Any], Any], argument: Callable[[], Any], rounds: int = 100) -> Any:
    """Time the function on a fresh argument in every round."""
    return benchmark.pedantic(function, setup=lambda: ((argument(),), {}), rounds=rounds, warmup_rounds=5)


def test_decode_a_body_of_52k_tokens(benchmark: Time, asked: Callable[[], bytes]) -> None:
    """JSON to a checked request."""
    assert with_fresh(benchmark, decode_request, asked).messages


def test_normalize_52k_tokens(benchmark: Time, asked: Callable[[], bytes]) -> None:
    """Strip the billing header from the system text."""
    made = with_fresh(benchmark, lambda request: normalize(request, RULES), lambda: decode_request(asked()))
    assert made.applied


def test_render_and_tokenise_a_new_question_after_52k_tokens(
    benchmark: Time, tokenizer: Tokenizer, asked: Callable[[], bytes]
) -> None:
    """Everything except the question was seen before."""

    def request() -> MessagesRequest:
        return normalize(decode_request(asked()), RULES).request

    assert len(with_fresh(benchmark, lambda r: prompt(r, tokenizer), request).tokens) > TOKENS / 2


def test_hash_the_pages_of_52k_tokens(benchmark: Time) -> None:
    """The chain of keys, page by page."""
    keys = benchmark(page_keys, root_key(b"model", PAGE, b""), ids(TOKENS), PAGE)
    assert len(keys) == TOKENS // PAGE


def test_match_and_release_52k_tokens(benchmark: Time) -> None:
    """A full hit in a cache that holds only this; `experiments.bench.index` fills one to a million pages."""
    store, tokens = PrefixCache(2 * TOKENS // PAGE, PAGE), ids(TOKENS)
    lease, _ = store.extend(store.match(tokens), TOKENS)
    store.insert(lease, tokens)
    store.release(lease)

    def match() -> int:
        lease = store.match(tokens)
        store.release(lease)
        return lease.reused

    assert benchmark(match) == TOKENS


def test_pack_a_batch_of_8_that_decode_after_52k_tokens(benchmark: Time) -> None:
    """The engine's work on the host between two steps."""
    pages = np.arange(TOKENS // PAGE + 1, dtype=np.int32)
    rows = [SequenceInput(ids(1), TOKENS, pages, GREEDY) for _ in range(8)]
    batch, _ = benchmark(pack, rows, Bucket(8, 1), len(pages))
    assert batch.block_table.shape == (8, len(pages))


def test_encode_a_streamed_event(benchmark: Time) -> None:
    """One token's text as a server-sent event."""
    event = ContentBlockDelta(0, TextDelta(" token"))
    assert benchmark(encode_event, event).endswith(b"\n\n")
