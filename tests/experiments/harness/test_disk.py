"""The disk's sequential rate."""

from __future__ import annotations

from pathlib import Path

from experiments.harness.disk import sequential_rate


def test_the_disks_rate_is_measured_and_nothing_is_left_behind(tmp_path: Path) -> None:
    assert sequential_rate(tmp_path, 3_000_001) > 1e6
    assert not list(tmp_path.iterdir())
