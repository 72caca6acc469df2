"""Qwen3-Next: three gated delta nets to each layer of gated attention, with experts.

See https://huggingface.co/docs/transformers/model_doc/qwen3_next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from model.config import ATTENTION, DELTA_NET, ExpertsConfig, LayerKind, ModelConfig, RecurrentConfig
from model.families.common import EXPERT_NAMES, NAMES, Config, Family, read_decoder, size, types_of_layers
from model.formats.tensor import Tensor, rows_of

LAYER_TYPES = {"full_attention": ATTENTION, "linear_attention": DELTA_NET}
STATE_DTYPES = ("float32",)

# Those of Qwen3.5, too.
DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "num_experts_per_tok": 10,
    "num_experts": 512,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
PARTIAL_ROTARY = 0.25
DELTA_NET_NAMES = {
    "proj_qkv": "linear_attn.in_proj_qkv.weight",
    "proj_z": "linear_attn.in_proj_z.weight",
    "proj_b": "linear_attn.in_proj_b.weight",
    "proj_a": "linear_attn.in_proj_a.weight",
    "conv": "linear_attn.conv1d.weight",
    "log_rate": "linear_attn.A_log",
    "step_bias": "linear_attn.dt_bias",
    "state_norm": "linear_attn.norm.weight",
    "proj_out": "linear_attn.out_proj.weight",
}
SHARED_NAMES = {
    "shared_gate": "mlp.shared_expert.gate_proj",
    "shared_up": "mlp.shared_expert.up_proj",
    "shared_down": "mlp.shared_expert.down_proj",
    "shared_weight": "mlp.shared_expert_gate.weight",
}


def read(config: Config) -> ModelConfig:
    """The config of a Qwen3-Next."""
    given = {**DEFAULTS, **config}
    layers, step = range(size(given, "num_hidden_layers")), size(given, "decoder_sparse_step")
    dense = given.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ValueError(f"mlp_only_layers is {dense!r:.80}, expected a list of layers")
    return read_hybrid(config, DEFAULTS, [i not in dense and (i + 1) % step == 0 for i in layers])


def read_hybrid(config: Config, defaults: Config, mixed: list[bool] | None = None) -> ModelConfig:
    """The config of a model of gated delta nets and gated attention; `mixed` says which layers have experts."""
    given = {**defaults, **config}
    if (dtype := given.get("mamba_ssm_dtype", "float32")) not in STATE_DTYPES:
        raise ValueError(f"mamba_ssm_dtype is {dtype!r}, supported is float32: states are kept in it")
    count = size(given, "num_hidden_layers")
    types = types_of_layers(given) or [
        "linear_attention" if (i + 1) % size(given, "full_attention_interval") else "full_attention"
        for i in range(count)
    ]
    kinds = kinds_of(types, count, LAYER_TYPES)
    heads, key_heads = size(given, "linear_num_value_heads"), size(given, "linear_num_key_heads")
    if heads % key_heads:
        raise ValueError(
            f"linear_num_value_heads is {heads}, expected a multiple of linear_num_key_heads ({key_heads}): "
            "check that config.json is whole"
        )
    bias = bool(given.get("attention_bias", False))
    experts = mixed and ExpertsConfig(
        count=size(given, "num_experts"),
        per_token=size(given, "num_experts_per_tok"),
        ffn_size=size(given, "moe_intermediate_size"),
        shared_ffn_size=size(given, "shared_expert_intermediate_size"),
        renormalize=bool(given.get("norm_topk_prob", True)),
        shared_gate=True,
    )
    return read_decoder(
        config,
        defaults,
        layer_types=tuple(LAYER_TYPES),
        partial_rotary=PARTIAL_ROTARY,
        kinds=[LayerKind(mixer=kind, experts=has) for kind, has in zip(kinds, mixed or [False] * count, strict=True)],
        experts=experts or None,
        recurrent=RecurrentConfig(
            key_heads=key_heads,
            heads=heads,
            key_dim=size(given, "linear_key_head_dim"),
            value_dim=size(given, "linear_value_head_dim"),
            conv_width=size(given, "linear_conv_kernel_dim"),
        ),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        query_gate=True,
        centred_norms=True,
    )


def kinds_of(types: list[str], count: int, served: Mapping[str, str | None]) -> list[str | None]:
    """How each of `count` layers mixes tokens, by its type. Raises ValueError for a type that is not served.

    A model needs both a recurrent layer and attention here: without, it is of another family.
    """
    if other := sorted(set(types) - set(served)):
        raise ValueError(f"layer_types has {', '.join(other)}, supported are {', '.join(served)}")
    if len(types) != count:
        raise ValueError(f"layer_types has {len(types)} entries, expected num_hidden_layers of them ({count})")
    for needed in ("full_attention", "linear_attention"):
        if needed not in types:
            raise ValueError(f"layer_types has no {needed}, expected at least one such layer")
    return [served[each] for each in types]


def split(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Tensors with queries, keys, values, gates, strengths and decays one after the other.

    Qwen3-Next's files have the rows of all of them together for each head of keys.
    """
    sizes, found = config.recurrent, dict(tensors)
    assert sizes is not None
    k, r = sizes.key_heads, sizes.heads // sizes.key_heads
    rows = {"qkvz": [sizes.key_dim, sizes.key_dim, r * sizes.value_dim, r * sizes.value_dim], "ba": [r, r]}
    for layer, kind in enumerate(config.layers):
        for name, counts in rows.items() if kind.recurrent else ():
            prefix = f"model.layers.{layer}.linear_attn.in_proj_"
            whole, shape = found.pop(f"{prefix}{name}.weight", None), (k * sum(counts), config.embed_size)
            if whole is None or whole.shape != shape:
                lack = f"{prefix}{name}.weight" + (f" has shape {whole.shape}" if whole else " is not in the files")
                raise ValueError(f"{lack}, expected {shape}: check that config.json belongs to the checkpoint")
            numbers = np.arange(shape[0]).reshape(k, -1)
            parts = [part.reshape(-1) for part in np.split(numbers, np.cumsum(counts)[:-1], axis=1)]
            named = (
                {"qkv": np.concatenate(parts[:3]), "z": parts[3]}
                if name == "qkvz"
                else dict(zip("ba", parts, strict=True))
            )
            found |= {f"{prefix}{n}.weight": rows_of(whole, f"{prefix}{n}.weight", part) for n, part in named.items()}
    return found


FAMILY = Family(
    read, {**NAMES, **EXPERT_NAMES, **DELTA_NET_NAMES, **SHARED_NAMES}, prefixes={"mtp.": None}, split=split
)
