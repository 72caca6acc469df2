"""Synthetic sessions: drawn from a fit, like what it was fitted to, and counted beside it by the command."""

from __future__ import annotations

import json
import random
from itertools import islice, pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest

from experiments.wild.classify import rows
from experiments.wild.fit import fit_traces, main
from experiments.wild.summary import new_tokens
from experiments.wild.synthetic import agents
from experiments.wild.synthetic import main as compare
from experiments.workloads.agentx import check_chains
from experiments.workloads.fitted import LEVELS, Fit, draw, load_fit, session, sessions
from experiments.workloads.traces import Agents
from tests.experiments.wild.made import asked, write
from tests.experiments.wild.made import session as made


def test_a_session_is_a_function_of_fit_and_name_with_chained_ids() -> None:
    fit = load_fit()
    one, again, other = session(fit, "a"), session(fit, "a"), session(fit, "b")
    assert [r.hash_ids.tolist() for r in one.requests] == [r.hash_ids.tolist() for r in again.requests]
    assert [len(r.hash_ids) for r in one.requests] != [len(r.hash_ids) for r in other.requests]
    for trace in islice(sessions(fit, 20), 20):
        check_chains([((n,), request) for n, request in enumerate(trace.requests)])
        assert all(len(request.hash_ids) == request.input_tokens // 64 for request in trace.requests)


def test_draws_lie_between_the_quantiles_as_often_as_their_levels_say() -> None:
    quantiles = [float(level**2) for level in LEVELS]
    rng = random.Random(0)
    drawn = np.array([draw(rng, quantiles) for _ in range(4000)])
    for level in (10.0, 50.0, 97.5):
        assert (drawn <= level**2).mean() == pytest.approx(level / 100, abs=0.03)


def test_sessions_are_like_those_that_they_were_fitted_to() -> None:
    fit = load_fit()
    found = np.concatenate([rows(trace, n) for n, trace in enumerate(sessions(fit, 100, seed=1))])
    reused = 1 - new_tokens(found).sum() / (64 * found["blocks"].sum(dtype=np.int64))
    assert reused == pytest.approx(0.963, abs=0.015)
    assert np.median(found["tokens"]) == pytest.approx(103_659, rel=0.35)
    refitted = fit_traces(sessions(fit, 100, seed=2))
    assert refitted.end_turn == pytest.approx(fit.end_turn, abs=0.02)
    middle = LEVELS.index(50.0)
    for name in ("head_tokens", "appended_tokens", "output_tokens", "tool_pause_s"):
        assert getattr(refitted, name)[middle] == pytest.approx(getattr(fit, name)[middle], rel=0.3), name


def test_the_command_fits_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "traces", *[made(asked([1, 2]), asked([1, 2, 3], 9)) for _ in range(3)])
    main([str(path), "--out", str(tmp_path / "fit.json")])
    fit = msgspec.json.decode((tmp_path / "fit.json").read_bytes(), type=Fit)
    assert (fit.sessions, fit.head_tokens[0], fit.appended_tokens[0], fit.tool_pause_s[0]) == (3, 128, 64, 8)
    assert len(session(fit, "a").requests) == 2
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "none")])


def test_agents_made_by_hand_become_traces_of_blocks_that_extend_each_other() -> None:
    (trace,) = agents(Agents(agents=1, calls=6, subagents=1.0, subagent_calls=2, sides=0))
    own = [r.hash_ids.tolist() for r in trace.requests if r.agent.parent is None]
    assert all(new[: len(old) - 1] == old[:-1] for old, new in pairwise(own))
    assert len({r.agent.id for r in trace.requests}) > 1
    check_chains([((n,), request) for n, request in enumerate(trace.requests)])


def test_both_kinds_are_counted_beside_the_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads(Path("experiments/results/wild/summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    compare(["--sessions", "3", "--agents", "1", "--calls", "3", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "synthetic.json").read_text())
    assert found["fitted"]["overall"]["sessions"] == 3
    assert found["by hand"]["overall"]["sessions"] == 1
    assert (tmp_path / "synthetic.png").stat().st_size > 0
    assert "append: requests, tokens" in capsys.readouterr().out
