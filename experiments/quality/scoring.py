"""The logits of every token of a text, by one model: what qualities are computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cache.pool import pages_for
from model.batch import Batch
from model.config import ModelConfig
from model.decoder import forward
from model.kv import KVPool, empty_pool
from model.params import Params

PAGE = 64  # tokens
CHUNK = 512  # tokens of a forward pass: their logits take 100 MB where the vocabulary has 49,152 tokens

PoolOf = Callable[[int], KVPool]  # an empty pool of so many pages


@dataclass(frozen=True)
class Scorer:
    """A model that scores texts: its weights as `kernels.dispatch.arranged` gives them, and its kind of KV pool."""

    config: ModelConfig
    params: Params
    pool_of: PoolOf | None = None  # None: float32
    chunk: int = CHUNK

    def logits(self, tokens: np.ndarray) -> Iterator[jax.Array]:
        """The logits of a text, [tokens] int32, in chunks: [up to `chunk`, vocab] float32 each.

        Row i of the text's logits is what the model expects after its token i.
        """
        count = pages_for(len(tokens), PAGE)
        pool = self.pool_of(count) if self.pool_of else empty_pool(self.config, count, PAGE, jnp.float32)
        table = np.arange(count, dtype=np.int32)[None]
        for start in range(0, len(tokens), self.chunk):
            new = tokens[start : start + self.chunk]
            padded = np.zeros(self.chunk, np.int32)
            padded[: len(new)] = new
            batch = Batch(
                tokens=padded,
                starts=np.asarray([0, len(new)], np.int32),
                prefix=np.asarray([start], np.int32),
                block_table=table,
                logit_indices=np.arange(self.chunk, dtype=np.int32),
                max_chunk=self.chunk,
            )
            logits, pool = _forward(self.params, batch, pool, self.config)
            yield logits[: len(new)]


def surprises(scorer: Scorer, tokens: np.ndarray) -> np.ndarray:
    """Nats by which each token after the first surprises the model, [tokens - 1] float32."""
    found, start = [], 0
    for logits in scorer.logits(tokens):
        after = tokens[start + 1 : start + 1 + len(logits)]
        found.append(np.asarray(_surprise(logits[: len(after)], after)))
        start += len(logits)
    return np.concatenate(found)


@jax.jit
def _surprise(logits: jax.Array, tokens: Any) -> jax.Array:
    """Minus the log probabilities of tokens, [tokens] float32."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=-1)[:, 0]


_forward = jax.jit(forward, static_argnames="config", donate_argnames="pool")
