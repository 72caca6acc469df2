"""A checkpoint of Qwen3's shape as a GGUF file with its tokenizer and chat template, in float32.

The keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

# A layer's tensors: Hugging Face's name below `model.layers.N.`, GGUF's below `blk.N.`.
LLAMA_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LAYER = LLAMA_LAYER | {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}


def tensors_of(folder: Path, layers: int, layer: Mapping[str, str] = LAYER) -> Iterator[tuple[str, np.ndarray]]:
    """GGUF's name and values of every tensor; the tied head is the embedding and has none of its own."""
    tensors = load_file(folder / "model.safetensors")
    yield "token_embd.weight", tensors["model.embed_tokens.weight"]
    yield "output_norm.weight", tensors["model.norm.weight"]
    for number in range(layers):
        for theirs, name in layer.items():
            yield f"blk.{number}.{name}.weight", tensors[f"model.layers.{number}.{theirs}.weight"]


def add_shape(writer: Any, config: Mapping[str, Any]) -> None:
    """Give the file the sizes that a `config.json` has for every family."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def write_tensors(writer: Any, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write the file: what was added to the writer, and then the tensors in float32."""
    writer.add_file_type(0)  # all float32
    for name, values in tensors:
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(folder: Path, path: Path) -> None:
    """Write the demo model's checkpoint in `folder` as a GGUF file. Raises ValueError for another kind of model."""
    from gguf import GGUFWriter, TokenType

    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "qwen3" or not config["tie_word_embeddings"]:
        raise ValueError(f"{folder}: expected a qwen3 with tied embeddings, got a {config['model_type']}")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = {token["content"]: token["special"] for token in tokenizer["added_tokens"]}
    ids = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    kinds = {True: TokenType.CONTROL, False: TokenType.USER_DEFINED, None: TokenType.NORMAL}

    writer = GGUFWriter(path, "qwen3")
    add_shape(writer, config)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")  # the split of the demo model's tokenizer
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[added.get(token)] for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(settings["chat_template"])
    write_tensors(writer, tensors_of(folder, config["num_hidden_layers"]))
