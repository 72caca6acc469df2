"""What families have in common: a reader of the fields that all of them have, and the names of most tensors.

Missing keys take the defaults of transformers 5, from its configuration_<family>.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from model.config import ExpertsConfig, LayerKind, ModelConfig, RopeConfig
from model.formats.quantization import reader_for
from model.formats.tensor import Tensor

Config = Mapping[str, Any]  # a parsed config.json

# No model comes near these; beyond them, a mistake in a file would take all memory.
MOST_LAYERS, MOST = 10_000, 2**53

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
# Those of a layer with experts, each by itself, as most families store them.
EXPERT_NAMES: Mapping[str, str] = {
    "router": "mlp.gate",
    "expert_gate": "mlp.experts.{}.gate_proj.weight",
    "expert_up": "mlp.experts.{}.up_proj.weight",
    "expert_down": "mlp.experts.{}.down_proj.weight",
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
    extra_layers: str | None = None  # the field that says how many layers of a file come after the last, unused
    # How names in a file begin, and how they begin in `names`: the first that fits. None: the tensor is left aside.
    prefixes: Mapping[str, str | None] = field(default_factory=dict)
    # From tensors under those names to those of `names`, where a file has several in one.
    split: Callable[[Mapping[str, Tensor], ModelConfig], dict[str, Tensor]] | None = None


def renamed(tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """The tensors of a file under the names that the family has for them, without those that are left aside."""
    found = {}
    for name, tensor in tensors.items():
        prefix, ours = next(((a, b) for a, b in family.prefixes.items() if name.startswith(a)), ("", ""))
        if ours is not None:
            found[ours + name.removeprefix(prefix)] = tensor
    return found


def read_decoder(
    config: Config,
    defaults: Config,
    windows: Sequence[Any] | None = None,
    layer_types: Sequence[str] = ("full_attention",),
    partial_rotary: float | None = None,
    mixed: Sequence[bool] | None = None,
    experts: ExpertsConfig | None = None,
    kinds: Sequence[LayerKind] | None = None,
    rope: RopeConfig | None = None,
    **own: Any,
) -> ModelConfig:
    """The fields that all families have, with the family's `defaults`, and its `own` fields of ModelConfig.

    `windows` has the window of each layer as the file says, for a family that may have one; `layer_types` are those
    that the family serves; `partial_rotary` is the default share of a head that rotates, where not all of it does;
    `mixed` says which layers have the `experts`, or `kinds` what each layer is; `rope` is that of a family whose files
    say nothing of it. Raises ValueError for what is missing or would change the result.
    """
    given = {**DEFAULTS, **defaults, **config}
    refuse_unsupported(given, layer_types)
    max_position = size(given, "max_position_embeddings")
    embed, heads = size(given, "hidden_size"), size(given, "num_attention_heads")
    count = size(given, "num_hidden_layers")
    for window in windows or ():
        if window is not None:
            size({"sliding_window": window}, "sliding_window")
    layers = tuple(kinds or map(LayerKind, windows or (None,) * count, mixed or (False,) * count))
    made = ModelConfig(
        family=given["model_type"],
        vocab_size=size(given, "vocab_size"),
        embed_size=embed,
        ffn_size=size(given, "intermediate_size") if any(k.feed_forward and not k.experts for k in layers) else 0,
        num_layers=count,
        num_heads=heads,
        num_kv_heads=heads if given["num_key_value_heads"] is None else size(given, "num_key_value_heads"),
        head_dim=embed // heads if given["head_dim"] is None else size(given, "head_dim"),
        max_position=max_position,
        norm_eps=number(given, "rms_norm_eps"),
        rope=rope or RopeConfig.from_hf(given, max_position, partial_rotary),
        tie_embeddings=bool(given.get("tie_word_embeddings", False)),
        eos_token_ids=token_ids(given["eos_token_id"]),
        layers=layers,
        experts=checked(experts) if any(kind.experts for kind in layers) else None,
        **own,
    )
    if made.num_heads % made.num_kv_heads:
        raise ValueError(
            f"num_attention_heads is {made.num_heads}, expected a multiple of num_key_value_heads "
            f"({made.num_kv_heads}): check that config.json is whole"
        )
    if made.head_dim % 2:
        raise ValueError(f"head_dim is {made.head_dim}, expected an even number: rotation works on pairs")
    return made


def refuse_unsupported(config: Config, layer_types: Sequence[str]) -> None:
    """Raise ValueError for fields that make transformers compute any family in a way that the decoder lacks."""
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"hidden_act is {activation!r}, supported is 'silu'")
    reader_for(config)  # refuses what it cannot read
    if other := sorted(set(types_of_layers(config)) - set(layer_types)):
        raise ValueError(f"layer_types has {', '.join(other)}, supported is {' and '.join(layer_types)}")
    if not config.get("is_causal", True):
        raise ValueError(f"is_causal is {config['is_causal']}, supported is true (a token sees those before it)")
    if config.get("per_layer_config"):
        raise ValueError("per_layer_config has fields of single layers, supported are the same for all layers")


def checked(experts: ExpertsConfig | None) -> ExpertsConfig | None:
    """The experts, or ValueError where a token cannot have so many of them."""
    if experts:
        allowed = experts.count // experts.groups * experts.chosen_groups
        if experts.count % experts.groups or not experts.per_token <= allowed <= experts.count:
            raise ValueError(
                f"a token goes through {experts.per_token} of {experts.count} experts, from {experts.chosen_groups} of "
                f"{experts.groups} groups, which cannot be: check that config.json is whole"
            )
    return experts


def windows_by_type(config: Config, default: Callable[[int], bool]) -> list[Any]:
    """The window of each layer: `sliding_window` where `layer_types`, or else `default`, says that it has one."""
    layers, types = range(size(config, "num_hidden_layers")), types_of_layers(config)
    if types and len(types) != len(layers):
        raise ValueError(f"layer_types has {len(types)} entries, expected num_hidden_layers of them ({len(layers)})")
    sliding = [types[i] == "sliding_attention" if types else default(i) for i in layers]
    return [config["sliding_window"] if slides else None for slides in sliding]


def types_of_layers(config: Config) -> list[str]:
    """The types of the layers, none without that field. Raises ValueError for what is no list of them."""
    types = config.get("layer_types") or []
    if not (isinstance(types, list) and all(isinstance(each, str) for each in types)):
        raise ValueError(f"layer_types is {types!r:.80}, expected a list with the type of each layer")
    return types


def size(config: Config, key: str) -> int:
    """A positive whole number from the config, not beyond what a model can have of it."""
    value, most = config.get(key), MOST_LAYERS if key == "num_hidden_layers" else MOST
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"{key} is {value!r:.80}, expected a positive whole number: check that config.json is complete"
        )
    if value > most:
        raise ValueError(f"{key} is {value:.3g}, expected at most {most:,}: check that config.json is whole")
    return value


def number(config: Config, key: str) -> float:
    """A number from the config."""
    value = config.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{key} is {value!r}, expected a number: check that config.json is complete")
    return float(value)


def token_ids(value: Any) -> tuple[int, ...]:
    """End-of-sequence ids, which the files give as null, one id or a list. Raises ValueError for anything else."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(id, int) and not isinstance(id, bool) for id in ids):
        raise ValueError(f"eos_token_id is {value!r:.80}, expected the number of a token, or a list of them")
    return tuple(ids)
