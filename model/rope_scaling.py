"""Stretching a checkpoint's context beyond what its config says: another rope scaling, and the limit that follows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from model.config import NO_ROPE, ModelConfig, RopeConfig

TEXT, FLAG, NUMBER, SIZE = "a string", "true or false", "a positive number", "a positive whole number"
LARGEST = 2**63
# What a rope_scaling may have: any other field would be passed over, and is most likely misspelt.
FIELDS: Mapping[str, str] = {
    "rope_type": TEXT,
    "type": TEXT,
    "factor": NUMBER,
    "original_max_position_embeddings": SIZE,
    **dict.fromkeys(("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), NUMBER),
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), NUMBER),
    "truncate": FLAG,
    "rope_theta": NUMBER,
}


def parse_rope_scaling(text: str) -> dict[str, Any]:
    """A `rope_scaling` of a config.json, given as JSON. Raises ValueError for what is none."""
    try:
        scaling = json.loads(text)
    except ValueError as error:
        raise ValueError(f"expected a JSON object, got {text!r}: {error}") from error
    if not isinstance(scaling, dict):
        raise ValueError(f"expected a JSON object, got {text!r}")
    _rope(scaling, 1.0, 1)
    return scaling


def with_rope_scaling(config: ModelConfig, scaling: Mapping[str, Any]) -> ModelConfig:
    """The model with its frequencies stretched as a `rope_scaling` says, in place of its own.

    The context limit becomes `factor` times the context that is stretched: `original_max_position_embeddings`, or else
    what the checkpoint was trained on. With llama3 it is never less than the checkpoint's own, since that kind's factor
    does not say how far a model was trained: Llama 3.1 has 8 times 8,192 and takes 131,072. Raises ValueError as
    `RopeConfig.from_hf` does, and for a model that does not rotate.
    """
    if config.rope.kind == NO_ROPE:
        raise ValueError(f"rope_scaling is set, expected none: attention of a {config.family} model does not rotate")
    given = scaling.get("original_max_position_embeddings")
    original = int(given or config.rope.original_max_position or config.max_position)
    rope = _rope(scaling, config.rope.theta, original)
    rope = dataclasses.replace(rope, partial=config.rope.partial)
    least = config.max_position if rope.kind == "llama3" else 1
    return dataclasses.replace(config, rope=rope, max_position=max(least, round(original * rope.factor)))


def _rope(scaling: Mapping[str, Any], theta: float, original: int) -> RopeConfig:
    """The rotation with this scaling. Raises ValueError for other fields than FIELDS, and as `RopeConfig.from_hf`."""
    for name, value in scaling.items():
        if name not in FIELDS:
            raise ValueError(f"rope_scaling has {name}, supported are {', '.join(FIELDS)}")
        expected = FIELDS[name]
        if not _fits(value, expected):
            raise ValueError(f"rope_scaling has {name} {value!r}, expected {expected}")
    return RopeConfig.from_hf({"rope_theta": theta, "rope_scaling": dict(scaling)}, original)


def _fits(value: Any, expected: str) -> bool:
    """Whether a value is what is expected."""
    if expected == TEXT or isinstance(value, bool):
        return isinstance(value, str) if expected == TEXT else expected == FLAG
    is_number = isinstance(value, int | float) and 0 < value < LARGEST
    return is_number and (expected == NUMBER or (expected == SIZE and value == int(value)))
