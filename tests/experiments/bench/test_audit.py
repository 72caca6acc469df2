"""The auditor's benchmark at toy sizes: what it counts, never how fast it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.bench import audit
from experiments.bench.audit import ARMS, FIGURES, Round, summarise
from experiments.workloads.demo_model import TINY, write_demo_model

TOY = {"rounds": 2, "sessions": 2, "turns": 3, "prefix": 200, "more": 10, "output": 6, "pause": 0.3}


def test_a_ratio_is_within_the_noise_if_two_arms_without_an_auditor_differ_as_much() -> None:
    def rounds(*ttft: float) -> list[Round]:
        return [Round((ms,), (1.0, 1.0), 0, 0.0) for ms in ttft]

    off = rounds(100, 1000, 100)
    arms = {
        "off": off,
        "off again": rounds(98, 1010, 103),
        "default": rounds(101, 1020, 102),
        "always": rounds(*[2e3] * 3),
    }
    found = summarise(arms)["arms"]
    assert found["default"]["over_off"]["ttft_p50_ms"] == 1.02
    assert found["default"]["within_noise"]["ttft_p50_ms"]
    assert not found["always"]["within_noise"]["ttft_p50_ms"]
    assert found["always"]["within_noise"]["itl_p99_ms"]


@pytest.mark.slow
def test_every_arm_answers_every_round_and_only_those_with_a_share_audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "set_up_jax", lambda: None)  # it would stay so for every later test
    write_demo_model(tmp_path / "model", config=TINY)
    flags = [text for name, value in TOY.items() for text in (f"--{name}", str(value))]
    audit.main(["--model", str(tmp_path / "model"), *flags, "--out", str(tmp_path / "audit.json")])
    written = json.loads((tmp_path / "audit.json").read_text())
    assert written["commit"]
    assert list(written["arms"]) == list(ARMS)
    for name, arm in written["arms"].items():
        assert all(arm[figure] > 0 for figure in FIGURES)
        assert all(len(arm["over_off_rounds"][figure]) == TOY["rounds"] for figure in FIGURES)
        assert (arm["audited_tokens"] == 0) or ARMS[name]
