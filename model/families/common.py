"""What families have in common: a reader of the fields that all of them have, and the names of most tensors.

Missing keys take the defaults of transformers 5, from its configuration_<family>.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.config import LayerKind, ModelConfig, RopeConfig
from model.formats.quantization import reader_for

Config = Mapping[str, Any]  # a parsed config.json

FULL_OR_SLIDING = ("full_attention", "sliding_attention")

# Tensors by what they are; those of a layer follow `model.layers.N.`. A matrix and its bias end in .weight and .bias.
NAMES: Mapping[str, str] = {
    "attn_norm": "input_layernorm.weight",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
DEFAULTS: Config = {
    "num_key_value_heads": None,  # as many as query heads
    "head_dim": None,  # hidden_size / num_attention_heads
    "eos_token_id": None,
    "rms_norm_eps": 1e-6,
}


@dataclass(frozen=True)
class Family:
    """One `model_type`: the reader of its config.json, and the names of its tensors."""

    read: Callable[[Config], ModelConfig]
    names: Mapping[str, str]


def read_decoder(
    config: Config,
    defaults: Config,
    windows: Sequence[int | None] | None = None,
    layer_types: Sequence[str] = ("full_attention",),
    partial_rotary: float | None = None,
    **own: Any,
) -> ModelConfig:
    """The fields that all families have, with the family's `defaults`, and its `own` fields of ModelConfig.

    `windows` has the window of each layer, for a family that may have one; `layer_types` are those that the family
    serves; `partial_rotary` is the default share of a head that rotates, where not all of it does. Raises ValueError
    for what is missing or would change the result.
    """
    given = {**DEFAULTS, **defaults, **config}
    max_position = size(given, "max_position_embeddings")
    if (activation := given.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"hidden_act is {activation!r}, supported is 'silu'")
    reader_for(given)  # refuses what it cannot read
    if other := sorted(set(given.get("layer_types") or ()) - set(layer_types)):
        raise ValueError(f"layer_types has {', '.join(other)}, supported is {' and '.join(layer_types)}")

    embed, heads = size(given, "hidden_size"), size(given, "num_attention_heads")
    count = size(given, "num_hidden_layers")
    # A window at least as long as any sequence masks nothing.
    active = [w if w is not None and w < max_position else None for w in windows or (None,) * count]
    if window := next(filter(None, active), None):
        raise ValueError(
            f"sliding_window of {window} tokens is active, supported is full attention (sliding_window null, "
            f"or at least max_position_embeddings {max_position}): use a checkpoint without it"
        )
    fields: dict[str, Any] = {
        "ffn_size": size(given, "intermediate_size") if "ffn_size" not in own else own.pop("ffn_size"),
        "layers": tuple(LayerKind(window) for window in active),
    }
    made = ModelConfig(
        family=given["model_type"],
        vocab_size=size(given, "vocab_size"),
        embed_size=embed,
        num_layers=count,
        num_heads=heads,
        num_kv_heads=heads if given["num_key_value_heads"] is None else size(given, "num_key_value_heads"),
        head_dim=embed // heads if given["head_dim"] is None else size(given, "head_dim"),
        max_position=max_position,
        norm_eps=float(given["rms_norm_eps"]),
        rope=RopeConfig.from_hf(given, max_position, partial_rotary),
        tie_embeddings=bool(given.get("tie_word_embeddings", False)),
        eos_token_ids=token_ids(given["eos_token_id"]),
        **(fields | own),
    )
    if made.num_heads % made.num_kv_heads:
        raise ValueError(
            f"num_attention_heads is {made.num_heads}, expected a multiple of num_key_value_heads "
            f"({made.num_kv_heads}): check that config.json is whole"
        )
    if made.head_dim % 2:
        raise ValueError(f"head_dim is {made.head_dim}, expected an even number: rotation works on pairs")
    return made


def windows_by_type(config: Config, default: Callable[[int], bool]) -> list[int | None]:
    """The window of each layer: `sliding_window` where `layer_types`, or else `default`, says that it has one."""
    layers, types = range(size(config, "num_hidden_layers")), config.get("layer_types")
    if types and len(types) != len(layers):
        raise ValueError(f"layer_types has {len(types)} entries, expected num_hidden_layers of them ({len(layers)})")
    sliding = [types[i] == "sliding_attention" if types else default(i) for i in layers]
    return [config["sliding_window"] if slides else None for slides in sliding]


def size(config: Config, key: str) -> int:
    """A positive whole number from the config."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} is {value!r}, expected a positive whole number: check that config.json is complete")
    return value


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """End-of-sequence ids, which the files give as null, one id or a list."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
