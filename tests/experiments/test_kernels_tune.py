import ast
from pathlib import Path

import pytest

from experiments.kernels_tune import candidates, with_table
from model.kernels import paged_decode, paged_prefill


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
    prefill = module is paged_prefill
    defaults = {module.DEFAULT[128], module.OVERLAPPING[128]} if prefill else {module.default(128, 64)}
    assert defaults <= set(candidates(module))
