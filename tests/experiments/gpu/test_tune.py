import ast
from pathlib import Path

import jax
import pytest

from experiments.gpu import tune
from experiments.gpu.tune import candidates, with_table
from model.kernels.hopper import decode as paged_decode
from model.kernels.hopper import prefill as paged_prefill


@pytest.mark.parametrize("module", [paged_prefill, paged_decode])
def test_a_table_is_written_into_the_kernel_file_and_written_again(module):
    source = Path(module.__file__).read_text()
    tuning = next(candidates(module))
    once = with_table(source, {(128, 4, 64): tuning, (64, 8, 16): tuning})
    ast.parse(once)
    assert f"(128, 4, 64): {tuning!r}," in once
    assert with_table(once, {(128, 4, 64): tuning}).count("(128, 4, 64)") == 1


@pytest.mark.parametrize("module", [paged_prefill, paged_decode])
def test_the_default_is_among_the_candidates(module):
    default = module.DEFAULT[128] if module is paged_prefill else module.default(128, 64)
    assert default in set(candidates(module))


def test_what_does_not_fit_or_is_wrong_is_out_of_the_race_and_a_fault_ends_it(monkeypatch):
    def kernel(q, pool, layer, batch, *, tuning=None):
        if tuning == "too large":
            raise ValueError("shared memory: 240000 bytes\nmore of it")
        if tuning == "fault":
            raise jax.errors.JaxRuntimeError("an illegal memory access")
        return 2 * q if tuning == "wrong" else q

    tunings = ["good", "too large", "wrong", "fault", "never tried"]
    monkeypatch.setattr(tune, "candidates", lambda module: iter(tunings))
    found = list(tune.race(kernel, paged_prefill, (64, 4, 64), prefix=64, chunk=8))
    assert [tuning for tuning, _, _ in found] == tunings[:4]
    assert [taken is not None for _, taken, _ in found] == [True, False, False, False]
    assert [why.partition(" ")[0] for _, _, why in found] == ["", "ValueError:", "off", "JaxRuntimeError:"]
