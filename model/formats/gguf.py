"""GGUF checkpoints: the metadata as a config.json would have it, and tensors under Hugging Face's names.

The names are those of https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py. Values are
dequantised by the `gguf` package when they are asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from model.formats.gguf_file import GgufFile, StoredTensor
from model.formats.gguf_rope import ROPE_FREQS, rope_scaling
from model.formats.tensor import Grouped, Stored, Tensor

Config = dict[str, Any]  # as a config.json has it
Kind = GGMLQuantizationType

FLOATS = {Kind.F32: np.dtype(np.float32), Kind.F16: np.dtype(np.float16), Kind.BF16: np.dtype(ml_dtypes.bfloat16)}
QUANTISED = (Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.MXFP4)
SERVED = FLOATS | dict.fromkeys(QUANTISED, np.dtype(np.float32))  # the dtype of each type's values
GROUP = 32  # values of a block of the kinds in KEPT
# The types whose matrices can stay quantised: bits, group, and whether groups have offsets.
KEPT = {Kind.Q8_0: (8, GROUP, False), Kind.Q4_0: (4, GROUP, False), Kind.Q4_1: (4, GROUP, True)}
BLOCKS_IN_A_ROW = 512  # at most: the package works on 16 rows at a time, whatever their length

# Names below `blk.N.` and below `model.layers.N.`; what follows, `.weight` or `.bias`, stays.
ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
FFN_NORM = {"ffn_norm": "post_attention_layernorm"}
PLAIN = ATTENTION | FFN_NORM | {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GATES, UPS, DOWNS = EXPERTS = (
    "ffn_gate_exps",
    "ffn_up_exps",
    "ffn_down_exps",
)  # of all experts of a layer: [experts, out, in]
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

EMBED, HEAD = "token_embd.weight", "output.weight"

CONTROL = 3  # of a token, in `tokenizer.ggml.token_type`
# Files name one end of each kind, and models have more: those of the architectures above, as llama.cpp takes them, too
# (https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp). gpt-oss' `<|end|>` only ends a message.
ENDS = frozenset(
    ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|return|>", "<|call|>")
)
NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<name>\w+)\.(?P<rest>weight|bias)")


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture`: its model_type, what its layers' tensors are called, and fields of its own."""

    model_type: str
    layer: Mapping[str, str]
    own: Callable[[GgufFile], Config] = lambda file: {}
    interleaved: bool = False  # whether rows of queries and keys are in the order of llama.cpp's rotation
    experts: Mapping[str, str] | None = None  # names of an expert's projections, {} for its number
    fused: bool = False  # whether Hugging Face has the experts of a layer together, transposed, as in gpt-oss


def biases(file: GgufFile) -> Config:
    """Which projections have biases, as llama and qwen3 may."""
    return {"attention_bias": "blk.0.attn_q.bias" in file.tensors, "mlp_bias": "blk.0.ffn_up.bias" in file.tensors}


def mixtral(file: GgufFile) -> Config:
    """Fields of a Mixtral, which llama.cpp calls a llama with experts."""
    return {
        "num_local_experts": file.value("llama.expert_count", int),
        "num_experts_per_tok": file.value("llama.expert_used_count", int),
        "sliding_window": None,
    }


def qwen3_moe(file: GgufFile) -> Config:
    """Fields of a Qwen3 with experts; llama.cpp always makes their weights sum to one."""
    return biases(file) | {
        "num_experts": file.value("qwen3moe.expert_count", int),
        "num_experts_per_tok": file.value("qwen3moe.expert_used_count", int),
        "moe_intermediate_size": file.value("qwen3moe.expert_feed_forward_length", int),
        "norm_topk_prob": True,
    }


def gpt_oss(file: GgufFile) -> Config:
    """Fields of a gpt-oss."""
    return {
        "num_local_experts": file.value("gpt-oss.expert_count", int),
        "num_experts_per_tok": file.value("gpt-oss.expert_used_count", int),
        "intermediate_size": file.value("gpt-oss.expert_feed_forward_length", int),
        "sliding_window": file.value("gpt-oss.attention.sliding_window", int),
    }


