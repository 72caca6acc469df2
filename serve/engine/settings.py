"""The sizes that an engine is built with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EngineSettings:
    """Sizes and limits of one engine; tokens unless a comment says otherwise."""

    num_pages: int
    max_model_len: int  # prompt and output together
    page_size: int = 64
    max_num_seqs: int = 16  # sequences that run at the same time
    max_queue: int = 256  # requests that may wait before new ones are refused
    max_prefill_tokens: int = 1024
    # A chunk while others decode: each of their next tokens waits for it.
    max_mixed_prefill_tokens: int = 256
    # Draft tokens of a decoding sequence in each step (prompt-lookup speculative decoding); 0 disables them.
    speculative_tokens: int = 0
    restore_bytes: int = 1 << 30  # of pages that were read back and are not in the pool yet
    preload_bytes: int = 0  # of pages that are read from the tiers before a request asks for them
    retain_pages: int = 0  # that may be kept for clients that ask for it, see cache.retention
    retained_folder: Path | None = None  # for what is kept, so that it lasts over restarts
    stop_seconds: float = 30.0  # that `Engine.stop` takes at most
    dtype: str = "float32"
    quantize: str | None = None  # how the weights were rounded, see model.quantized; the engine takes them as they are
    kv_dtype: str | None = None  # of KV pages, one of model.kv_rows.QUANTIZED; None: `dtype`
    tensor_parallel: int = 1  # devices over which the model is split, see model.sharding
    audit_pages: int = 0  # additional pages, for the auditor to compute in
    # Serve as soon as two shapes are compiled, and compile the others in the background; False compiles all before.
    compile_in_background: bool = False

    @property
    def page_dtype(self) -> str:
        """The dtype of KV pages, as `model.kv_rows.pool_dtype` takes it."""
        return self.kv_dtype or self.dtype

    def __post_init__(self) -> None:
        """A chunk that shares its step is never longer than one that runs alone."""
        object.__setattr__(
            self, "max_mixed_prefill_tokens", min(self.max_mixed_prefill_tokens, self.max_prefill_tokens)
        )
