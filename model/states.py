"""The states of recurrent layers as arrays, in slots: their layout, and the only functions that write to it outside
the forward pass.

Which slot belongs to whom is the business of `cache`; here a slot is just a number. A state has a fixed size and stands
for all tokens before it, so that a sequence can only go on from a token at which its state was kept.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float32, Int

from model.config import ModelConfig

Slots = Int[jax.Array | np.ndarray, "count"]  # slot numbers
STATE_DTYPE = np.dtype(np.float32)  # rounding adds up over a sequence


@struct.dataclass
class States:
    """The state of every recurrent layer in every slot: donated from step to step, like the pool.

    Layers are numbered among the recurrent ones.
    """

    conv: Float32[jax.Array, "layers slots before channels"]  # the convolution's last inputs, the oldest first
    recurrent: Float32[jax.Array, "layers slots state_heads key_dim value_dim"]

    @property
    def num_slots(self) -> int:
        """Slots; writes to a slot number from this one on are dropped."""
        return self.conv.shape[1]


@struct.dataclass
class Trail:
    """What recurrent layers read of each token of a batch: from a state before it, any later one follows.

    Layers are numbered among the recurrent ones.
    """

    conv: Float32[jax.Array, "layers tokens channels"]  # inputs of the convolution
    gates: Float32[jax.Array, "layers tokens gates"]  # of each head, what decides on decay and strength


def state_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of one layer's state, by the field of `States`. Raises ValueError for a model without such layers."""
    sizes = config.recurrent
    if sizes is None:
        raise ValueError(f"a {config.family} model has no recurrent layers, expected some to make states for")
    return {
        "conv": (sizes.conv_width - 1, sizes.channels),
        "recurrent": (sizes.heads, sizes.key_dim, sizes.value_dim),
    }


def bytes_per_state(config: ModelConfig) -> int:
    """Bytes of one slot over all layers; 0 for a model without recurrent layers."""
    if config.recurrent is None:
        return 0
    numbers = sum(math.prod(shape) for shape in state_shapes(config).values())
    return config.recurrent_layers * numbers * STATE_DTYPE.itemsize


def empty_states(config: ModelConfig, num_slots: int) -> States:
    """`num_slots` slots of zeros, which is the state before a sequence's first token."""
    shapes = {name: (config.recurrent_layers, num_slots, *shape) for name, shape in state_shapes(config).items()}
    return States(**{name: jnp.zeros(shape, STATE_DTYPE) for name, shape in shapes.items()})


def gather_slots(states: States, slots: Slots) -> Float32[jax.Array, "count state"]:
    """A copy of whole slots: each is one run of numbers, layer by layer, the convolution's before the others."""
    parts = (jnp.moveaxis(array[:, slots], 1, 0).reshape(len(slots), -1) for array in (states.conv, states.recurrent))
    return jnp.concatenate(list(parts), axis=1)


def scatter_slots(states: States, slots: Slots, data: Float32[jax.Array | np.ndarray, "count state"]) -> States:
    """Write slots that `gather_slots` copied; an out-of-range slot is dropped."""
    layers, _, *conv = states.conv.shape
    cut = layers * math.prod(conv)

    def put(array: jax.Array, flat: jax.Array) -> jax.Array:
        whole = flat.reshape(len(slots), layers, *array.shape[2:])
        return array.at[:, slots].set(jnp.moveaxis(whole, 0, 1), mode="drop")

    data = jnp.asarray(data)
    return States(put(states.conv, data[:, :cut]), put(states.recurrent, data[:, cut:]))


def copy_slots(
    states: States,
    sources: Slots,
    targets: Slots,  # out of range where there is nothing to copy
) -> States:
    """Copy whole slots: a snapshot that goes on living, or a live slot that begins at a snapshot."""
    copied = (array.at[:, targets].set(array[:, sources], mode="drop") for array in (states.conv, states.recurrent))
    return States(*copied)
