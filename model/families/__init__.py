"""The families of models that are served: of each, how its config.json is read, and what its tensors are called.

`model/README.md` shows how to add one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.config import ModelConfig, read_json
from model.families import (
    glm4_moe,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    nemotron_h,
    qwen2,
    qwen3,
    qwen3_5,
    qwen3_moe,
    qwen3_next,
)
from model.families.common import Family, token_ids
from model.formats.gguf_file import is_gguf, read_gguf

# By the `model_type` of config.json.
FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "mixtral": mixtral.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
    "glm4_moe": glm4_moe.FAMILY,
    "qwen3_next": qwen3_next.FAMILY,
    "qwen3_5": qwen3_5.FAMILY,
    "qwen3_5_text": qwen3_5.FAMILY,
    "qwen3_5_moe": qwen3_5.MOE_FAMILY,
    "qwen3_5_moe_text": qwen3_5.MOE_FAMILY,
    "nemotron_h": nemotron_h.FAMILY,
}
# Families that are known, and what the decoder lacks for them.
LACKING = dict.fromkeys(
    ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "glm_moe_dsa", "kimi_k2", "kimi_k25"), "multi-head latent attention"
)


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """The config of a model, from its parsed config.json.

    Raises ValueError, naming the field, for anything that the decoder would compute differently from transformers.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        why = f", which needs {LACKING[family]}" if isinstance(family, str) and family in LACKING else ""
        raise ValueError(f"model_type is {family!r}{why}, supported are {', '.join(FAMILIES)}")
    return FAMILIES[family].read(config)


def load_config(folder: str | Path) -> ModelConfig:
    """Read `config.json` in `folder`; end-of-sequence ids come from `generation_config.json` where it has them.

    Of a GGUF file, read its metadata. Raises FileNotFoundError without a config.json and ValueError for what
    `read_config` refuses, with the path.
    """
    if is_gguf(folder):
        from model.formats import gguf  # late: few checkpoints need it

        return _named(folder, gguf.read_config(read_gguf(folder)))
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json, expected a Hugging Face checkpoint folder: check the path"
        )
    config = read_json(path)
    made = _named(path, config)
    generation = Path(folder) / "generation_config.json"
    if not generation.is_file() or (eos := read_json(generation).get("eos_token_id")) is None:
        return made
    try:
        return dataclasses.replace(made, eos_token_ids=token_ids(eos))
    except ValueError as error:
        raise ValueError(f"{generation}: {error}") from error


def _named(path: str | Path, config: Mapping[str, Any]) -> ModelConfig:
    """`read_config`, with the path in what it raises."""
    try:
        return read_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
