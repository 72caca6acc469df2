"""What is right: keys, values and logits of any tokens from one cold pass, and whether a cache holds the same.

Of each kind of place, device pages, records of a tier and the logits after cached pages, one function lists what is
wrong there. Text alone would be too weak a witness: few wrong pages change the likeliest token. What is right is
computed on one device, however many the engines have.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cache.disk import DiskTier
from cache.keys import PageChain, tail_key
from cache.remote import RemoteTier
from cache.tier import SEAL
from model.batch import Batch
from model.checkpoint import layout
from model.config import ExpertsConfig, LayerKind, ModelConfig, RopeConfig
from model.decoder import forward
from model.kernels.dispatch import arranged
from model.kv import empty_pool
from model.sharding import make_mesh, shard_params
from serve.engine.engine import Engine
from serve.engine.settings import EngineSettings

# Short prompts on small pages: one wrong page is a large part of what a token attends to.
PAGE, LIMIT, VOCAB = 4, 64, 128
FINGERPRINT = b"reuse under loss"
DEVICES = int(os.environ.get("TENSOR_PARALLEL", "1"))  # of the engines
SETTINGS = EngineSettings(
    num_pages=20,
    max_model_len=LIMIT,
    page_size=PAGE,
    max_num_seqs=3,
    max_prefill_tokens=16,
    max_mixed_prefill_tokens=8,
    speculative_tokens=2,
    tensor_parallel=DEVICES,
)
QWEN3 = ModelConfig("qwen3", VOCAB, 64, 96, 2, 4, 2, 16, 4096, 1e-6, RopeConfig(), qk_norm=True, tie_embeddings=True)
DENSE, MIXED, WINDOW = LayerKind(), LayerKind(experts=True), 9
EXPERTS = ExpertsConfig(count=6, per_token=2, ffn_size=32)
GLM_EXPERTS = replace(EXPERTS, shared_ffn_size=16, scoring="sigmoid", groups=3, chosen_groups=2, correction=True)
OSS_EXPERTS = replace(EXPERTS, router_bias=True, biases=True, clamp=(1.702, 7.0))
# One of each family, with windows shorter than the prompts.
CONFIGS = {
    "llama": replace(QWEN3, family="llama", qk_norm=False),
    "mistral": replace(QWEN3, family="mistral", qk_norm=False, layers=(LayerKind(WINDOW),) * 2),
    "qwen2": replace(QWEN3, family="qwen2", qk_norm=False, qkv_bias=True, layers=(DENSE, LayerKind(WINDOW))),
    "qwen3": QWEN3,
    "qwen3_moe": replace(QWEN3, family="qwen3_moe", layers=(MIXED, MIXED), experts=EXPERTS),
    "mixtral": replace(QWEN3, family="mixtral", qk_norm=False, layers=(MIXED, MIXED), experts=EXPERTS),
    "gpt_oss": replace(
        QWEN3, family="gpt_oss", layers=(LayerKind(WINDOW, True), MIXED), experts=OSS_EXPERTS, sinks=True, qk_norm=False
    ),
    "glm4_moe": replace(
        QWEN3, family="glm4_moe", layers=(DENSE, MIXED), experts=GLM_EXPERTS, rope=RopeConfig(partial=0.5)
    ),
}
CONFIG = CONFIGS[os.environ.get("MODEL_FAMILY", "qwen3")]
PAGE_SHAPE = (2, CONFIG.num_layers, CONFIG.num_kv_heads, PAGE, CONFIG.head_dim)
PAGE_BYTES = 4 * int(np.prod(PAGE_SHAPE))
# Of the largest number in the page or among the logits: what another chunking may change by rounding.
TOLERANCE = 1e-4

one_shot = jax.jit(forward, static_argnames="config")


@cache
def parameters(devices: int = 1):
    """The model's weights, random, on so many devices."""
    rng = np.random.default_rng(0)

    def leaf(spec):
        norm = len(spec.shape) <= 2 and "norm" in spec.parts[0].name
        return jnp.ones(spec.shape) if norm else jnp.asarray(rng.normal(size=spec.shape) * 0.2, jnp.float32)

    params = jax.tree.map(leaf, layout(CONFIG))
    return arranged(shard_params(params, make_mesh(CONFIG, devices)), PAGE)


def records(tier) -> dict[bytes, bytes]:
    """All pages that a tier holds, by key, read without its methods: not a use."""
    tier = getattr(tier, "tier", tier)
    if isinstance(tier, DiskTier):

        def scan(dbs):
            with dbs.env.begin() as txn, txn.cursor(dbs.pages) as cursor:
                return dict(cursor)

        return tier.store.attempt("read", scan, {})
    if isinstance(tier, RemoteTier):
        files = [path for path in Path(tier.url.removeprefix("file://")).rglob("*") if len(path.name) == 64]
        found = {}
        for path in files:
            with suppress(FileNotFoundError):  # another process may have removed it
                found[bytes.fromhex(path.name)] = path.read_bytes()[SEAL.size :]
        return found
    return dict(tier.pages)


def differs(actual: np.ndarray, expected: np.ndarray) -> bool:
    """Whether any number is off by more than rounding; NaN is."""
    return not np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


def begins(tokens: np.ndarray, start: np.ndarray) -> bool:
    """Whether tokens ([tokens] int32) begin with others."""
    return np.array_equal(tokens[: len(start)], start)


