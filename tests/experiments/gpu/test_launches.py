"""Launches are counted in what XLA dumps: loops by their trip counts, a command buffer as one launch of the host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.gpu.launches import copied_bytes, count, table, thunks, trip_counts

ROOT = Path(__file__).parents[3]

# A layer's loop of three turns with a command buffer, a kernel of ours, a copied slice, and a loop of two turns in it.
THUNKS = """
001: kCopy           [source       | next=006 (4)] kCopy
002: kWhile          [prev=000 (1) | next=012 (1)]
condition:
    003: kCustomKernel  [source | sink] loop_compare_fusion grid: [1, 1, 1]
  body:
    004: kAsyncStart    stream=computation_stream[0], async_id=18
        006: kDynamicSliceFusion  params=1, results=1
            005: kCopy  kCopy
    007: kCustomCall    [prev=032 (1) | next=034 (1)] kCustomCall
    008: kAsyncDone     async_id=18
    000: kCommandBuffer [prev=007 (1) | sink        ]
        009: kCustomKernel [source       | next=010 (1)] gemm_fusion_dot_1 grid: [1, 1, 1]
        010: kCustomKernel [prev=009 (1) | sink        ] loop_add_fusion grid: [1, 1, 1]
    011: kWhile               [prev=000 (1) | sink ]
condition:
        012: kCustomKernel  [source | sink] loop_compare_fusion_2 grid: [1, 1, 1]
      body:
        013: kCustomKernel  [source | sink] loop_add_fusion_1 grid: [1, 1, 1]
014: kCublasLtMatmul [prev=002 (1) | sink        ] kCublasLtMatmul
"""

PROGRAM = """HloModule jit_step, is_scheduled=true

%slice_of_weights (p0: bf16[3,4,8], p1: s32[]) -> bf16[1,4,8] {
  %p0 = bf16[3,4,8]{2,1,0} parameter(0)
  ROOT %dynamic-slice.1 = bf16[1,4,8]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,4,8}
}

%added (p0: f32[8], p1: f32[8]) -> f32[8] {
  ROOT %add.1 = f32[8]{0} add(%p0, %p1)
}

%search_body (arg: (s32[])) -> (s32[]) {
  %copy.5 = s32[] copy(%x)
}

%layer_body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion-start.1 = ((bf16[3,4,8]{2,1,0}, s32[]), bf16[1,4,8]{2,1,0}) fusion-start(%w, %i), calls=%slice_of_weights
  %fusion.2 = f32[8]{0} fusion(%x, %y), kind=kLoop, calls=%added
  %while.2 = (s32[]) while(%t), condition=%c2, body=%search_body, backend_config={"known_trip_count":{"n":"2"}}
}

ENTRY %main (w: bf16[3,4,8]) -> f32[8] {
  %copy.1 = u32[1]{0} copy(%constant)
  %while.1 = (s32[], f32[8]) while(%t), condition=%c1, body=%layer_body, backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_launches_are_counted_over_loops_and_command_buffers() -> None:
    # A turn: the copy, our kernel, two kernels in the buffer, and two turns of a kernel.
    launched, by_host = count(thunks(THUNKS), iter([3, 2]))
    assert launched == 1 + 3 * (1 + 1 + 2 + 2) + 1
    assert by_host == 1 + 3 * (1 + 1 + 1 + 2) + 1


def test_trip_counts_come_in_the_order_of_the_loops() -> None:
    assert trip_counts(PROGRAM) == [3, 2]
    with pytest.raises(ValueError, match="without a known trip count"):
        trip_counts(PROGRAM.replace("known_trip_count", "other"))


def test_copies_and_slices_count_and_what_computes_does_not() -> None:
    assert copied_bytes(PROGRAM) == 4 + 3 * (2 * 4 * 8 + 2 * 4)


@pytest.mark.parametrize("version", ["0.10.2", "0.11.2"])
def test_every_committed_count_has_a_row(version: str) -> None:
    result = json.loads((ROOT / f"experiments/results/gpu/launches-jax-{version}.json").read_text())
    assert table(result["rows"], result["num_layers"]).row_count == len(result["rows"]) == 12
