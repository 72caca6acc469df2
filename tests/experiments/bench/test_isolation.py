"""The benchmark of isolation: its statistic, and that its attack is one that works where keys share everything."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from experiments.bench.isolation import auc, main


def test_the_auc_is_the_share_of_pairs_in_which_the_known_one_is_faster() -> None:
    known, new = [1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 5.0]
    by_hand = sum((k < n) + (k == n) / 2 for k in known for n in new) / 12
    assert auc(known, new) == pytest.approx(by_hand)
    assert auc([1.0], [2.0]) == 1
    assert auc([2.0], [1.0]) == 0
    rng = random.Random(1)
    assert abs(auc(*([rng.random() for _ in range(2000)] for _ in range(2))) - 0.5) < 0.03


@pytest.mark.slow
def test_what_is_not_shared_is_not_found_and_what_is_shared_is(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    main(["--secrets", "2", "--pairs", "2", "--shared-pairs", "2", "--tokens", "300", "--output", str(output)])
    arms = json.loads(output.read_text())["arms"]
    for share in ("none", "tools-system"):
        assert set(arms[share]["found"].values()) == {0}
    assert arms["all"]["found"]["usage"] == arms["all"]["digits"] == 8
    assert arms["none"]["head_read"] == 0
    assert arms["tools-system"]["head_read"] > 300
