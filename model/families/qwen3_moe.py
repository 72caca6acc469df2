"""Qwen3 with experts in all or some layers: https://huggingface.co/docs/transformers/model_doc/qwen3_moe."""

from __future__ import annotations

from model.config import ExpertsConfig, ModelConfig
from model.families.common import EXPERT_NAMES, NAMES, Config, Family, read_decoder, size

DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 4,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
}


def read(config: Config) -> ModelConfig:
    """The config of a Qwen3 with experts."""
    given = {**DEFAULTS, **config}
    if "num_local_experts" in config and "num_experts" not in config:  # as transformers 5 writes it
        given["num_experts"] = config["num_local_experts"]
    layers, step = range(size(given, "num_hidden_layers")), size(given, "decoder_sparse_step")
    bias = bool(given.get("attention_bias", False))
    dense = given.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ValueError(f"mlp_only_layers is {dense!r:.80}, expected a list of layers")
    window = given.get("sliding_window", 4096) if given.get("use_sliding_window") else None
    return read_decoder(
        config,
        DEFAULTS,
        [window] * len(layers),
        mixed=[i not in dense and (i + 1) % step == 0 for i in layers],
        experts=ExpertsConfig(
            count=size(given, "num_experts"),
            per_token=size(given, "num_experts_per_tok"),
            ffn_size=size(given, "moe_intermediate_size"),
            renormalize=bool(given.get("norm_topk_prob", False)),
        ),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
    )


FAMILY = Family(read, {**NAMES, **EXPERT_NAMES})
