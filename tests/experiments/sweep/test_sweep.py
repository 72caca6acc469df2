"""Sweeps: what is asked in which arm, what is kept, and what is refused before anything runs."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.sweep.__main__ import main
from experiments.sweep.config import ConfigError, check_model, points, read_config, schedule
from experiments.sweep.fit import model_config
from experiments.sweep.prompts import Point, expected_cached, layout, messages, shared, tokens_of
from experiments.sweep.run_folder import Measurement, Run, RunError, cells, load, median_interval
from experiments.sweep.targets import Answer
from experiments.workloads.demo_model import TINY, write_demo_model
from experiments.workloads.gguf_file import write_gguf
from serve.cost.model import cost_model

Json = dict[str, Any]

CONFIG = """
seed = 1
warmups = {warmups}
repeats = {repeats}
tools_tokens = 40

[target]
{target}

[axes]
model = ["{model}"]
arm = {arms}
prompt_tokens = {lengths}
position = ["0%", "50%", 10]
header_tokens = [8]
suffix_tokens = [8]
page_size = [16]
"""
IN_PROCESS = 'kind = "in-process"\nmax_prefill_tokens = 64'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "tiny"
    write_demo_model(folder, config=TINY)
    return folder


def config(model: Path | str, arms: tuple[str, ...] = ("varying",), **changed: Any) -> str:
    values = {"warmups": 1, "repeats": 2, "target": IN_PROCESS, "lengths": [96, 192]} | changed
    return CONFIG.format(model=model, arms=json.dumps(list(arms)), **values)


def write(folder: Path, text: str) -> Path:
    path = folder / "sweep.toml"
    path.write_text(text)
    return path


def point(arm: str, place: str = "", length: int = 100) -> Point:
    return Point(arm, "m", 16, length, 8, 8, place)  # type: ignore[arg-type]


def common(one: str, two: str) -> int:
    """Characters that both texts begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


# What an arm sends.


@pytest.mark.parametrize(
    ("arm", "place", "cached"),
    [
        ("stable", "", 92),
        ("varying", "0%", 0),
        ("varying", "50%", 42),
        ("varying", "100%", 84),
        ("varying", "10", 10),
        ("tools-first", "", 40),
        ("relocated", "", 84),
        ("stripped", "", 84),
        ("restarted", "", 92),
        ("evicted", "", 92),
        ("mutated-thinking", "25%", 21),
    ],
)
def test_two_requests_of_an_arm_share_what_it_says_and_no_more(arm: str, place: str, cached: int) -> None:
    parts = layout(point(arm, place), tools_tokens=40)
    assert expected_cached(parts) == cached
    one, two = (tokens_of(parts, 16_000, 0, np.random.default_rng(seed)) for seed in (1, 2))
    assert len(one) == len(two) == (92 if arm == "stripped" else 100)
    assert np.argmin(np.append(one == two, False)) == cached
    first = tokens_of(shared(parts), 16_000, 0, np.random.default_rng(3))
    assert np.array_equal(first, one[:cached])


def test_arms_share_the_stable_text_but_not_what_stands_in_front_of_it() -> None:
    stable, stripped = (
        tokens_of(layout(point(a)), 16_000, 0, np.random.default_rng(1)) for a in ("stable", "stripped")
    )
    assert np.array_equal(stable[8:92], stripped[:84])
    assert stable[0] != stripped[0]


def test_a_chat_carries_the_pieces_where_clients_have_them() -> None:
    def chat(arm: str, place: str, seed: int) -> list[Json]:
        return messages(layout(point(arm, place, 1000)), 4.0, 0, random.Random(seed))

    one, two = (chat("varying", "50%", seed) for seed in (1, 2))
    assert [message["role"] for message in one] == ["system", "user"]
    shared_text = one[0]["content"][: common(one[0]["content"], two[0]["content"])]
    assert shared_text.rstrip("0123456789abcdef-").endswith("Session context: ")
    assert one[1]["content"][:8] != two[1]["content"][:8]
    assert chat("stripped", "", 1)[0]["content"].startswith("x-anthropic-billing-header: cc_version=")
    assert chat("relocated", "", 1)[1]["content"].startswith("Session context: ")
    thinking = chat("mutated-thinking", "50%", 1)
    assert [message["role"] for message in thinking] == ["system", "user", "assistant", "user"]
    assert thinking[2]["reasoning_content"] != chat("mutated-thinking", "50%", 2)[2]["reasoning_content"]