MIXTRAL = Architecture(
    "mixtral",
    ATTENTION | FFN_NORM | {"ffn_gate_inp": "block_sparse_moe.gate"},
    mixtral,
    interleaved=True,
    experts={name: f"block_sparse_moe.experts.{{}}.{own}" for name, own in ((GATES, "w1"), (UPS, "w3"), (DOWNS, "w2"))},
)
ARCHITECTURES = {
    "llama": Architecture("llama", PLAIN, biases, interleaved=True),
    "qwen2": Architecture("qwen2", PLAIN),
    "qwen3": Architecture("qwen3", PLAIN | HEAD_NORMS, biases),
    "qwen3moe": Architecture(
        "qwen3_moe",
        ATTENTION | FFN_NORM | HEAD_NORMS | {"ffn_gate_inp": "mlp.gate"},
        qwen3_moe,
        experts={name: f"mlp.experts.{{}}.{own}_proj" for name, own in ((GATES, "gate"), (UPS, "up"), (DOWNS, "down"))},
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        ATTENTION
        | {
            "post_attention_norm": "post_attention_layernorm",
            "attn_sinks": "self_attn.sinks",
            "ffn_gate_inp": "mlp.router",
        },
        gpt_oss,
        fused=True,
    ),
}


def architecture_of(file: GgufFile) -> tuple[str, Architecture]:
    """The name of a file's architecture, and what it is. Raises ValueError for one that is not served."""
    name = file.value("general.architecture", str)
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{file.path}: general.architecture is {name!r}, supported are {', '.join(ARCHITECTURES)}: "
            "use another checkpoint"
        )
    if (parts := file.value("split.count", int, 1)) > 1:
        raise ValueError(f"{file.path}: split.count is {parts}, expected one file: merge it with llama-gguf-split")
    mixed = name == "llama" and file.value("llama.expert_count", int, 0)
    return name, MIXTRAL if mixed else ARCHITECTURES[name]


