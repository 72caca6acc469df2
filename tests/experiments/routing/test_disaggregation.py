"""When prefill on replicas of its own would pay, by the cost model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments.routing.disaggregation import Traffic, apart_s, gain, largest_batch, mixed_step_s, together_s
from experiments.routing.replica import Engine
from serve.cost.model import Constants

ENGINE = Engine(Constants(0.0, linear=1e-4, attention=0.0), step_s=0.01, decode_pair_s=1e-8, num_pages=1000)
TRAFFIC = Traffic(new_tokens=1024, prompt=100_000, output=100, itl_s=0.05)


def test_seconds_of_one_request_add_up_by_hand() -> None:
    # A step that decodes 4: 10 ms and 4 ms of reading. With a chunk of 256: 260 tokens at 0.1 ms, and the same 4 ms.
    assert mixed_step_s(ENGINE, TRAFFIC, 4) == pytest.approx(0.030)
    assert together_s(ENGINE, TRAFFIC, 4) == pytest.approx(4 * (0.030 - 0.014) + 100 * 0.014 / 4)
    assert apart_s(ENGINE, TRAFFIC, 4, move_s=1e-5) == pytest.approx(0.1024 + 0.01024 + 100 * 0.014 / 4)


def test_a_chunk_between_makes_steps_longer_so_that_fewer_decode_within_the_bound() -> None:
    # 25.6 + 1.1 B <= 50, and 10 + B <= 50.
    engine = replace(ENGINE, max_num_seqs=64)
    assert largest_batch(engine, TRAFFIC, mixed=True) == 22
    assert largest_batch(engine, TRAFFIC, mixed=False) == 40


def test_it_pays_where_no_mixed_step_is_within_the_bound_and_not_where_all_are() -> None:
    assert gain(ENGINE, replace(TRAFFIC, itl_s=0.02), move_s=1e-6) == float("inf")
    assert gain(ENGINE, replace(TRAFFIC, itl_s=1.0), move_s=1e-6) < 1
