"""Qwen3.5 to 3.8, the text of them: three gated delta nets to each layer of gated attention, dense or with experts.

See https://huggingface.co/docs/transformers/model_doc/qwen3_5. Positions in three dimensions are those of images; those
of text are the same in all three, which is plain rotation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.families.common import EXPERT_NAMES, NAMES, Config, Family, size
from model.families.qwen3_next import DEFAULTS as NEXT
from model.families.qwen3_next import DELTA_NET_NAMES, SHARED_NAMES, read_hybrid
from model.formats.tensor import Tensor, matrix_of

DEFAULTS: dict[str, Any] = {**NEXT, "num_key_value_heads": 4}
MOE_DEFAULTS: dict[str, Any] = {**NEXT, "num_experts_per_tok": 8, "num_experts": 256}
# Of the whole model, text and images.
PREFIXES = {"model.language_model.": "model.", "model.visual.": None, "visual.": None, "mtp.": None}
# What the config of a whole model says beside `text_config` and is true of its text.
OUTER = ("quantization_config", "tie_word_embeddings", "eos_token_id")


def read(config: Config) -> ModelConfig:
    """The config of a dense Qwen3.5."""
    return read_hybrid(text(config), DEFAULTS)


def read_moe(config: Config) -> ModelConfig:
    """The config of a Qwen3.5 with experts."""
    of_text = text(config)
    return read_hybrid(of_text, MOE_DEFAULTS, [True] * size(of_text, "num_hidden_layers"))


def text(config: Config) -> Config:
    """The config of a model's text. Raises ValueError for a `text_config` of another family."""
    if str(config["model_type"]).endswith("_text"):
        return config
    of_text, expected = config.get("text_config"), f"{config['model_type']}_text"
    if not isinstance(of_text, Mapping) or of_text.get("model_type", expected) != expected:
        raise ValueError(f"text_config is {of_text!r:.80}, expected a JSON object of model_type {expected}")
    outer = {key: config[key] for key in OUTER if config.get(key) is not None}
    return {"model_type": expected, **of_text, **outer}


def split(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Tensors with each expert's matrices by themselves; some files have those of a layer in one tensor."""
    experts, found = config.experts, dict(tensors)
    assert experts is not None
    x, f, e = experts.count, experts.ffn_size, config.embed_size
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        of_files = {
            "gate_up_proj": ((x, 2 * f, e), {"gate_proj": slice(0, f), "up_proj": slice(f, 2 * f)}),
            "down_proj": ((x, e, f), {"down_proj": slice(0, e)}),
        }
        for name, (shape, parts) in of_files.items():
            if (whole := found.pop(f"{prefix}.{name}", None)) is None:
                continue
            if whole.shape != shape:
                raise ValueError(
                    f"{whole.path}: {whole.name} has shape {whole.shape}, expected {shape}: check that config.json "
                    "belongs to it"
                )
            for number in range(x):
                for part, rows in parts.items():
                    own = f"{prefix}.{number}.{part}.weight"
                    found[own] = matrix_of(whole, own, number, rows)
    return found


FAMILY = Family(read, {**NAMES, **DELTA_NET_NAMES}, prefixes=PREFIXES)
MOE_FAMILY = Family(
    read_moe, {**NAMES, **EXPERT_NAMES, **DELTA_NET_NAMES, **SHARED_NAMES}, prefixes=PREFIXES, split=split
)
