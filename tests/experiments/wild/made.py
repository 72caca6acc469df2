"""Sessions of recorded agents, made up: as objects, and as files of the traces' format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from experiments.workloads.agentx import Agent, Trace, TraceRequest

MAIN = Agent("", None, 64, 64)


def asked(ids: Sequence[int], t: float = 0.0, model: str = "m", agent: Agent = MAIN, **more: Any) -> TraceRequest:
    """A request for a prompt of these blocks."""
    fields: dict[str, Any] = {"stop": "tool_use", "api_time_s": 1.0, "ttft_s": None, "think_time_s": None}
    fields |= {"input_tokens": 64 * len(ids) + 5, "output_tokens": 7} | more
    return TraceRequest(agent, model, t, hash_ids=np.array(ids, np.int32), **fields)


def session(*requests: TraceRequest) -> Trace:
    """A session of these requests."""
    return Trace("one.json", "one", 64, 64, 64, requests)


@st.composite
def sessions(draw: st.DrawFn) -> Trace:
    """A session whose prompts extend, cut and leave each other at random, of two models."""
    numbers: dict[tuple[int, ...], int] = {}
    prompts: list[tuple[int, ...]] = [()]
    requests = []
    for at in range(draw(st.integers(1, 8))):
        old = draw(st.sampled_from(prompts))
        kept = old[: draw(st.integers(0, len(old)))]
        text = (*kept, *draw(st.lists(st.integers(0, 2), min_size=1, max_size=4)))
        prompts.append(text)
        ids = [numbers.setdefault(text[: end + 1], len(numbers) + 1) for end in range(len(text))]
        pause = draw(st.integers(0, 20))
        requests.append(asked(ids, 30.0 * at + pause, draw(st.sampled_from("ab")), api_time_s=2.0))
    return session(*requests)


def write(path: Path, *traces: Trace) -> Path:
    """A folder with these traces as files, without their sub-agents."""
    path.mkdir(exist_ok=True)
    for number, trace in enumerate(traces):
        requests = [
            {
                "type": "n", "t": r.t_s, "model": r.model, "in": r.input_tokens, "out": r.output_tokens,
                "hash_ids": r.hash_ids.tolist(), "stop": r.stop, "api_time": r.api_time_s, "think_time": r.think_time_s,
            }
            for r in trace.requests
        ]  # fmt: skip
        about = {"id": f"{number}", "tool_tokens": trace.tool_tokens, "system_tokens": trace.system_tokens}
        (path / f"{number}.json").write_text(json.dumps(about | {"requests": requests}))
    return path
