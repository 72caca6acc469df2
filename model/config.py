"""What a model is, read once from a Hugging Face config.json: llama, mistral, qwen2 and qwen3.

Every option of the decoder is a field here; what the decoder cannot compute exactly is refused by name. Missing keys
take the defaults of transformers 5. No arrays, and no file format except JSON.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROPE_KINDS = ("default", "linear", "llama3", "yarn")

# Defaults that differ between families, from transformers' configuration_<family>.py. None: derived from other fields.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "num_key_value_heads": None, "head_dim": None, "eos_token_id": 2},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "head_dim": None, "eos_token_id": 2},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": None, "eos_token_id": None},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128, "eos_token_id": None},
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: its base and how its frequencies are stretched. The formulas are in `model/rope.py`."""

    theta: float = 10000.0
    kind: str = "default"  # one of ROPE_KINDS
    factor: float = 1.0  # linear, llama3, yarn
    original_max_position: int = 0  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: follows from factor and the mscales
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], max_position: int) -> RopeConfig:
        """Read `rope_parameters`, or the older `rope_theta` and `rope_scaling` with `rope_type` or `type`.

        Raises ValueError for a kind that is not in ROPE_KINDS, a missing factor, or partial or per-layer rotation.
        """
        field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        rope: Mapping[str, Any] = config.get(field) or {}
        if any(isinstance(value, Mapping) for value in rope.values()):
            raise ValueError(f"{field} has an entry per layer type {sorted(rope)}, expected one for all layers")
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in ROPE_KINDS:
            raise ValueError(f"{field} has rope type {kind!r}, supported are {', '.join(ROPE_KINDS)}")
        partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            raise ValueError(f"partial_rotary_factor is {partial}, supported is 1.0 (the whole head rotates)")

        theta = rope.get("rope_theta") or config.get("rope_theta") or cls.theta
        if kind == "default":
            return cls(theta=float(theta))
        # As transformers does: the outer key wins, and the context length stands in for both.
        outer = config.get("original_max_position_embeddings")
        original = outer or rope.get("original_max_position_embeddings") or max_position
        factor = rope.get("factor")
        if factor is None and kind == "yarn" and "factor" in rope:
            factor = max_position / original
        required = {"factor": factor}
        if kind == "llama3":
            required |= {key: rope.get(key) for key in ("low_freq_factor", "high_freq_factor")}
        for key, value in required.items():
            if value is None:
                raise ValueError(f"{field} of rope type {kind!r} has no {key}: add it to config.json")
        optional = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
        numbers = {key: float(rope[key]) for key in (*optional, "mscale", "mscale_all_dim") if rope.get(key)}
        truncate = bool(rope.get("truncate", True))
        return cls(float(theta), kind, float(factor), int(original), truncate=truncate, **numbers)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ModelConfig:
    """The architecture: sizes, rotation and its optional weights. Hashable, so it can be a static argument of jit."""

    family: str  # the model_type of config.json, one of FAMILIES
    vocab_size: int
    embed_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    rope: RopeConfig
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read the parsed config.json of a llama, mistral, qwen2 or qwen3 checkpoint.

        Raises ValueError, naming the field, for anything that the decoder would compute differently from transformers.
        """
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"model_type is {family!r}, supported are {', '.join(FAMILIES)}")
        given = {**FAMILIES[family], **config}
        max_position = _size(given, "max_position_embeddings")
        _refuse_unsupported(given, max_position)

        embed, heads = _size(given, "hidden_size"), _size(given, "num_attention_heads")
        attention_bias = family in ("llama", "qwen3") and bool(given.get("attention_bias", False))
        made = cls(
            family=family,
            vocab_size=_size(given, "vocab_size"),
            embed_size=embed,
            ffn_size=_size(given, "intermediate_size"),
            num_layers=_size(given, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=heads if given["num_key_value_heads"] is None else _size(given, "num_key_value_heads"),
            head_dim=embed // heads if given["head_dim"] is None else _size(given, "head_dim"),
            max_position=max_position,
            norm_eps=float(given.get("rms_norm_eps", 1e-6)),
            rope=RopeConfig.from_hf(config, max_position),
            qkv_bias=attention_bias or family == "qwen2",
            out_bias=attention_bias,
            mlp_bias=family == "llama" and bool(given.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            tie_embeddings=bool(given.get("tie_word_embeddings", False)),
            eos_token_ids=_token_ids(given["eos_token_id"]),
        )
        if made.num_heads % made.num_kv_heads:
            raise ValueError(
                f"num_attention_heads is {made.num_heads}, expected a multiple of num_key_value_heads "
                f"({made.num_kv_heads}): check that config.json is whole"
            )
        if made.head_dim % 2:
            raise ValueError(f"head_dim is {made.head_dim}, expected an even number: rotation works on pairs")
        return made

    def to_json(self) -> str:
        """All fields as canonical JSON: the same config gives the same text everywhere."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """The config that `to_json` wrote."""
        fields = json.loads(text)
        rope, eos = RopeConfig(**fields.pop("rope")), tuple(fields.pop("eos_token_ids"))
        return cls(**fields, rope=rope, eos_token_ids=eos)


def load_config(folder: str | Path) -> ModelConfig:
    """Read `config.json` in `folder`; end-of-sequence ids come from `generation_config.json` where it has them.

    Raises FileNotFoundError without a config.json and ValueError for what `ModelConfig.from_hf` refuses, with the path.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json, expected a Hugging Face checkpoint folder: check the path"
        )
    config = read_json(path)
    try:
        made = ModelConfig.from_hf(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    generation = Path(folder) / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
    return made if eos is None else dataclasses.replace(made, eos_token_ids=_token_ids(eos))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ValueError with the path if the file holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object: download it again")
    return value


def _refuse_unsupported(config: Mapping[str, Any], max_position: int) -> None:
    """Raise ValueError for features that change the result and that the decoder lacks."""
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"hidden_act is {activation!r}, supported is 'silu'")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unnamed")
        raise ValueError(f"quantization_config ({method}) is not supported: use the unquantized checkpoint")
    window = _sliding_window(config)
    # A window at least as long as any sequence masks nothing.
    if window is not None and window < max_position:
        raise ValueError(
            f"sliding_window of {window} tokens is active, supported is full attention (sliding_window null, "
            f"or at least max_position_embeddings {max_position}): use a checkpoint without it"
        )
    other = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if other:
        raise ValueError(f"layer_types has {', '.join(other)}, supported is full_attention")


def _sliding_window(config: Mapping[str, Any]) -> int | None:
    """The window that transformers would apply to some layer, in tokens; None where attention is full."""
    if config["model_type"] == "llama":
        return None
    window: int | None = config.get("sliding_window", 4096)
    if config["model_type"] == "mistral":
        return window
    windowed_layers = config.get("num_hidden_layers", 32) > config.get("max_window_layers", 28)
    return window if config.get("use_sliding_window", False) and windowed_layers else None


def _size(config: Mapping[str, Any], key: str) -> int:
    """A positive whole number from the config."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} is {value!r}, expected a positive whole number: check that config.json is complete")
    return value


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """End-of-sequence ids, which the files give as null, one id or a list."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
