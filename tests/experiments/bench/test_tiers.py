"""The tiers benchmark at toy sizes: every tier, and a look-up that finds all."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.bench import tiers


def test_every_tier_is_compared_with_a_plain_file(tmp_path: Path) -> None:
    out = tmp_path / "made" / "tiers.json"
    sizes = ["--page-bytes", "262144", "--pages", "32", "--rounds", "2", "--stored", "1000"]
    tiers.main(["--directory", str(tmp_path), *sizes, "--out", str(out)])
    result = json.loads(out.read_text())
    assert len(result["rounds"]) == 2
    assert set(result["rates MB/s"]) == {"plain file", "disk (LMDB)", "remote (file://)", "host"}
    assert all(rate > 0 for rates in result["rates MB/s"].values() for rate in rates.values())
    assert {"put", "put and sync", "get", "get, cold"} <= set(result["rates MB/s"]["disk (LMDB)"])
    (lookup,) = result["lookups"]
    assert lookup["pages"] == 1000
    assert list(tmp_path.iterdir()) == [out.parent], "what was stored is gone"
