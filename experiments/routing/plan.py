"""A plan: lanes of requests as a JSON file, so that what a benchmark sends to real replicas can be simulated exactly.

`{"name": ..., "page_size": 64, "lanes": [{"start_s": 0, "requests": [{"agent": 0, "pages": [0, 1], "tokens": 150,
"output": 20, "pause_s": 1.5}]}]}`: `pages` numbers the full pages of a prompt, with equal numbers for equal text after
equal text; a request comes `pause_s` seconds after the answer before it in its lane.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta, Struct

from experiments.routing.workload import Lane, Request, Workload


class PlannedRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """One request of a plan."""

    pages: list[Annotated[int, Meta(ge=0, lt=2**31)]]
    tokens: Annotated[int, Meta(ge=1)]
    output: Annotated[int, Meta(ge=1)]
    agent: int = 0
    pause_s: Annotated[float, Meta(ge=0)] = 0.0


class PlannedLane(Struct, frozen=True, forbid_unknown_fields=True):
    """One lane of a plan."""

    requests: list[PlannedRequest]
    start_s: Annotated[float, Meta(ge=0)] = 0.0


class Plan(Struct, frozen=True, forbid_unknown_fields=True):
    """A plan's file."""

    name: str
    page_size: Annotated[int, Meta(ge=1)]
    lanes: list[PlannedLane]


def read_plan(path: Path) -> Workload:
    """The workload in a plan's file. Raises ValueError, which names the field, for a file that is not a plan."""
    try:
        plan = msgspec.json.decode(path.read_bytes(), type=Plan)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path} is not a plan: {error}") from None
    for lane in plan.lanes:
        for request in lane.requests:
            if len(request.pages) != request.tokens // plan.page_size:
                raise ValueError(
                    f"{path} is not a plan: {len(request.pages)} pages for {request.tokens} tokens, expected "
                    f"{request.tokens // plan.page_size}: one for every {plan.page_size} tokens"
                )
    lanes = [
        Lane(
            lane.start_s,
            [Request(r.agent, np.array(r.pages, np.int32), r.tokens, r.output, r.pause_s) for r in lane.requests],
        )
        for lane in plan.lanes
    ]
    return Workload(plan.name, plan.page_size, lanes)


def write_plan(path: Path, workload: Workload) -> None:
    """Write a workload as a plan."""
    lanes = [
        PlannedLane(
            [PlannedRequest(r.pages.tolist(), r.tokens, r.output, r.agent, r.pause_s) for r in lane.requests],
            lane.start_s,
        )
        for lane in workload.lanes
    ]
    path.write_bytes(msgspec.json.encode(Plan(workload.name, workload.page_size, lanes)))
