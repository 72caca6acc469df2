"""Engines on several devices: the same answers as on one, one store for all of them, and nothing wrong in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent.parent

CHILD = """
import json, re, sys
from dataclasses import replace

import jax
import numpy as np
from serve.audit.auditor import AuditSettings, attach, auditor_of
from serve.engine.buckets import SamplingParams
from serve.engine.engine import Engine
from serve.engine.request import GenerationRequest
from tests.helpers.cold_reference import CONFIG, FINGERPRINT, SETTINGS, Truth, parameters, wrong_pages
from tests.helpers.forced_answers import Script
from tests.helpers.tiny_engine import ALWAYS, generate, tiers_of

prompt, forced = np.random.default_rng(1).integers(3, 128, 37).astype(np.int32), [9, 8, 7]
drawn = SamplingParams(1.0, 0, 0.9, 7)
runs, truth = [], Truth()
SENT = re.compile(r" (all|reduce|collective)-\\w+\\(")
for devices in map(int, sys.argv[2].split(",")):
    settings = replace(SETTINGS, max_num_seqs=1, tensor_parallel=devices, compile_in_background=True, audit_pages=16)
    engine = Engine(parameters(devices), CONFIG, settings, FINGERPRINT, tiers_of(sys.argv[1]))
    engine.core.costs.model = ALWAYS
    attach(engine, AuditSettings(share=float("inf"), quiet_s=0.0))
    own = engine.core.memory.pool.k.addressable_shards[0].data.shape[2]
    engine.start()
    asked = [generate(engine, prompt, 12), generate(engine, prompt, 12)]
    scripted = generate(engine, [*prompt, 5], 3, constraint=Script(forced, 128))[0]
    sampled = generate(engine, [*prompt, 6], 8, sampling=drawn)[0]
    repeated = generate(engine, [*prompt[:20], *prompt[:8]], 12)[0]
    while auditor_of(engine).records or auditor_of(engine).audit:
        pass
    audits = auditor_of(engine).requests, auditor_of(engine).mismatches, auditor_of(engine).failures
    engine.core.programs.thread.join()
    engine.stop()
    truth.learn(np.asarray([*prompt, *asked[0][0]], np.int32), b"")
    copies = [each for each in engine.core.programs.all if each.name.startswith(("scatter", "gather of", "copy"))]
    wrong = wrong_pages(engine, truth)
    wrong += [f"{each.name} sends" for each in copies if SENT.search(each.compiled.as_text())]
    states, loaded = engine.core.programs.by_state(), engine.core.programs.loaded
    (cold, started, _), (warm, again, _) = asked
    runs.append([own, cold, warm, scripted, sampled, repeated, sum(started.restored.values()), again.reused_tokens,
                 audits, wrong, states["failed"], states["ready"] - loaded])
print(json.dumps(runs))
"""


def in_child(*arguments: str, devices: int, **variables: str) -> str:
    """What a process with so many devices prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | variables
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_any_number_of_devices_answers_the_same_over_the_same_store(tmp_path: Path) -> None:
    runs = json.loads(in_child("-c", CHILD, str(tmp_path), "1,2,4,2,1", devices=4))
    heads = [own for own, *_ in runs]
    assert heads == [2, 1, 1, 1, 2], "each device has its own KV heads, or a copy of one"
    _, first, *_ = runs[0]
    for _, cold, warm, scripted, sampled, repeated, _, reused, (
        audited,
        mismatches,
        failures,
    ), wrong, failed, _ in runs:
        assert cold == warm == first
        assert scripted == [9, 8, 7]
        assert (sampled, repeated) == tuple(runs[0][4:6])
        assert reused == 36
        assert audited > 0
        assert (mismatches, failures, wrong, failed) == (0, 0, [], 0)
    assert [restored for *_, restored, _, _, _, _, _ in runs] == [0, 36, 36, 36, 36], (
        "the store is of no number of devices"
    )
    *_, made = runs[3]
    assert made == 0, "programs for as many devices are on disk"


@pytest.mark.slow
def test_nothing_wrong_is_answered_held_or_stored_by_two_devices() -> None:
    assert in_child("-m", "tests.helpers.reuse_model", "0", "200", devices=2, TENSOR_PARALLEL="2").startswith(
        "0 of 200"
    )