class Truth:
    """Keys, values and logits of any tokens, each in one shot on an empty pool, and what their pages are called."""

    def __init__(self):
        self.known: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}  # by the bytes of a prefix
        self.names: dict[bytes, np.ndarray] = {}  # the prefix that ends in a page, by the page's key
        self.shots = 0

    def of(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values, [2, layers, kv_heads, LIMIT, head_dim], and the logits after each token, [LIMIT, vocab].

        Good for the positions of `tokens` ([tokens] int32), whatever comes after.
        """
        found = self.known.get(tokens.tobytes())
        if found is None:
            self.shots += 1
            pages = LIMIT // PAGE
            batch = Batch(
                tokens=np.pad(tokens, (0, LIMIT - len(tokens))),
                starts=np.asarray([0, len(tokens)], np.int32),
                prefix=np.zeros(1, np.int32),
                block_table=np.arange(pages, dtype=np.int32)[None],
                logit_indices=np.arange(LIMIT, dtype=np.int32),
                max_chunk=LIMIT,
            )
            logits, pool = one_shot(parameters(), batch, empty_pool(CONFIG, pages, PAGE, jnp.float32), CONFIG)
            kv = np.stack([np.asarray(pool.k), np.asarray(pool.v)])  # [2, layers, pages, kv_heads, page, head_dim]
            kv = np.moveaxis(kv, 2, 3).reshape(*PAGE_SHAPE[:3], LIMIT, CONFIG.head_dim)
            found = kv, np.asarray(logits)
            for length in range(1, len(tokens) + 1):
                self.known.setdefault(tokens[:length].tobytes(), found)
        return found

    def page(self, tokens: np.ndarray) -> np.ndarray:
        """The last page of `tokens`, as far as they fill it: [2, layers, kv_heads, filled, head_dim]."""
        return self.of(tokens)[0][:, :, :, (len(tokens) - 1) // PAGE * PAGE : len(tokens)]

    def learn(self, tokens: np.ndarray, salt: bytes, head: int = 0) -> None:
        """Note that this was said, so that its pages are known by their names, the partly filled ones too."""
        chain = PageChain(FINGERPRINT, PAGE, salt, head)
        keys = chain.keys(tokens)
        for length in range(1, len(tokens) + 1):
            full = length // PAGE
            rest = tokens[full * PAGE : length]
            key = tail_key(chain.parent(keys, full), rest) if len(rest) else keys[full - 1]
            self.names.setdefault(key, tokens[:length])


def wrong_records(tier, truth: Truth, only_known: bool = False) -> list[str]:
    """What is wrong with the records of a tier: each must hold what its key stands for."""
    found = []
    for key, payload in records(tier).items():
        tokens = truth.names.get(key)
        if tokens is None:
            found += [] if only_known else [f"{tier.name}: {key.hex()[:8]} is the key of nothing that was said"]
            continue
        right = truth.page(tokens)
        page = np.frombuffer(payload, np.float32).reshape(PAGE_SHAPE)
        if differs(page[:, :, :, : right.shape[3]], right):
            found.append(f"{tier.name}: the record of tokens up to {len(tokens)} is wrong: {tokens.tolist()}")
    return found


def wrong_pages(engine: Engine, truth: Truth) -> list[str]:
    """What is wrong with the pages that an engine's radix tree lists, as far as it says that they are filled."""
    pool = engine.core.memory.pool
    kv = np.stack([np.array(pool.k), np.array(pool.v)])  # [2, layers, pages, kv_heads, page, head_dim]
    paths, found = {}, []
    for node in engine.core.memory.prefix_cache.tree.nodes():
        above = node.parent if len(node.parent.tokens) else node.parent.parent  # beyond the end of a head
        path = paths[id(node)] = np.concatenate([paths.get(id(above), node.tokens[:0]), node.tokens])
        for slot, page in enumerate(node.pages, node.start // PAGE):
            tokens = path[: (slot + 1) * PAGE]
            right = truth.page(tokens)
            if differs(kv[:, :, page, :, : right.shape[3]], right):
                found.append(f"the device's page of tokens up to {len(tokens)} is wrong: {tokens.tolist()}")
    return found


def wrong_preloaded(engine: Engine, truth: Truth) -> list[str]:
    """What is wrong with the pages that an engine has preloaded: each must hold what its key stands for."""
    pool, found = engine.core.memory.pool, []
    for key, (page, _) in engine.core.memory.prefix_cache.preloaded.by_key.items():
        if (tokens := truth.names.get(key)) is None:
            continue  # of a conversation that another engine has, and that has not ended yet
        right = truth.page(tokens)
        kv = np.stack([np.array(pool.k[:, page]), np.array(pool.v[:, page])])  # [2, layers, kv_heads, page, head_dim]
        if differs(kv[:, :, :, : right.shape[3]], right):
            found.append(f"the preloaded page of tokens up to {len(tokens)} is wrong: {tokens.tolist()}")
    return found


def wrong_logits(engine: Engine, truth: Truth, tokens: np.ndarray, salt: bytes, head: int = 0) -> list[str]:
    """What is wrong with the logits of the token that follows what the engine has of `tokens`, over its pages."""
    pages, length = engine.core.memory.prefix_cache.tree.match(tokens[:-1], salt, head)
    if not length:
        return []
    others = np.setdiff1d(np.arange(SETTINGS.num_pages), pages)
    table = np.full(LIMIT // PAGE, others[0], np.int32)  # the token's own page, where the match ends with a page
    table[: len(pages)] = pages
    batch = Batch(
        tokens=tokens[length : length + 1],
        starts=np.asarray([0, 1], np.int32),
        prefix=np.asarray([length], np.int32),
        block_table=table[None],
        logit_indices=np.zeros(1, np.int32),
        max_chunk=1,
    )
    pool = engine.core.memory.pool
    pool = jax.device_put(pool, jax.devices()[0]) if DEVICES > 1 else pool
    logits = np.asarray(one_shot(parameters(), batch, pool, CONFIG)[0])[0]
    right = truth.of(tokens)[1][length]
    return [f"logits after {length} cached tokens of {tokens.tolist()}"] if differs(logits, right) else []
