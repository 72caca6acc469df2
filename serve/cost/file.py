"""A cost model's file: the constants that a sweep was fitted to, and the model that they belong to."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from model.config import ModelConfig
from serve.cost.model import Constants, cost_model


class CostFile(msgspec.Struct, frozen=True):
    """The part of a cost model's file that the server reads; a fit writes more, for people."""

    constants: Constants
    linear_flops: float | None  # identify the model; None for an endpoint whose model is unknown
    attention_flops: float | None


def file_contents(constants: Constants, config: ModelConfig | None, **about: Any) -> dict[str, Any]:
    """A cost model's file as JSON values; `config` is the measured model's, `about` is written beside it."""
    model = cost_model(config) if config else None
    return {
        "constants": asdict(constants),
        "linear_flops": model and model.token_flops,
        "attention_flops": model and model.attention_flops,
        **about,
    }


def load_constants(path: str | Path, config: ModelConfig) -> Constants:
    """The constants in a cost model's file, for a server of this model.

    Raises OSError for a file that cannot be read, ValueError for one that is not a cost model, or another model's.
    """
    try:
        found = msgspec.json.decode(Path(path).read_bytes(), type=CostFile)
    except msgspec.MsgspecError as error:
        raise ValueError(
            f"{path} is not a cost model: {error}; write one with `python -m experiments.sweep.fit`"
        ) from None
    model = cost_model(config)
    if (found.linear_flops, found.attention_flops) != (model.token_flops, model.attention_flops):
        raise ValueError(
            f"{path} was fitted to a model of {found.linear_flops} FLOP a token and {found.attention_flops} a pair, "
            f"expected {model.token_flops} and {model.attention_flops}: fit one to this model"
        )
    return found.constants
