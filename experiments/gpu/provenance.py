"""Where and with what a result of the GPU experiments was measured."""

from __future__ import annotations

import datetime
import os
from typing import Any

import jax

from experiments.gpu.sizes import Sizes
from experiments.harness.provenance import commit, versions

Json = dict[str, Any]


def provenance(sizes: Sizes, smoke: bool, revision: str | None) -> Json:
    """Where, when and with what this was measured."""
    device = jax.devices()[0]
    return {
        "smoke": smoke,
        "device": device.device_kind,
        "compute_capability": getattr(device, "compute_capability", None),
        "versions": versions(("jax", "jaxlib", "torch", "numpy")),
        "commit": revision or commit(),
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "dtype": sizes.dtype,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
