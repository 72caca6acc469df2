"""GLM-4.5 to 4.7, with a shared expert and leading dense layers.

See https://huggingface.co/docs/transformers/model_doc/glm4_moe.
"""

from __future__ import annotations

from model.config import ExpertsConfig, ModelConfig
from model.families.common import EXPERT_NAMES, NAMES, Config, Family, number, read_decoder, size

DEFAULTS = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
}
NAMES_OF_EXPERTS = {
    **EXPERT_NAMES,
    "correction": "mlp.gate.e_score_correction_bias",
    "shared_gate": "mlp.shared_experts.gate_proj",
    "shared_up": "mlp.shared_experts.up_proj",
    "shared_down": "mlp.shared_experts.down_proj",
}


def read(config: Config) -> ModelConfig:
    """The config of a GLM-4 with experts."""
    given = {**DEFAULTS, **config}
    ffn, dense = size(given, "moe_intermediate_size"), number(given, "first_k_dense_replace")
    return read_decoder(
        config,
        DEFAULTS,
        mixed=[i >= dense for i in range(size(given, "num_hidden_layers"))],
        experts=ExpertsConfig(
            count=size(given, "n_routed_experts"),
            per_token=size(given, "num_experts_per_tok"),
            ffn_size=ffn,
            shared_ffn_size=ffn * size(given, "n_shared_experts"),
            scoring="sigmoid",
            renormalize=bool(given["norm_topk_prob"]),
            scaling=number(given, "routed_scaling_factor"),
            groups=size(given, "n_group"),
            chosen_groups=size(given, "topk_group"),
            correction=True,
        ),
        partial_rotary=0.5,
        qkv_bias=bool(given.get("attention_bias", False)),
        qk_norm=bool(given.get("use_qk_norm", False)),
    )


# Layers after the last are for guessing several tokens at once, which the decoder does not do.
FAMILY = Family(read, {**NAMES, **NAMES_OF_EXPERTS}, extra_layers="num_nextn_predict_layers")
