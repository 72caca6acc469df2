"""Stretching a checkpoint's context beyond what its config says: another rope scaling, and the limit that follows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig, RopeConfig


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
    what the checkpoint was trained on. Raises ValueError as `RopeConfig.from_hf` does.
    """
    given = scaling.get("original_max_position_embeddings")
    original = int(given or config.rope.original_max_position or config.max_position)
    rope = _rope(scaling, config.rope.theta, original)
    rope = dataclasses.replace(rope, partial=config.rope.partial)
    return dataclasses.replace(config, rope=rope, max_position=round(original * rope.factor))


def _rope(scaling: Mapping[str, Any], theta: float, original: int) -> RopeConfig:
    """The rotation with this scaling. Raises ValueError for what is not a number, and as `RopeConfig.from_hf` does."""
    for name, value in scaling.items():
        if name not in ("rope_type", "type", "truncate") and (isinstance(value, bool) or not _is_number(value)):
            raise ValueError(f"rope_scaling has {name} {value!r}, expected a positive number")
    return RopeConfig.from_hf({"rope_theta": theta, "rope_scaling": dict(scaling)}, original)


def _is_number(value: Any) -> bool:
    """Whether a value is a positive number."""
    return isinstance(value, int | float) and 0 < value < float("inf")
