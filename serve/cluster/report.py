"""What a replica says of itself: once what it is, and twice a second how it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from serve.cost.model import Constants, CostModel, Rate
from serve.engine.settings import EngineSettings
from serve.router.summary import Increment, Load, Snapshot

NO_LOAD = Load((), 0)


@dataclass(frozen=True)
class Identity:
    """What must be equal among replicas that serve one model."""

    version: int  # see `wire.VERSION`
    flags: str  # `ClusterConfig.version`
    fingerprint: bytes  # of the model, its weights and the dtype of its pages
    tokenizer: bytes  # `serve.prompt.tokenizer.identity`
    settings: EngineSettings
    vocab_size: int


@dataclass(frozen=True)
class Costs:
    """A cost model as plain values, since one with its latest measurements does not leave its process."""

    linear_flops: float
    attention_flops: float
    prefill: float  # FLOPs a second; 0 until measured, as `shared`
    chunks: int  # that this is the median of
    chunk_flops: float  # of one of these, their mean; 0 for none
    shared: float  # tokens times sequences a second
    reads: dict[str, float]  # bytes a second, by tier
    constants: Constants | None

    @classmethod
    def of(cls, model: CostModel) -> Costs:
        """A cost model's values."""
        reads = {tier: rate.per_second for tier, rate in model.reads.items()}
        sizes = [flops for _, flops in model.prefill.latest]
        chunks, chunk_flops = len(sizes), sum(sizes) / max(1, len(sizes))
        prefill, shared = model.prefill.per_second, model.shared.per_second
        return cls(
            model.token_flops, model.attention_flops, prefill, chunks, chunk_flops, shared, reads, model.constants
        )

    @property
    def model(self) -> CostModel:
        """The cost model with these values."""
        reads = MappingProxyType({tier: Rate(rate) for tier, rate in self.reads.items()})
        prefill, shared = Rate(self.prefill), Rate(self.shared)
        return CostModel(self.linear_flops, self.attention_flops, prefill, shared, reads, self.constants)


@dataclass(frozen=True, eq=False)
class Report:
    """A replica now."""

    name: str
    identity: Identity
    device: str
    token_bytes: int  # of KV
    steps: int
    waiting: int
    running: int
    compiled: tuple[int, int]  # shapes of steps, and shapes in all
    costs: Costs
    tiers: tuple[str, ...]  # below the device
    pages: Sequence[Increment] | Snapshot  # since the increment that was asked for
    load: Load = NO_LOAD  # from all ingresses


def difference(ours: Mapping[str, object], other: Mapping[str, object]) -> str | None:
    """The first field in which two identities differ, with both values; None if they agree."""
    for name, value in ours.items():
        if value != other[name]:
            return f"{name} {value!r} and {other[name]!r}"
    return None