def read_config(file: GgufFile) -> Config:
    """The config.json that a file's metadata stands for. Raises ValueError naming the field that is wrong."""
    name, architecture = architecture_of(file)
    _check_tensors(file, name, architecture)

    def number(field: str, default: int | None = None) -> int:
        found: int = file.value(f"{name}.{field}", int, default)
        if found < 1:
            raise ValueError(f"{file.path}: {name}.{field} is {found}, expected at least 1: convert it again")
        return found

    embed, heads = number("embedding_length"), number("attention.head_count")
    head = number("attention.key_length", embed // heads)
    rotated = number("rope.dimension_count", head)
    if (value := number("attention.value_length", head)) != head:
        raise ValueError(f"{file.path}: {name}.attention.value_length is {value}, expected key_length ({head})")
    return {
        "model_type": architecture.model_type,
        "vocab_size": file.tensors[EMBED].shape[0],
        "hidden_size": embed,
        # Models whose layers all have experts may have no dense one.
        "intermediate_size": number("feed_forward_length", file.metadata.get(f"{name}.expert_feed_forward_length")),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head,
        "partial_rotary_factor": rotated / head,
        "rms_norm_eps": file.value(f"{name}.attention.layer_norm_rms_epsilon", float),
        "max_position_embeddings": number("context_length"),
        "rope_theta": file.value(f"{name}.rope.freq_base", float, 10000.0),
        "rope_scaling": rope_scaling(file, name, head),
        "tie_word_embeddings": HEAD not in file.tensors,
        "eos_token_id": end_ids(file),
        **architecture.own(file),
    }


def end_ids(file: GgufFile) -> list[int]:
    """The tokens that end an answer: of the sequence, of the turn, and of a message, and control tokens named so."""
    ids = [file.value(f"tokenizer.ggml.{kind}_token_id", int, -1) for kind in ("eos", "eot", "eom")]
    tokens = file.value("tokenizer.ggml.tokens", list, [])
    kinds = file.value("tokenizer.ggml.token_type", np.ndarray, np.empty(0))
    named = enumerate(zip(tokens, kinds, strict=False))
    ids += [id for id, (token, kind) in named if kind == CONTROL and token in ENDS]
    return list(dict.fromkeys(id for id in ids if id >= 0))


def tensors_of(file: GgufFile) -> dict[str, Tensor]:
    """A file's tensors under their Hugging Face names; one without keeps its own.

    Raises ValueError for one that is missing, and for a type that is not served.
    """
    name, architecture = architecture_of(file)
    _check_tensors(file, name, architecture)
    heads = file.value(f"{name}.attention.head_count", int)
    interleaved = {"attn_q": heads, "attn_k": file.value(f"{name}.attention.head_count_kv", int, heads)}
    found = {}
    for own, stored in file.tensors.items():
        if own == ROPE_FREQS:  # part of the config
            continue
        match = NAME.fullmatch(own)
        if match is None:
            found[own] = _tensor(file.path, own, stored)
        elif match["name"] in EXPERTS and architecture.fused:
            continue
        elif match["name"] in EXPERTS and architecture.experts:
            pattern = f"model.layers.{match['layer']}.{architecture.experts[match['name']]}.{match['rest']}"
            found |= {pattern.format(i): _tensor(file.path, own, each) for i, each in enumerate(each_of(stored))}
        else:
            order = None
            if architecture.interleaved and match["name"] in interleaved:
                order = row_order(stored.shape[0], interleaved[match["name"]])
            found[_hf_name(match, architecture)] = _tensor(file.path, own, stored, order)
    return found | (fused_experts(file, name) if architecture.fused else {})


def _check_tensors(file: GgufFile, name: str, architecture: Architecture) -> None:
    """Raise ValueError for a type that is not served, and for a tensor that is missing and every such model has."""
    for each, stored in file.tensors.items():
        if stored.kind not in SERVED:
            served = ", ".join(kind.name for kind in SERVED)
            raise ValueError(f"{file.path}: {each} is {stored.kind.name}, supported are {served}: use another file")
        if stored.kind not in FLOATS and len(stored.shape) < 2:
            raise ValueError(
                f"{file.path}: {each} is {stored.kind.name} and has shape {stored.shape}, expected a matrix: "
                "convert it again"
            )
    layers = file.value(f"{name}.block_count", int)
    in_layer = (*architecture.layer, *(EXPERTS if architecture.experts or architecture.fused else ()))
    of_layers = (f"blk.{i}.{each}.weight" for i in range(layers) for each in in_layer)
    for needed in chain((EMBED, "output_norm.weight"), of_layers):
        if needed not in file.tensors:
            raise ValueError(
                f"{file.path} lacks {needed}, expected all of a {name} with {layers} layers: download it again"
            )


def each_of(stored: StoredTensor) -> Iterator[StoredTensor]:
    """The matrices of experts, [experts, outputs, inputs], one by one."""
    for data in stored.data.reshape(stored.shape[0], -1):
        yield StoredTensor(stored.shape[1:], stored.kind, data)


def fused_experts(file: GgufFile, name: str) -> dict[str, Tensor]:
    """gpt-oss' experts as Hugging Face has them: those of a layer together, gate and up by turns, inputs first.

    Raises ValueError if the file lacks one of their biases.
    """
    found = {}
    for layer in range(file.value(f"{name}.block_count", int)):
        for rest, ending in (("weight", ""), ("bias", "_bias")):
            parts = []
            for each in EXPERTS:
                if (own := f"blk.{layer}.{each}.{rest}") not in file.tensors:
                    raise ValueError(f"{file.path} lacks {own}, expected all of a {name}: download it again")
                parts.append(_tensor(file.path, own, file.tensors[own]))
            gate, up, down = parts
            prefix = f"model.layers.{layer}.mlp.experts"
            found[f"{prefix}.gate_up_proj{ending}"] = _by_turns(gate, up)
            found[f"{prefix}.down_proj{ending}"] = down if rest == "bias" else _transposed(down)
    return found


def _by_turns(gate: Tensor, up: Tensor) -> Tensor:
    """Two tensors [experts, ffn, *inputs] as one, [experts, *inputs, 2 ffn]: a row of one, a row of the other."""
    experts, ffn, *inputs = gate.shape

    def read(first: int, stop: int) -> np.ndarray:
        both = np.stack([gate.values(first, stop), up.values(first, stop)], axis=2)
        return np.moveaxis(both.reshape(stop - first, 2 * ffn, *inputs), 1, -1)

    return replace(gate, shape=(experts, *inputs, 2 * ffn), nbytes=gate.nbytes + up.nbytes, read=read)


def _transposed(tensor: Tensor) -> Tensor:
    """A tensor [experts, outputs, inputs] with the inputs first."""
    experts, outputs, inputs = tensor.shape

    def read(first: int, stop: int) -> np.ndarray:
        return tensor.values(first, stop).swapaxes(1, 2)

    return replace(tensor, shape=(experts, inputs, outputs), read=read)


def _tensor(path: Path, name: str, stored: StoredTensor, order: np.ndarray | None = None) -> Tensor:
    """A tensor of a file, its rows in `order` if one is given."""
    kind = stored.kind
    rows = stored.data.reshape(stored.shape[0], -1)  # [rows, bytes] uint8

    def chosen(first: int, stop: int) -> np.ndarray:
        return rows[first:stop] if order is None else rows[order[first:stop]]

    def read(first: int, stop: int) -> np.ndarray:
        some = chosen(first, stop)
        return dequantised(some, kind).reshape(len(some), *stored.shape[1:])

    def as_stored(first: int, stop: int) -> Grouped:
        return grouped(chosen(first, stop), kind)

    kept = Stored(*KEPT[kind], as_stored) if kind in KEPT and len(stored.shape) == 2 else None
    return Tensor(name, path, stored.shape, kind.name, SERVED[kind], stored.data.nbytes, read, kept)


def grouped(rows: np.ndarray, kind: Kind) -> Grouped:
    """Rows [rows, bytes] uint8 of a kind in KEPT, as numbers in groups.

    A block is a scale in float16, with Q4_1 the weight of a value of 0 as well, then the values. Of 4 bits a byte has
    two: one of the group's first half, in the low bits, and one of the second.
    """
    blocks = rows.reshape(len(rows), -1, GGML_QUANT_SIZES[kind][1])
    scales = blocks[..., :2].copy().view(np.float16)[..., 0]
    if kind == Kind.Q8_0:
        return Grouped(blocks[..., 2:].copy().view(np.int8).reshape(len(rows), -1), scales, GROUP)
    nibbles = blocks[..., 2 + 2 * (kind == Kind.Q4_1) :]
    values = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1).reshape(len(rows), -1)
    if kind == Kind.Q4_1:
        return Grouped(values, scales, GROUP, offsets=blocks[..., 2:4].copy().view(np.float16)[..., 0])
    return Grouped(values.astype(np.int8) - np.int8(8), scales, GROUP)


