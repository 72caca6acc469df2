"""Nemotron-H and Nemotron 3: layers that are each a Mamba-2, attention without rotation, or a feed-forward block.

See https://huggingface.co/docs/transformers/model_doc/nemotron_h. As there, no time step is below `time_step_min`.
"""

from __future__ import annotations

from typing import Any

from model.config import ATTENTION, MAMBA2, NO_ROPE, ExpertsConfig, LayerKind, ModelConfig, RecurrentConfig, RopeConfig
from model.families.common import Config, Family, number, read_decoder, size
from model.families.qwen3_next import kinds_of

# By the names of transformers 5, and by the letters of `hybrid_override_pattern`.
LAYER_TYPES = {"linear_attention": MAMBA2, "full_attention": ATTENTION, "moe": None, "mlp": None}
LEGACY = {"mamba": "linear_attention", "attention": "full_attention"}
PATTERN = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "eos_token_id": 2,
    "intermediate_size": 21504,
    "layer_norm_epsilon": 1e-5,
    "ssm_state_size": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "mamba_ssm_cache_dtype": "float32",
    "n_groups": 8,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "time_step_min": 0.001,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
}
# Fields that the decoder has one value for.
FIXED = {
    "mamba_hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "mamba_ssm_cache_dtype": "float32",
    "use_bias": False,
    "mlp_bias": False,
    "mamba_proj_bias": False,
}
NAMES = {
    "attn_norm": "norm.weight",
    "mlp_norm": "norm.weight",
    "query": "mixer.q_proj",
    "key": "mixer.k_proj",
    "value": "mixer.v_proj",
    "out": "mixer.o_proj",
    "up": "mixer.up_proj",
    "down": "mixer.down_proj",
    "proj_in": "mixer.in_proj.weight",
    "conv": "mixer.conv1d.weight",
    "conv_bias": "mixer.conv1d.bias",
    "log_rate": "mixer.A_log",
    "step_bias": "mixer.dt_bias",
    "skip": "mixer.D",
    "state_norm": "mixer.norm.weight",
    "proj_out": "mixer.out_proj.weight",
    "router": "mixer.gate",
    "correction": "mixer.gate.e_score_correction_bias",
    "expert_up": "mixer.experts.{}.up_proj.weight",
    "expert_down": "mixer.experts.{}.down_proj.weight",
    "shared_up": "mixer.shared_experts.up_proj",
    "shared_down": "mixer.shared_experts.down_proj",
    "latent_in": "mixer.fc1_latent_proj.weight",
    "latent_out": "mixer.fc2_latent_proj.weight",
}
PREFIXES = {
    "backbone.embeddings.": "model.embed_tokens.",
    "backbone.norm_f.": "model.norm.",
    "backbone.": "model.",
    "model.embeddings.": "model.embed_tokens.",
    "model.norm_f.": "model.norm.",
    "mtp.": None,
}


def read(config: Config) -> ModelConfig:
    """The config of a Nemotron-H."""
    given = {**DEFAULTS, **config}
    for field, expected in FIXED.items():
        if (found := given.get(field, expected)) != expected:
            raise ValueError(f"{field} is {found!r}, supported is {expected!r}")
    if (window := given.get("sliding_window")) is not None:
        raise ValueError(f"sliding_window is {window!r}, supported is none: attention sees all keys")
    types = types_of(given)
    mixers = kinds_of(types, len(types), LAYER_TYPES)
    kinds = [
        LayerKind(mixer=mixer, experts=each == "moe", feed_forward=each in ("moe", "mlp"))
        for each, mixer in zip(types, mixers, strict=True)
    ]
    heads, groups = size(given, "mamba_num_heads"), size(given, "n_groups")
    if heads % groups:
        raise ValueError(
            f"mamba_num_heads is {heads}, expected a multiple of n_groups ({groups}): check that config.json is whole"
        )
    latent = given.get("moe_latent_size")
    plain = {"num_hidden_layers": len(types), "rms_norm_eps": number(given, "layer_norm_epsilon"), "layer_types": None}
    return read_decoder(
        {**config, **plain},
        DEFAULTS,
        kinds=kinds,
        rope=RopeConfig(kind=NO_ROPE),
        experts=ExpertsConfig(
            count=size(given, "n_routed_experts"),
            per_token=size(given, "num_experts_per_tok"),
            ffn_size=size(given, "moe_intermediate_size"),
            shared_ffn_size=size(given, "moe_shared_expert_intermediate_size"),
            scoring="sigmoid",
            renormalize=bool(given["norm_topk_prob"]),
            scaling=number(given, "routed_scaling_factor"),
            groups=size(given, "n_group"),
            chosen_groups=size(given, "topk_group"),
            correction=True,
            latent_size=None if latent is None else size(given, "moe_latent_size"),
        ),
        recurrent=RecurrentConfig(
            key_heads=groups,
            heads=heads,
            key_dim=size(given, "ssm_state_size"),
            value_dim=size(given, "mamba_head_dim"),
            conv_width=size(given, "conv_kernel"),
            conv_bias=bool(given["use_conv_bias"]),
            min_step=number(given, "time_step_min"),
        ),
        activation="relu2",
    )


def types_of(config: Config) -> list[str]:
    """The type of each layer. Raises ValueError for a pattern that is not served."""
    pattern = config.get("hybrid_override_pattern")
    types = config.get("layers_block_type") or config.get("layer_types")
    if types is None and isinstance(pattern, str):
        if other := sorted(set(pattern) - set(PATTERN)):
            raise ValueError(f"hybrid_override_pattern has {', '.join(other)}, supported are {', '.join(PATTERN)}")
        return [PATTERN[letter] for letter in pattern]
    if not (isinstance(types, list) and types and all(isinstance(each, str) for each in types)):
        raise ValueError(f"layers_block_type is {types!r:.80}, expected a list with the type of each layer")
    return [LEGACY.get(str(each), str(each)) for each in types]


FAMILY = Family(read, NAMES, prefixes=PREFIXES)
