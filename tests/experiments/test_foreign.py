"""The experiment on another engine: what its ways send, and what it says where the engine is not installed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from experiments import foreign
from experiments.foreign import CHAT, MESSAGES, WAYS, Way, body, draw, session_of
from experiments.harness import llama_server
from experiments.sweep.__main__ import main as sweep
from experiments.workloads import sessions
from experiments.workloads.demo_model import TINY, write_demo_model
from serve.api.openai import read_chat
from serve.rules.body import normalize_body
from serve.rules.normalize import DEFAULT_RULES


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.route} {way.name}")
def test_two_requests_of_a_way_differ_in_header_and_question_only(way: Way) -> None:
    rng, prompt = random.Random(0), sessions.request(session_of(0), header=False)
    made = [json.dumps(body(way, prompt, rng)).encode() for _ in range(2)]
    kept, stripped = (
        [normalize_body(each, way.route, rules).body for each in made] for rules in (frozenset(), DEFAULT_RULES)
    )
    assert made == kept
    assert (b"billing-header" in made[0]) is bool(way.fresh)
    plain = [json.loads(each) for each in stripped]
    assert plain[0]["messages"][-1] != plain[1]["messages"][-1]
    for each in plain:
        each["messages"].pop()
    assert plain[0] == plain[1]
    if way.route == CHAT:
        assert len(read_chat(made[0])[0].tools or ()) == len(prompt["tools"])


def test_ways_are_named_and_drawn(tmp_path: Path) -> None:
    rows = [foreign.summary(way, [(100, 90, 5.0), (100, 80, 7.0), (100, 91, 6.0)]) for way in WAYS]
    assert rows[0]["cached_tokens"] == 90
    assert rows[0]["ms"] == 6.0
    assert [row["way"] for row in rows if row["route"] == MESSAGES][-1] == "fresh cc_version, through the proxy"
    draw(rows, tmp_path / "cached.png")
    assert (tmp_path / "cached.png").stat().st_size > 1000


def test_the_committed_run_shows_what_the_proxy_saves() -> None:
    found = json.loads((foreign.RESULTS / "summary.json").read_text())
    shares = {(row["route"], row["way"]): row["cached_tokens"] / row["prompt_tokens"] for row in found["rows"]}
    assert len(shares) == len(WAYS)
    assert shares[MESSAGES, "fresh cc_version"] < 0.02
    assert shares[CHAT, "fresh cch"] < 0.02
    assert all(share > 0.98 for (_, way), share in shares.items() if "proxy" in way or way == "no header")


def test_without_the_engine_the_commands_say_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llama_server, "PACKAGES", ("no_such_engine",))
    with pytest.raises(SystemExit, match=r"foreign: no_such_engine missing: pip install 'tokenzero\[foreign\]'"):
        foreign.main([])
    with pytest.raises(SystemExit, match="llama_server: no_such_engine missing"):
        llama_server.main(["--model", "x"])
    write_demo_model(tmp_path / "model", config=TINY)
    config = tmp_path / "sweep.toml"
    config.write_text(f'[target]\nkind = "llama.cpp"\n[axes]\nmodel = ["{tmp_path}/model"]\nprompt_tokens = [512]\n')
    assert sweep([str(config), "--out", str(tmp_path / "out")]) == 2
    assert "no_such_engine missing" in capsys.readouterr().err