def test_only_arms_that_are_placed_have_positions() -> None:
    found = points(read_config(config(".", ("stable", "varying"), target='kind = "openai"\nurl = "http://x"').encode()))
    assert [p.place for p in found if p.arm == "stable"] == ["", ""]
    assert len([p for p in found if p.arm == "varying"]) == 6


def test_the_order_is_random_and_the_same_for_one_seed() -> None:
    text = config(".", target='kind = "openai"\nurl = "http://x"', repeats=3)
    first, again = (read_config(text.encode()) for _ in range(2))
    group = points(first)
    order = schedule(first, group)
    assert order == schedule(again, group)
    assert order[: len(group)] != [(p, 0) for p in group]
    assert sorted(order, key=repr) == sorted([(p, r) for p in group for r in range(3)], key=repr)
    other = read_config(text.replace("seed = 1", "seed = 2").encode())
    assert schedule(other, group) != order


# What is refused, before anything runs.

ENDPOINT = 'kind = "openai"\nurl = "http://127.0.0.1:9"'


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repeats": 0}, r"\$\.repeats"),
        ({"target": 'kind = "in-process"\ncolour = "red"'}, "unknown field `colour`"),
        ({"target": 'kind = "mainframe"'}, "mainframe"),
        ({"target": 'kind = "messages"'}, "target.url: expected the endpoint's URL"),
        ({"arms": ("mutated-thinking",)}, "axes.arm: target in-process has no mutated-thinking"),
        ({"arms": ("restarted", "stable"), "target": ENDPOINT}, "axes.arm: target openai has no restarted"),
        ({"arms": ("sideways",)}, "sideways"),
        ({"lengths": [16]}, "axes.prompt_tokens: .* leaves no token to cache"),
        ({"lengths": []}, r"\$\.axes\.prompt_tokens"),
        ({"lengths": [20]}, "axes.position: 10 is outside the 4 tokens"),
        ({"arms": ("tools-first",), "lengths": [50]}, "tools_tokens: arm tools-first wants 1 to 34 .*, got 40"),
        ({"lengths": [4096]}, "axes.prompt_tokens: .* takes prompts below 4096 tokens, got 4096"),
        (
            {"model": "/nowhere"},
            "axes.model: /nowhere is no checkpoint that can be served: .*`python -m experiments.demo_model /nowhere`",
        ),
        ({"target": ENDPOINT}, "the target does not answer: http://127.0.0.1:9: ConnectError"),
    ],
)
def test_a_config_that_cannot_be_measured_is_refused_in_one_line(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], changes: Json, message: str
) -> None:
    path = write(tmp_path, config(**({"model": model} | changes)))
    assert main([str(path), "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sweep: {path}: ")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(line)
    if (tmp_path / "run").exists():
        assert load(tmp_path / "run") == []


@pytest.mark.parametrize("place", ["101%", "-1", '"-5%"', '"half"', "99999"])
def test_an_impossible_position_is_refused(model: Path, place: str) -> None:
    place = f'"{place}"' if place.endswith("%") else place
    with pytest.raises(ConfigError, match=r"axes\.position: "):
        read_config(config(model).replace("10]", f"{place}]").encode())


def test_a_gguf_file_is_a_model(model: Path, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "model.gguf")
    check_model(str(tmp_path / "model.gguf"), 4095)
    with pytest.raises(ConfigError, match=r"model\.gguf takes prompts below 4096 tokens, got 4096"):
        check_model(str(tmp_path / "model.gguf"), 4096)
    assert cost_model(model_config(str(tmp_path / "model.gguf"))) == cost_model(model_config(str(model)))
    assert model_config("the model of an endpoint") is None


def test_an_unknown_key_is_refused_by_its_name(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown field `sufix_tokens` - at `\$\.axes`"):
        read_config(config(model).replace("suffix_tokens", "sufix_tokens").encode())
    with pytest.raises(ConfigError, match="unknown field `repeat`"):
        read_config(config(model).replace("repeats", "repeat").encode())


def test_a_config_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.toml"), "--out", str(tmp_path / "run")]) == 2
    assert "No such file" in capsys.readouterr().err


# What is kept.


def test_a_sweep_goes_on_after_kill_9_without_losing_or_repeating_a_point(tmp_path: Path, model: Path) -> None:
    text = config(model, ("stable", "varying"), repeats=12)
    path, run = write(tmp_path, text), tmp_path / "run"
    lines = run / "measurements.jsonl"
    command = [sys.executable, "-m", "experiments.sweep", str(path), "--out", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while (not lines.exists() or lines.read_bytes().count(b"\n") < 7) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = lines.read_bytes()
    wanted = {(p, repeat) for p in points(read_config(text.encode())) for repeat in range(12)}
    assert 7 <= kept.count(b"\n") < len(wanted)
    whole = kept[: kept.rfind(b"\n") + 1]
    # A kill seldom tears a line; here it has.
    lines.write_bytes(whole + b'{"point":{"arm":"var')

    assert main([str(path), "--out", str(run)]) == 0
    assert lines.read_bytes().startswith(whole)
    found = load(run)
    assert len(found) == len(wanted)
    assert {(m.point, m.repeat) for m in found} == wanted
    sessions = json.loads((run / "run.json").read_text())["sessions"]
    assert {m.session for m in found} == {0, 1}
    assert len({session["nonce"] for session in sessions}) == 2

    complete = lines.read_bytes()
    assert main([str(path), "--out", str(run)]) == 0
    assert lines.read_bytes() == complete


@pytest.fixture(scope="module")
def every_arm(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Path, str]:
    """A run of every arm that an engine in this process has, and its config."""
    arms = ("stable", "varying", "stripped", "tools-first", "relocated", "restarted", "evicted")
    folder, text = tmp_path_factory.mktemp("arms"), config(model, arms, warmups=0, repeats=1, lengths=[160])
    assert main([str(write(folder, text)), "--out", str(folder / "run")]) == 0
    return folder / "run", text


def test_in_process_every_arm_finds_in_the_cache_what_it_should(every_arm: tuple[Path, str]) -> None:
    found = load(every_arm[0])
    assert {m.answer.prompt_tokens for m in found} == {160, 152}
    for m in found:
        if m.point.arm in ("restarted", "evicted"):
            # Only a tier has it, and what the tiny model computes sooner than it is read is computed.
            assert m.answer.cached_tokens == m.answer.restored_tokens <= m.expected_cached
        else:  # now and then a fresh token repeats what another request had in its place
            assert 0 <= m.answer.cached_tokens - m.expected_cached <= 1, m


def test_the_provenance_of_a_run_is_complete(every_arm: tuple[Path, str], model: Path) -> None:
    run, text = every_arm
    assert (run / "config.toml").read_text() == text
    (session,) = json.loads((run / "run.json").read_text())["sessions"]
    assert session["machine"].keys() >= {"system", "processor", "cores", "memory_gib"}
    assert session["versions"].keys() >= {"python", "jax", "numpy"}
    assert (session["dtype"], session["device"], session["page_size"]) == ("float32", "cpu", 16)
    assert (session["model"], session["target"], session["seed"]) == (str(model), "in-process", 1)
    assert len(session["commit"]) >= 12
    assert session["started"].endswith("Z")
    summary = json.loads((run / "summary.json").read_text())
    assert [cell["repeats"] for cell in summary] == [1] * 9
    assert all(cell["low_ms"] <= cell["ttft_ms"] <= cell["high_ms"] for cell in summary)


def test_a_folder_of_another_run_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "run", b"one")
    run.append(Measurement(point("stable"), 0, Answer(1.0, 100, 92), 92, 0, "now"))
    with pytest.raises(RunError, match="holds a run of another config"):
        Run(tmp_path / "run", b"two")
    assert len(Run(tmp_path / "run", b"one").measured) == 1
    with pytest.raises(RunError, match="holds other files but not a run"):
        Run(tmp_path, b"one")


def test_a_line_that_is_no_measurement_is_named(tmp_path: Path) -> None:
    (tmp_path / "measurements.jsonl").write_text('{"point": 3}\n')
    with pytest.raises(RunError, match=r"measurements\.jsonl, line 1: .*\$\.point"):
        load(tmp_path)
    with pytest.raises(RunError, match="holds no run"):
        load(tmp_path / "nowhere")


def test_a_cell_is_the_median_of_its_repeats_with_an_interval() -> None:
    times = [10.0, 11.0, 12.0, 13.0, 50.0]
    measured = [Measurement(point("stable"), i, Answer(t, 100, None), 92, 0, "now") for i, t in enumerate(times)]
    (cell,) = cells(measured)
    assert (cell.ttft_ms, cell.cached_tokens, cell.repeats) == (12.0, 92, 5)
    assert 10 <= cell.low_ms < 12 < cell.high_ms <= 50
    rng = np.random.default_rng(0)
    intervals = [median_interval(rng.normal(5, 1, 25), rounds=200) for _ in range(100)]
    assert 85 <= sum(low <= 5 <= high for low, high in intervals) <= 100


# Endpoints.


@contextmanager
def chat_server(die_after: int = 10**9, silent_every: int = 10**9) -> Iterator[tuple[str, list[Json]]]:
    """A chat completions endpoint with a prefix cache over characters.

    It stops answering after so many requests, and its answers have no text every so often.
    """
    seen: list[str] = []
    bodies: list[Json] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if len(bodies) >= die_after:
                self.close_connection = True
                return
            bodies.append(body)
            text = "\n".join(m["content"] + m.get("reasoning_content", "") for m in body["messages"])
            cached = max((common(text, other) for other in seen), default=0)
            seen.append(text)
            self.send_response(200)
            self.end_headers()
            usage = {"prompt_tokens": len(text) // 5, "prompt_tokens_details": {"cached_tokens": cached // 5}}
            delta = {} if len(bodies) % silent_every == 0 else {"content": "word"}
            for event in ({"choices": [{"delta": {"role": "assistant"}}]}, {"choices": [{"delta": delta}]}):
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())

        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        server.server_close()


def endpoint(url: str, kind: str = "openai") -> str:
    return f'kind = "{kind}"\nurl = "{url}"'


def test_an_openai_endpoint_is_asked_for_prompts_of_the_right_size(tmp_path: Path) -> None:
    arms = ("stable", "varying", "relocated", "mutated-thinking", "tools-first")
    with chat_server() as (url, bodies):
        path = write(tmp_path, config("gpt", arms, target=endpoint(url), lengths=[2000]))
        assert main([str(path), "--out", str(tmp_path / "run")]) == 0
    found = load(tmp_path / "run")
    assert all(abs(m.answer.prompt_tokens - 2000) < 60 for m in found)
    assert all(abs(m.answer.cached_tokens - m.expected_cached) < 60 for m in found)
    assert {body["model"] for body in bodies} == {"gpt"}
    assert all(body["stream"] and body["stream_options"] == {"include_usage": True} for body in bodies)


def test_a_target_that_dies_half_way_leaves_a_run_that_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with chat_server(die_after=20) as (url, _):
        path = write(tmp_path, config("gpt", target=endpoint(url), lengths=[500, 700], repeats=3))
        assert main([str(path), "--out", str(run)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the target stopped answering" in line
    kept = load(run)
    assert 0 < len(kept) < 18
    assert f"{len(kept)} of 18 measurements are kept in {run}" in line


def test_an_empty_answer_is_asked_for_again(tmp_path: Path) -> None:
    with chat_server(silent_every=3) as (url, bodies):
        path = write(tmp_path, config("gpt", target=endpoint(url), lengths=[500], repeats=1, warmups=0))
        assert main([str(path), "--out", str(tmp_path / "run")]) == 0
    assert len(load(tmp_path / "run")) == 3
    # Two probes, three measurements, and two requests that leave a prefix in the cache for them.
    assert len(bodies) > 2 + 3 + 2


def test_our_server_is_started_measured_and_restarted(tmp_path: Path, model: Path) -> None:
    arms = ("stable", "varying", "stripped", "relocated", "mutated-thinking", "restarted")
    target = 'kind = "server"\nmax_prefill_tokens = 128\nflags = ["--max-num-seqs", "1"]'
    path = write(tmp_path, config(model, arms, target=target, warmups=0, repeats=1, lengths=[800]))
    assert main([str(path), "--out", str(tmp_path / "run")]) == 0
    found = load(tmp_path / "run")
    assert all(abs(m.answer.prompt_tokens - 800) < 100 for m in found)
    for m in found:
        assert m.answer.cached_tokens is not None
        if m.point.arm == "restarted":
            assert m.answer.cached_tokens == m.answer.restored_tokens
        else:
            assert abs(m.answer.cached_tokens - m.expected_cached) < 80, m
    (session,) = json.loads((tmp_path / "run" / "run.json").read_text())["sessions"]
    assert (session["dtype"], session["device"]) == ("float32", "cpu")
