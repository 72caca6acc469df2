"""What a model is: sizes, rotation, what each layer does, and its optional weights.

Every option of the decoder is a field here, which `model/families/` reads from a Hugging Face config.json. No arrays,
and no file format except JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

ROPE_KINDS = ("default", "linear", "llama3", "yarn")
NO_ROPE = "none"  # the kind of a model that rotates nothing; no file asks for it by name
ATTENTION, DELTA_NET, MAMBA2 = MIXERS = ("attention", "gated_delta_net", "mamba2")
RECURRENT = (DELTA_NET, MAMBA2)
# Fields that models had no use for when pages were first kept: left out of the JSON where they have their default, so
# that fingerprints stay.
ADDED = ("layers", "experts", "sinks", "recurrent", "query_gate", "centred_norms", "activation")
ADDED_TO_ROPE = ("partial",)
ADDED_TO_LAYERS = ("mixer", "feed_forward")
ADDED_TO_EXPERTS = ("latent_size", "shared_gate")


@dataclass(frozen=True)
class LayerKind:
    """What one layer does: how it mixes tokens, and how it mixes features."""

    window: int | None = None  # keys that a query sees, itself included; None: all before it
    experts: bool = False  # a mixture of experts, not one dense block
    mixer: str | None = ATTENTION  # one of MIXERS; None: the layer does not mix tokens
    feed_forward: bool = True  # whether it mixes features

    @property
    def recurrent(self) -> bool:
        """Whether a state of fixed size stands for the tokens before."""
        return self.mixer in RECURRENT


@dataclass(frozen=True)
class RecurrentConfig:
    """The recurrent layers of a model, gated delta nets or Mamba-2: their heads, and what a state holds.

    In Mamba-2's words, keys and queries are B and C, `key_heads` are groups, and `key_dim` is the state's size.
    """

    key_heads: int  # of queries and keys; each serves as many value heads
    heads: int  # of values, each with a state [key_dim, value_dim]
    key_dim: int
    value_dim: int
    conv_width: int  # tokens that the convolution sees, itself included
    conv_bias: bool = False
    min_step: float = 0.0  # Mamba-2: no token has a smaller time step

    @property
    def values(self) -> int:
        """Channels of all values."""
        return self.heads * self.value_dim

    @property
    def keys(self) -> int:
        """Channels of all keys."""
        return self.key_heads * self.key_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.keys + self.values


@dataclass(frozen=True)
class ExpertsConfig:
    """The experts of the layers that have them, and how a token's are chosen."""

    count: int
    per_token: int
    ffn_size: int  # of one expert
    shared_ffn_size: int = 0  # of the experts that every token goes through, as one; 0: none
    scoring: str = "softmax"  # or sigmoid: how the router's logits become scores
    renormalize: bool = True  # whether a token's weights sum to one
    scaling: float = 1.0  # of the weights, after that
    groups: int = 1  # of experts; a token's come from the best `chosen_groups` of them
    chosen_groups: int = 1
    correction: bool = False  # whether a bias is added to the scores, for the choice alone
    router_bias: bool = False
    biases: bool = False  # of the experts' products
    clamp: tuple[float, float] | None = None  # gpt-oss' SwiGLU: its factor within the sigmoid, and its limit
    latent_size: int | None = None  # of the experts' inputs and outputs, to which and from which matrices lead
    shared_gate: bool = False  # a sigmoid of its own weighs what the shared experts do


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: its base and how its frequencies are stretched. The formulas are in `model/rope.py`."""

    theta: float = 10000.0
    kind: str = "default"  # one of ROPE_KINDS, or NO_ROPE
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
    partial: float = 1.0  # the share of each head that rotates: its first dimensions

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], max_position: int, partial: float | None = None) -> RopeConfig:
        """Read `rope_parameters`, or the older `rope_theta` and `rope_scaling` with `rope_type` or `type`.

        `partial` is a family's default of `partial_rotary_factor`; None: the whole head rotates in all its models.
        Raises ValueError for a kind that is not in ROPE_KINDS, a factor that is missing or not positive, per-layer
        rotation, or partial rotation in a family without.
        """
        field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        rope: Mapping[str, Any] = config.get(field) or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"{field} is {rope!r}, expected a JSON object")
        if any(isinstance(value, Mapping) for value in rope.values()):
            raise ValueError(f"{field} has an entry per layer type {sorted(rope)}, expected one for all layers")
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in ROPE_KINDS:
            raise ValueError(f"{field} has rope type {kind!r}, supported are {', '.join(ROPE_KINDS)}")
        share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if partial is None and share not in (None, 1, 1.0):
            raise ValueError(f"partial_rotary_factor is {share}, supported is 1.0 (the whole head rotates)")
        rotating = _positive("partial_rotary_factor", (partial or 1.0) if share is None else share)
        if rotating > 1:
            raise ValueError(f"partial_rotary_factor is {rotating}, expected at most 1.0 (the whole head rotates)")

        given = (each.get("rope_theta") for each in (rope, config))
        theta = _positive("rope_theta", next((value for value in given if value is not None), cls.theta))
        if kind == "default":
            return cls(theta=theta, partial=rotating)
        # As transformers does: the outer key wins, and the context length stands in for both.
        outer = config.get("original_max_position_embeddings")
        original = outer or rope.get("original_max_position_embeddings") or max_position
        _positive("original_max_position_embeddings", original)
        factor = rope.get("factor")
        if factor is None and kind == "yarn" and "factor" in rope:
            factor = max_position / original
        required = {"factor": factor}
        if kind == "llama3":
            required |= {key: rope.get(key) for key in ("low_freq_factor", "high_freq_factor")}
        for key, value in required.items():
            if value is None:
                raise ValueError(f"{field} of rope type {kind!r} has no {key}: add it to config.json")
            _positive(f"{field}'s {key}", value)
        optional = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
        named = (key for key in (*optional, "mscale", "mscale_all_dim") if rope.get(key))
        numbers = {key: _positive(f"{field}'s {key}", rope[key]) for key in named}
        flags = {"truncate": bool(rope.get("truncate", True)), "partial": rotating}
        return cls(theta, kind, float(factor), int(original), **flags, **numbers)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Hashable, so it can be a static argument of jit."""

    family: str  # the model_type of config.json, one of `model.families.FAMILIES`
    vocab_size: int
    embed_size: int
    ffn_size: int  # of a dense layer; 0 where there is none
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
    layers: tuple[LayerKind, ...] = ()  # one for each layer; none given: dense, with full attention
    experts: ExpertsConfig | None = None
    sinks: bool = False  # a learned logit for each query head, in the denominator of its softmax
    recurrent: RecurrentConfig | None = None  # of the layers that are recurrent
    query_gate: bool = False  # attention's output is gated by a sigmoid, whose rows are the queries' neighbours
    centred_norms: bool = False  # the weights of norms count from one, but for those of recurrent layers
    activation: str = "silu"  # of gate, which up is multiplied with; or relu2: of up, and there is no gate

    def __post_init__(self) -> None:
        """Fill in the layers of a model whose layers are plain."""
        if set(self.layers) <= {LayerKind()}:
            object.__setattr__(self, "layers", (LayerKind(),) * self.num_layers)
        elif len(self.layers) != self.num_layers:
            raise ValueError(f"layers has {len(self.layers)} kinds, expected num_layers of them ({self.num_layers})")

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def runs(self) -> list[range]:
        """The layers in runs of those that have the same arrays."""
        arrays = [(kind.experts, kind.mixer, kind.feed_forward) for kind in self.layers]
        runs = [list(run) for _, run in groupby(range(self.num_layers), arrays.__getitem__)]
        return [range(run[0], run[-1] + 1) for run in runs]

    @property
    def attention_layers(self) -> int:
        """The layers that have keys and values in pages."""
        return sum(kind.mixer == ATTENTION for kind in self.layers)

    @property
    def recurrent_layers(self) -> int:
        """The layers that have states."""
        return sum(kind.recurrent for kind in self.layers)

    @property
    def gates(self) -> int:
        """How many matrices lead into a feed-forward block: gate and up, or up alone."""
        return 1 if self.activation == "relu2" else 2

    @property
    def active_layers(self) -> tuple[LayerKind, ...]:
        """The layers, without windows that are at least as long as any sequence and so mask nothing."""
        return tuple(
            dataclasses.replace(kind, window=None) if kind.window and kind.window >= self.max_position else kind
            for kind in self.layers
        )

    @property
    def active_ffn_sizes(self) -> list[int]:
        """The feed-forward units that a token goes through in each layer."""
        experts = self.experts
        mixed = experts.per_token * experts.ffn_size + experts.shared_ffn_size if experts else 0
        return [mixed if kind.experts else self.ffn_size if kind.feed_forward else 0 for kind in self.layers]

    def to_json(self) -> str:
        """All fields as canonical JSON, without later ones that have their default: the same config, the same text."""
        fields = dataclasses.asdict(self)
        defaults = {field.name: field.default for field in dataclasses.fields(self) if field.name in ADDED}
        plain = dataclasses.replace(self, **defaults)  # type: ignore[arg-type]
        _leave_out(fields, dataclasses.asdict(plain), ADDED)
        for layer in fields.get("layers", ()):
            _leave_out(layer, dataclasses.asdict(LayerKind()), ADDED_TO_LAYERS)
        if self.experts:
            _leave_out(fields["experts"], dataclasses.asdict(ExpertsConfig(0, 0, 0)), ADDED_TO_EXPERTS)
        _leave_out(fields["rope"], dataclasses.asdict(RopeConfig()), ADDED_TO_ROPE)
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """The config that `to_json` wrote."""
        fields = json.loads(text)
        rope, eos = RopeConfig(**fields.pop("rope")), tuple(fields.pop("eos_token_ids"))
        layers = tuple(LayerKind(**kind) for kind in fields.pop("layers", ()))
        experts = fields.pop("experts", None)
        if experts:
            experts = ExpertsConfig(**experts | {"clamp": experts["clamp"] and tuple(experts["clamp"])})
        if recurrent := fields.pop("recurrent", None):
            fields["recurrent"] = RecurrentConfig(**recurrent)
        return cls(**fields, rope=rope, eos_token_ids=eos, layers=layers, experts=experts)


def _positive(name: str, value: Any) -> float:
    """The value of a field, or ValueError where it is no positive number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}, expected a positive number")
    return float(value)


def _leave_out(fields: dict[str, Any], defaults: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Delete the named fields that have their default."""
    for name in names:
        if fields[name] == defaults[name]:
            del fields[name]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ValueError with the path if the file holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} nests too deeply, expected a few levels: download it again") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object: download it again")
    return value
