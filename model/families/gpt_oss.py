"""gpt-oss: experts in all layers, windows on every other one, and sinks.

See https://huggingface.co/docs/transformers/model_doc/gpt_oss.
"""

from __future__ import annotations

from model.config import ExpertsConfig, ModelConfig
from model.families.common import (
    FULL_OR_SLIDING,
    NAMES,
    Config,
    Family,
    number,
    read_decoder,
    size,
    windows_by_type,
)

DEFAULTS = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}
NAMES_OF_EXPERTS = {
    "sinks": "self_attn.sinks",
    "router": "mlp.router",
    "experts_gate_up": "mlp.experts.gate_up_proj",
    "experts_down": "mlp.experts.down_proj",
}


def read(config: Config) -> ModelConfig:
    """The config of a gpt-oss."""
    if config.get("rope_parameters", 0) is None:  # in transformers, the default
        config = {**config, "rope_parameters": DEFAULTS["rope_parameters"]}
    given = {**DEFAULTS, **config}
    bias = bool(given.get("attention_bias", True))
    return read_decoder(
        config,
        DEFAULTS,
        windows_by_type(given, lambda layer: layer % 2 == 0),
        FULL_OR_SLIDING,
        mixed=[True] * size(given, "num_hidden_layers"),
        experts=ExpertsConfig(
            count=size(given, "num_local_experts"),
            per_token=size(given, "num_experts_per_tok"),
            ffn_size=size(given, "intermediate_size"),
            router_bias=True,
            biases=True,
            clamp=(number(given, "swiglu_alpha"), number(given, "swiglu_limit")),
        ),
        qkv_bias=bias,
        out_bias=bias,
        sinks=True,
    )


FAMILY = Family(read, {**NAMES, **NAMES_OF_EXPERTS})
