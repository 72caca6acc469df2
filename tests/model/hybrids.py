"""Tiny hybrid checkpoints, and one sequence fed to our forward pass with its states in slots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from model import checkpoint
from model.batch import Batch
from model.decoder import forward
from model.kernels.dispatch import arranged
from model.kv import empty_pool
from model.states import empty_states, gather_slots
from tests.model.conftest import random_model

PAGE, SLOTS, NOWHERE = 16, 6, 99
BUCKETS = (1, 192, 1024)
DELTA_NET = {
    "head_dim": 32,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "max_position_embeddings": 4096,
}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
MAMBA = {
    "head_dim": 16,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention", "mlp"],
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "moe_latent_size": 40,
    "max_position_embeddings": 4096,
}
# By family, what differs from `conftest.SIZES`.
HYBRIDS = {
    "qwen3_next": {**DELTA_NET, **EXPERTS, "mlp_only_layers": [1]},
    "qwen3_5_text": DELTA_NET,
    "qwen3_5_moe_text": {**DELTA_NET, **EXPERTS},
    "nemotron_h": MAMBA,
}


def random_hybrid(family, **overrides):
    """`random_model` with norms that scale by about one, whatever they count from, and decays of all sizes."""
    model = random_model(family, **overrides)
    centred = family.startswith("qwen3")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:  # so that rounding does not grow from layer to layer
                weight *= 0.6
            if centred and "norm" in name and "linear_attn" not in name:
                weight -= 1
            if name.endswith("A_log"):
                weight.copy_(torch.log(0.01 + 16 * torch.rand(weight.shape, generator=generator)))
            if name.endswith("dt_bias"):
                weight.copy_(torch.randn(weight.shape, generator=generator) * 2 - 3)
    return model


@functools.cache
def compiled(folder):
    """A checkpoint with its jitted forward pass, shared by the tests so that each shape compiles once."""
    config, params = checkpoint.load(folder, "float32")
    step = jax.jit(
        lambda params, batch, pool, states: forward(params, batch, pool, config, None, states), donate_argnums=(2, 3)
    )
    return config, arranged(params, PAGE), step


def make_batch(tokens, starts, prefix, tables, reads, writes, **static):
    """A batch whose every token's logits are wanted."""
    as_int = functools.partial(np.asarray, dtype=np.int32)
    return Batch(
        tokens=as_int(tokens),
        starts=as_int(starts),
        prefix=as_int(prefix),
        block_table=as_int(tables),
        logit_indices=np.arange(len(tokens), dtype=np.int32),
        reads=as_int(reads),
        writes=as_int(writes),
        **static,
    )


class Hybrid:
    """Sequences fed to our forward pass piece by piece, each piece padded to a bucket as the engine pads it."""

    def __init__(self, folder):
        self.config, self.params, self.step = compiled(folder)
        self.pool = empty_pool(self.config, 400, PAGE, jnp.float32)
        self.states = empty_states(self.config, SLOTS)

    def forward(self, batch):
        """The logits of a batch's tokens."""
        logits, self.pool, self.states = self.step(self.params, batch, self.pool, self.states)
        return np.asarray(logits)

    def run(self, tokens, prefix, pages, read=0, write=0):
        """Logits [tokens, vocab] of new tokens behind a prefix."""
        count = len(tokens)
        bucket = min(b for b in BUCKETS if b >= count)
        padded = np.pad(tokens, (0, bucket - count))
        batch = make_batch(padded, [0, count], [prefix], [pages], [read], [write], max_chunk=bucket)
        return self.forward(batch)[:count]

    def in_chunks(self, tokens, size, pages, prefix=0, slot=0):
        """The same in chunks, all of which read and write one slot."""
        parts = [self.run(tokens[at : at + size], at, pages, slot, slot) for at in range(prefix, len(tokens), size)]
        return np.concatenate(parts)

    def state(self, slot=0):
        """The numbers of a slot."""
        return np.asarray(gather_slots(self.states, np.asarray([slot])))[0]


def pages_of(seed=0, count=96):
    """Pages in any order, for one sequence."""
    return np.random.default_rng(seed).permutation(399)[:count] + 1
