"""Models on several devices beside the same models on one: a program that prints what it found as JSON.

It runs in a process of its own, with the `XLA_FLAGS` of this file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from jax.sharding import Mesh

from tests.helpers.shapes import checked

if __name__ == "__main__":  # as in conftest.py
    jaxtyping.install_import_hook("model", f"{checked.__module__}.{checked.__name__}")

from experiments.gpu.collectives import collectives
from model.batch import Batch
from model.checkpoint import layout
from model.config import ExpertsConfig, LayerKind, ModelConfig, RopeConfig
from model.decoder import forward
from model.kv import KVPool, copy_pages, empty_pool, gather_pages, scatter_pages
from model.params import Params, unstacked
from model.sharding import make_mesh, pool_sharding, shard_params, shardings

PAGE, PAGES, LAYERS = 4, 64, 2
# What is compared are HLO and numbers, so LLVM need not optimise.
XLA_FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"

CHUNK = 24  # tokens of a step with chunks
PROMPTS = (50, 3)

SIZES = {"family": "llama", "embed_size": 32, "ffn_size": 48, "num_layers": LAYERS, "max_position": 512}
make_config = partial(ModelConfig, **SIZES, norm_eps=1e-5, rope=RopeConfig())  # type: ignore[arg-type]
CONFIGS = {
    # Fewer KV heads than four devices, and weights of its own for the head.
    "gqa": make_config(vocab_size=128, num_heads=8, num_kv_heads=2, head_dim=8),
    # As many KV heads, biases, and a vocabulary that four does not divide.
    "qwen2-tied": make_config(
        vocab_size=130, num_heads=4, num_kv_heads=4, head_dim=16, qkv_bias=True, tie_embeddings=True
    ),
    # One KV head, every optional part, and heads that are not for the CPU kernels.
    "mqa-qwen3-biases": make_config(
        vocab_size=128,
        num_heads=4,
        num_kv_heads=1,
        head_dim=6,
        qk_norm=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    ),
    # A dense layer, then one with experts, a window, sinks and every bias.
    "experts": make_config(
        vocab_size=128,
        num_heads=8,
        num_kv_heads=2,
        head_dim=8,
        family="gpt_oss",
        layers=(LayerKind(), LayerKind(window=9, experts=True)),
        experts=ExpertsConfig(count=5, per_token=2, ffn_size=24, router_bias=True, biases=True, clamp=(1.702, 1.0)),
        sinks=True,
    ),
}
# (config, devices, whether the layers are stacked)
CASES = [
    ("gqa", 2, True),
    ("gqa", 4, False),
    ("qwen2-tied", 2, False),
    ("qwen2-tied", 4, True),
    ("mqa-qwen3-biases", 4, True),
    ("experts", 4, True),
]


def random_params(config: ModelConfig) -> Params:
    """Every weight random: norms about one, the rest large enough for biases to matter."""
    rng = np.random.default_rng(0)

    def make(path: Any, leaf: Any) -> jax.Array:
        centre = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(centre + 0.2 * rng.normal(size=leaf.shape), jnp.float32)

    made: Params = jax.tree_util.tree_map_with_path(make, layout(config))
    return made


class Run:
    """Two sequences on one device or several: the chunks of one beside the single tokens of the other, then decode."""

    def __init__(self, params: Params, config: ModelConfig, mesh: Mesh | None) -> None:
        self.params, self.logits, self.compiled = params, [], {}
        self.pool = empty_pool(config, PAGES, PAGE, jnp.float32, pool_sharding(config, mesh))
        self.step = jax.jit(lambda params, batch, pool: forward(params, batch, pool, config, mesh), donate_argnums=2)
        self.table = np.random.default_rng(1).permutation(PAGES).reshape(2, -1).astype(np.int32)
        self.tokens = [np.random.default_rng(2).integers(0, config.vocab_size, n).tolist() for n in PROMPTS]
        self.done = [0, 0]
        for kind, chunk in [("chunks", 15), ("chunks", 23), ("chunks", 12), *[("decode", 1)] * 6]:
            self.run(kind, [chunk, 1])

    def run(self, kind: str, counts: list[int]) -> None:
        """One step; what it samples, greedily, goes on where a prompt is at its end."""
        new = [tokens[done : done + n] for tokens, done, n in zip(self.tokens, self.done, counts, strict=True)]
        starts = np.cumsum([0, *counts]).astype(np.int32)
        bucket = 2 if kind == "decode" else CHUNK
        batch = Batch(
            tokens=np.pad(np.concatenate(new), (0, bucket - starts[-1])).astype(np.int32),
            starts=starts,
            prefix=np.asarray(self.done, np.int32),
            block_table=self.table,
            logit_indices=starts[1:] - 1,
            max_chunk=1 if kind == "decode" else CHUNK,
            decode_seqs=0 if kind == "decode" else 1,
        )
        if kind not in self.compiled:
            self.compiled[kind] = self.step.lower(self.params, batch, self.pool).compile()
        logits, self.pool = self.compiled[kind](self.params, batch, self.pool)
        self.logits.append(np.asarray(logits))
        self.done = [done + n for done, n in zip(self.done, counts, strict=True)]
        for tokens, done, row in zip(self.tokens, self.done, self.logits[-1], strict=True):
            if len(tokens) == done:
                tokens.append(int(row.argmax()))


def compare(config: ModelConfig, one: Run, devices: int, stacked: bool) -> dict[str, Any]:
    """What a model on several devices has done, beside the same on one."""
    mesh = make_mesh(config, devices)
    assert mesh is not None
    params = shard_params(random_params(config), mesh)
    leaves, wanted = jax.tree.leaves(params), jax.tree.leaves(shardings(params, mesh))
    several = Run(params if stacked else unstacked(params), config, mesh)
    logits = zip(one.logits, several.logits, strict=True)
    return {
        "misplaced": [leaf.shape for leaf, sharding in zip(leaves, wanted, strict=True) if leaf.sharding != sharding],
        "params_bytes": on_one_device(params),
        "pool_bytes": on_one_device(several.pool),
        "pool_moved": several.pool.k.sharding != pool_sharding(config, mesh),
        "in_place_bytes": several.compiled["decode"].memory_analysis().alias_size_in_bytes,
        "deviation": max(float(abs(alone - beside).max() / abs(alone).max()) for alone, beside in logits),
        "sampled": several.tokens[0][PROMPTS[0] :],
        "sampled_alone": one.tokens[0][PROMPTS[0] :],
        "collectives": {kind: collectives(step.as_text()) for kind, step in several.compiled.items()},
        "pages": copied_pages(one.pool, several.pool),
    }


def on_one_device(arrays: Params | KVPool) -> int:
    """Bytes of arrays on the first device of a mesh."""
    return sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(arrays))


def copied_pages(one: KVPool, several: KVPool) -> dict[str, Any]:
    """Whether pages are read, written and copied on several devices as on one, and the collectives it takes."""
    read, written = np.asarray([5, 9], np.int32), np.asarray([2, 7], np.int32)
    found: dict[str, Any] = {"collectives": []}

    def pages(pool: KVPool, numbers: np.ndarray) -> np.ndarray:
        return np.moveaxis(np.stack([np.asarray(side)[:, numbers] for side in (pool.k, pool.v)]), 2, 0)

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        compiled = jax.jit(function).lower(*arguments).compile()
        found["collectives"] += collectives(compiled.as_text())
        return compiled(*arguments)

    whole = pages(one, read)
    found["read"] = np.allclose(call(gather_pages, several, read), whole, atol=1e-5)
    back = call(scatter_pages, several, written, whole)
    found["written"] = np.array_equal(pages(back, written), whole)
    found["copied"] = np.array_equal(pages(call(copy_pages, back, written, read), read), whole)
    return found


def main() -> None:
    """Print {case: what `compare` found}."""
    alone = {name: Run(random_params(config), config, None) for name, config in CONFIGS.items()}
    found = {f"{name}-{count}": compare(CONFIGS[name], alone[name], count, stacked) for name, count, stacked in CASES}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
