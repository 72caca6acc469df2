"""How near one engine's next-token distributions come to another's: KL divergence, and how often their best agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from experiments.quality.scoring import Scorer
from experiments.quality.texts import KINDS, Encode, documents

TOKENS = 20_480  # of all texts together
DOCUMENT = 2048  # tokens of each text
ALL = "all"


@dataclass(frozen=True)
class Agreement:
    """An engine beside a reference, on the same texts: one context for each token that another follows."""

    tokens: int  # contexts
    kl: float  # nats from the reference to the other, mean
    kl_p99: float  # nats, 99th percentile
    top1: float  # share of tokens after which both expect the same one most
    perplexity: float  # of the reference
    other_perplexity: float


def agreement(reference: Scorer, other: Scorer, texts: Sequence[np.ndarray]) -> Agreement:
    """Compare two engines on texts, each [tokens] int32, token by token over the same contexts.

    KL divergence is the mean over contexts of `sum(p log(p / q))`, where p are the reference's probabilities.
    """
    return _summary(_compared(reference, other, texts))


def agreements(
    reference: Scorer, other: Scorer, encode: Encode, tokens: int = TOKENS, document: int = DOCUMENT
) -> dict[str, Agreement]:
    """The agreement on each kind of text, half of about `tokens` tokens each, and on `all` of them."""
    count = max(1, round(tokens / len(KINDS) / document))
    found = {kind: _compared(reference, other, documents(kind, encode, document, count)) for kind in KINDS}
    return {name: _summary(each) for name, each in found.items()} | {
        ALL: _summary(np.concatenate([*found.values()], axis=1))
    }


def _compared(reference: Scorer, other: Scorer, texts: Sequence[np.ndarray]) -> np.ndarray:
    """What `_compare` finds of all texts' tokens but each one's last, which nothing follows: [4, tokens] float64."""
    found = []
    for tokens in texts:
        start = 0
        for ours, theirs in zip(reference.logits(tokens), other.logits(tokens), strict=True):
            after = tokens[start + 1 : start + 1 + len(ours)]
            found.append(np.asarray(_compare(ours[: len(after)], theirs[: len(after)], after)))
            start += len(ours)
    return np.concatenate(found, axis=1).astype(np.float64)


def _summary(compared: np.ndarray) -> Agreement:
    """The agreement over some tokens, [4, tokens]."""
    kl, same, surprise, other_surprise = compared
    return Agreement(
        tokens=len(kl),
        kl=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1=float(same.mean()),
        perplexity=math.exp(surprise.mean()),
        other_perplexity=math.exp(other_surprise.mean()),
    )


@jax.jit
def _compare(reference: jax.Array, other: jax.Array, tokens: jax.Array) -> jax.Array:
    """KL divergence, whether the best agree, and both surprises at `tokens`: [4, tokens] float32.

    The logits are [tokens, vocab] float32.
    """
    p, q = jax.nn.log_softmax(reference), jax.nn.log_softmax(other)
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    same = (jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)).astype(jnp.float32)
    surprises = [-jnp.take_along_axis(x, tokens[:, None], axis=-1)[:, 0] for x in (p, q)]
    return jnp.stack([kl, same, *surprises])
