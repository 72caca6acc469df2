"""Our logits against transformers' in float32: every family, every chunking, decode, and prompts on a reused prefix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from model import checkpoint
from model.batch import Batch
from model.decoder import forward
from model.kernels.dispatch import arranged
from model.kv import copy_pages, empty_pool

PAGE = 16
LENGTH = 150
BUCKETS = (1, 8, 64, 192, 1024)


@functools.cache
def compiled(folder, stacked):
    """A checkpoint with its jitted forward pass, shared by the tests so that each shape compiles once."""
    config, params = checkpoint.load(folder, "float32")
    step = jax.jit(lambda p, b, pool: forward(p, b, pool, config), donate_argnums=2)
    return config, params if stacked else arranged(params, PAGE), step


class Runner:
    """One sequence fed to our forward pass piece by piece, each piece padded to a bucket as the engine pads it."""

    def __init__(self, folder, num_pages=256, stacked=False):
        self.config, self.params, self.forward = compiled(folder, stacked)
        self.pool = empty_pool(self.config, num_pages, PAGE, jnp.float32)

    def run(self, tokens, prefix, pages):
        """Logits [tokens, vocab] of new tokens behind a prefix."""
        count = len(tokens)
        bucket = min(b for b in BUCKETS if b >= count)
        batch = Batch(
            tokens=np.pad(tokens, (0, bucket - count)).astype(np.int32),
            starts=np.asarray([0, count], np.int32),
            prefix=np.asarray([prefix], np.int32),
            block_table=np.asarray(pages, np.int32)[None],
            logit_indices=np.arange(bucket, dtype=np.int32),
            max_chunk=bucket,
        )
        logits, self.pool = self.forward(self.params, batch, self.pool)
        return np.asarray(logits)[:count]

    def in_chunks(self, tokens, size, pages, prefix=0):
        parts = [self.run(tokens[at : at + size], at, pages) for at in range(prefix, len(tokens), size)]
        return np.concatenate(parts)


@pytest.fixture(scope="module")
def prompt():
    return np.random.default_rng(3).integers(3, 120, LENGTH)


@pytest.fixture
def variant_case(variant_folder, prompt):
    """A checkpoint folder of each variant and transformers' logits [tokens, vocab] for the prompt."""
    return variant_folder, transformers_logits(variant_folder, tuple(prompt.tolist()))


@functools.cache
def transformers_logits(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def assert_equal_logits(actual, expected):
    """Within 1e-4 of the logit scale."""
    scale = np.abs(expected).max()
    assert np.abs(actual - expected).max() <= 1e-4 * scale


def shuffled_pages(seed=0, count=40):
    return np.random.default_rng(seed).permutation(200)[:count] + 1


@pytest.mark.parametrize(("size", "stacked"), [(1024, False), (64, False), (7, False), (1, False), (64, True)])
def test_logits_equal_transformers_for_every_chunking(variant_case, prompt, size, stacked):
    folder, expected = variant_case
    assert_equal_logits(Runner(folder, stacked=stacked).in_chunks(prompt, size, shuffled_pages()), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_prompt_of_several_chunks_of_1024_equals_transformers(tiny_checkpoint, family):
    """Long enough for whole key blocks in front of a chunk, which take the path without a mask."""
    folder = tiny_checkpoint(family, max_position_embeddings=4096)
    tokens = np.random.default_rng(4).integers(3, 120, 2100)
    pages = shuffled_pages(count=140)
    assert_equal_logits(
        Runner(folder).in_chunks(tokens, 1024, pages), transformers_logits(folder, tuple(tokens.tolist()))
    )


def test_decode_after_prefill_equals_transformers(variant_case, prompt):
    folder, expected = variant_case
    runner, pages, split = Runner(folder), shuffled_pages(), 101
    assert_equal_logits(runner.in_chunks(prompt[:split], 64, pages), expected[:split])
    assert_equal_logits(runner.in_chunks(prompt, 1, pages, prefix=split), expected[split:])


@pytest.mark.parametrize("reused", [1, PAGE, PAGE * 3 + 5, LENGTH - 1])
def test_a_prompt_on_a_reused_prefix_equals_transformers(variant_case, prompt, reused):
    """Another prompt computed the prefix; a match that ends inside a page goes on in a copy of that page."""
    folder, expected = variant_case
    runner, first, second = Runner(folder), shuffled_pages(1), shuffled_pages(2)
    other = np.concatenate([prompt[:reused], np.full(40, 5)])
    runner.in_chunks(other, 1024, first)
    whole = reused // PAGE
    mine = np.concatenate([first[:whole], [p for p in second if p not in first][: 40 - whole]])
    if reused % PAGE:
        runner.pool = copy_pages(runner.pool, first[whole : whole + 1], mine[whole : whole + 1])
    assert_equal_logits(runner.in_chunks(prompt, 33, mine, prefix=reused), expected[reused:])


def ragged_logits(runner: Runner, prompt: np.ndarray, padding: np.ndarray) -> np.ndarray:
    """Logits after tokens 50, 63 and 19 of a prompt: one decoded, a chunk, and one after a prefix, in one batch."""
    pages = shuffled_pages(count=60).reshape(3, 20)
    runner.run(prompt[:50], 0, pages[0])
    runner.run(prompt[:9], 0, pages[2])
    tokens = np.concatenate([prompt[50:51], prompt[:64], prompt[9:20], padding])
    batch = Batch(
        tokens=tokens.astype(np.int32),
        starts=np.asarray([0, 1, 65, 76], np.int32),
        prefix=np.asarray([50, 0, 9], np.int32),
        block_table=pages.astype(np.int32),
        logit_indices=np.asarray([0, 64, 75], np.int32),
        max_chunk=64,
    )
    logits, _ = runner.forward(runner.params, batch, runner.pool)
    return np.asarray(logits)


def test_a_ragged_batch_equals_its_sequences_alone(variant_case, prompt):
    folder, expected = variant_case
    assert_equal_logits(ragged_logits(Runner(folder), prompt, np.zeros(3)), expected[[50, 63, 19]])


def test_padding_tokens_leave_the_pool_alone(variant_case, prompt):
    folder, _ = variant_case
    runner = Runner(folder, num_pages=8)
    before = np.asarray(runner.pool.k).copy()
    batch = Batch(
        tokens=np.full(4, 7, np.int32),
        starts=np.asarray([0, 1], np.int32),
        prefix=np.asarray([0], np.int32),
        block_table=np.asarray([[3, 0]], np.int32),
        logit_indices=np.zeros(1, np.int32),
        max_chunk=4,
    )
    _, pool = runner.forward(runner.params, batch, runner.pool)
    changed = np.argwhere(np.abs(np.asarray(pool.k) - before).sum((0, 2, 4)) > 0)
    assert changed.tolist() == [[3, 0]]


def test_the_compiled_step_copies_no_pool(variant_case):
    """A donated pool in the carry is updated in place: no instruction makes a second pool-sized array."""
    folder, _ = variant_case
    runner = Runner(folder, num_pages=4096)
    batch = Batch(
        tokens=np.zeros(64, np.int32),
        starts=np.asarray([0, 64], np.int32),
        prefix=np.asarray([0], np.int32),
        block_table=np.zeros((1, 64), np.int32),
        logit_indices=np.zeros(1, np.int32),
        max_chunk=64,
    )
    compiled = runner.forward.lower(runner.params, batch, runner.pool).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < runner.pool.k.nbytes / 4
