"""Reuse is exact for every family: experts, windows, sinks and layers of several kinds, under loss."""

from __future__ import annotations

import pytest

from tests.helpers.cold_reference import CONFIGS
from tests.serve.engine.test_tensor_parallel import in_child


def failing_cases(family: str, count: int, **variables: str) -> str:
    """What a run of so many random lives over the family's model prints, in a process of its own."""
    module = ("-m", "tests.helpers.reuse_model", "0", str(count))
    return in_child(*module, devices=int(variables.get("TENSOR_PARALLEL", "1")), MODEL_FAMILY=family, **variables)


@pytest.mark.parametrize("family", ["gpt_oss", "glm4_moe"])
def test_nothing_wrong_is_answered_held_or_stored(family):
    """Of these two: windows, sinks, experts, a dense layer, a shared expert and partial rotation."""
    assert failing_cases(family, 6).startswith("0 of 6")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", CONFIGS)
def test_nothing_wrong_is_answered_held_or_stored_in_many_cases_of_any_family(family):
    assert failing_cases(family, 150).startswith("0 of 150")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", ["gpt_oss", "glm4_moe"])
def test_nor_by_two_devices(family):
    assert failing_cases(family, 60, TENSOR_PARALLEL="2").startswith("0 of 60")