def dequantised(rows: np.ndarray, kind: Kind) -> np.ndarray:
    """The values of some rows, [rows, bytes] uint8, in no particular shape: in their own float type, or float32."""
    if kind in FLOATS:
        return np.ascontiguousarray(rows).view(FLOATS[kind])
    size = GGML_QUANT_SIZES[kind][1]
    values: np.ndarray = dequantize(rows.reshape(-1, math.gcd(rows.size // size, BLOCKS_IN_A_ROW) * size), kind)
    return values


def row_order(rows: int, heads: int) -> np.ndarray | None:
    """Where a file has each row of a query or key projection, in the order in which Hugging Face has them: [rows].

    llama.cpp rotates channel 2i of a head with 2i + 1, Hugging Face channel i with i + head_dim / 2, by the same angle.
    None for rows that are no heads of pairs, which whoever compares shapes refuses.
    """
    if heads < 1 or rows % (2 * heads):
        return None
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _hf_name(match: re.Match[str], architecture: Architecture) -> str:
    """The Hugging Face name of a tensor; its own for one that the architecture has not."""
    names, prefix = (WHOLE, "") if match["layer"] is None else (architecture.layer, f"model.layers.{match['layer']}.")
    if match["name"] not in names:
        return match[0]
    ending = "" if match["name"] == "attn_sinks" else f".{match['rest']}"
    return f"{prefix}{names[match['name']]}{ending}"
