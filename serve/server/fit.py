"""Whether a model fits its device, found out before its weights are read, and which flags would make it fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.sizes import show_bytes

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from model.config import ModelConfig
    from serve.server.config import ServerConfig

GENTLEST_FIRST = ("max_model_len", "kv_dtype", "quantize")


@dataclass(frozen=True)
class Choice:
    """The flags that decide how much memory a model takes; None is the default of each."""

    quantize: str | None = None
    kv_dtype: str | None = None
    max_model_len: int | None = None

    def flags(self, since: Choice) -> str:
        """The flags that differ from another choice, as they are written."""
        changed = [name for name in GENTLEST_FIRST if getattr(self, name) != getattr(since, name)]
        return " ".join(f"--{name.replace('_', '-')} {getattr(self, name)}" for name in changed)


@dataclass(frozen=True)
class Sizes:
    """What a model takes of each device, in bytes."""

    limit: int  # that a device has for weights and KV pages
    weights: Callable[[str | None], int]  # by `quantize`
    token: Callable[[str | None], int]  # keys and values of a token, by `kv_dtype`
    page_size: int
    pool: int | None = None  # what is asked for KV pages; None: as many as `max_model_len` needs, and two at least

    def needed(self, choice: Choice) -> int:
        """Bytes of weights and pages."""
        if self.pool is not None:
            return self.weights(choice.quantize) + self.pool
        pages = 1 + max(1, -(-(choice.max_model_len or 0) // self.page_size))
        return self.weights(choice.quantize) + pages * self.page_size * self.token(choice.kv_dtype)

    def longest(self, choice: Choice) -> int:
        """The largest `max_model_len` that fits with the other flags, in whole pages; 0 or less if there is none."""
        left = self.limit - self.weights(choice.quantize)
        return (left // (self.page_size * self.token(choice.kv_dtype)) - 1) * self.page_size


def refuse_recurrent(name: str, model: ModelConfig) -> None:
    """Raise ValueError for a model with recurrent layers: the engine keeps keys and values, and no states yet."""
    if model.recurrent_layers:
        raise ValueError(
            f"{name} is a {model.family} model, {model.recurrent_layers} of whose {model.num_layers} layers are "
            "recurrent: the server does not keep their states yet, so serve a model of attention alone"
        )


def refuse_too_big(config: ServerConfig, folder: Path, dtype: str, mesh: Mesh | None, limit: int) -> None:
    """Raise ValueError for a model that takes over `limit` bytes of each device, with the flags that would help."""
    from jax.numpy import dtype as dtype_of

    from model.checkpoint import planned_bytes
    from model.families import load_config
    from model.kv import bytes_per_token
    from model.kv_rows import pool_dtype
    from model.sharding import pool_heads

    model = load_config(folder)

    def weights(quantize: str | None) -> int:
        return planned_bytes(folder, dtype_of(dtype), config.tp, quantize)

    def token(kv_dtype: str | None) -> int:
        whole = bytes_per_token(model, pool_dtype(kv_dtype or dtype))
        return whole * pool_heads(model, mesh) // model.num_kv_heads

    pool = None if config.kv_pool_bytes is None else config.kv_pool_bytes // config.tp
    sizes = Sizes(limit, weights, token, config.page_size, pool)
    if found := problem(config.model, sizes, Choice(config.quantize, config.kv_dtype, config.max_model_len)):
        raise ValueError(found)


def problem(model: str, sizes: Sizes, given: Choice) -> str | None:
    """Why a model does not fit, by how much, and which flags would make it; None if it fits."""
    needed = sizes.needed(given)
    if needed <= sizes.limit:
        return None
    weights = sizes.weights(given.quantize)
    fitting = what_fits(sizes, given)
    advice = (
        f"it fits with {' or with '.join(choice.flags(given) for choice in fitting)}"
        if fitting
        else "no --quantize, --kv-dtype or --max-model-len makes it fit: use a smaller model, or --tp for more devices"
    )
    return (
        f"{model} takes {show_bytes(weights)} of weights and {show_bytes(needed - weights)} of KV pages on a device, "
        f"{show_bytes(needed - sizes.limit)} more than the {show_bytes(sizes.limit)} that it has for them: {advice}"
    )


def what_fits(sizes: Sizes, given: Choice) -> list[Choice]:
    """The choices that fit and change as few flags as possible, the gentlest first."""
    choices = {
        "quantize": {None: ("int8", "int4"), "int8": ("int4",)}.get(given.quantize, ()),
        "kv_dtype": ("int8",) if given.kv_dtype is None and sizes.pool is None else (),
    }
    shorter = given.max_model_len is not None and sizes.pool is None

    def changed(names: tuple[str, ...]) -> Iterator[Choice]:
        others = [name for name in names if name != "max_model_len"]
        for values in itertools.product(*(choices[name] for name in others)):
            changes: dict[str, Any] = dict(zip(others, values, strict=True))
            choice = replace(given, **changes)
            if "max_model_len" in names:
                longest = sizes.longest(choice) if shorter else 0
                if longest > 0 and longest < (given.max_model_len or 0):
                    yield replace(choice, max_model_len=longest)
            elif sizes.needed(choice) <= sizes.limit:
                yield choice

    for count in range(1, len(GENTLEST_FIRST) + 1):
        found = [choice for names in itertools.combinations(GENTLEST_FIRST, count) for choice in changed(names)]
        if found:
            return found
    return []
