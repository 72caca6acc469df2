"""Agent sessions: deterministic, append-only, of the measured sizes, and accepted by the server."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from itertools import islice, pairwise, takewhile

import pytest
from transformers import AutoTokenizer

from experiments.workloads.demo_model import TINY, write_demo_model
from experiments.workloads.sessions import (
    RELEASES,
    Session,
    billing_header,
    http_headers,
    request,
    requests,
    sized_request,
    stable_request,
    with_header,
    with_question,
)
from serve.api.messages import decode_request

TURNS = 26


def size(value):
    return len(json.dumps(value, ensure_ascii=False))


def guess(text):
    return round(len(text) / 3.7)


def unmarked(value):
    """The value as a server reads it: no markers, and text content as blocks."""
    if isinstance(value, dict):
        kept = {key: unmarked(inner) for key, inner in value.items() if key != "cache_control"}
        if isinstance(kept.get("content"), str):
            kept["content"] = [{"type": "text", "text": kept["content"]}]
        return kept
    return [unmarked(inner) for inner in value] if isinstance(value, list) else value


def markers(value):
    if isinstance(value, dict):
        return ("cache_control" in value) + sum(map(markers, value.values()))
    return sum(map(markers, value)) if isinstance(value, list) else 0


def shared_start(one, two):
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))


class Counter:
    """A count of tokens that knows how often it was asked."""

    def __init__(self, tokens):
        self.tokens, self.calls = tokens, 0

    def __call__(self, body):
        self.calls += 1
        return self.tokens(json.dumps(body, ensure_ascii=False))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "model"
    write_demo_model(path, config=TINY)
    return AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_another_process_makes_the_same_bytes(hash_seed):
    command = [sys.executable, "-m", "experiments.workloads.sessions", "--seed", "3", "--turn", "9"]
    other = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": hash_seed}, capture_output=True, check=True)
    ours = json.dumps(request(Session(3), 9), ensure_ascii=False)
    assert hashlib.sha256(other.stdout.strip()).digest() == hashlib.sha256(ours.encode()).digest()


@pytest.mark.parametrize("release", RELEASES)
def test_every_request_extends_the_one_before(release):
    bodies = list(islice(requests(Session(release=release), header=False), TURNS))
    for before, after in pairwise(bodies):
        old, new = unmarked(before), unmarked(after)
        assert new.pop("messages")[: len(before["messages"])] == old.pop("messages")
        assert new == old
        assert len(after["messages"]) > len(before["messages"])


def test_a_request_is_the_same_alone_and_in_its_session():
    assert request(Session(), 5) == next(islice(requests(Session()), 5, None))


def test_the_marker_moves_to_the_last_block_and_leaves_a_plain_string_behind():
    bodies = list(islice(requests(Session()), TURNS))
    assert {markers(body["messages"]) for body in bodies} == {1}
    assert all("cache_control" in body["messages"][-1]["content"][-1] for body in bodies)
    first, second = bodies[0]["messages"][-1], bodies[1]["messages"][len(bodies[0]["messages"]) - 1]
    assert isinstance(first["content"], list)
    assert second["content"] == first["content"][0]["text"]


@pytest.mark.parametrize(
    ("release", "system", "tools", "count", "messages"),
    [
        ("2.1.331", 6_900, 31_000, 12, 9_700),
        ("2.1.179", 5_700, 71_000, 25, 6_300),
        ("2.1.80", 16_000, 67_000, 22, 1_800),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_short_request_has_the_measured_sizes(release, system, tools, count, messages, seed):
    body = request(Session(seed, release=release))
    assert size(body["system"]) == pytest.approx(system, rel=0.1)
    assert size(body["tools"]) == pytest.approx(tools, rel=0.02)
    assert size(body["messages"]) == pytest.approx(messages, rel=0.1)
    assert len(body["tools"]) == count
    assert all(600 <= size(tool) <= 6_200 for tool in body["tools"])


def test_the_second_message_has_the_role_system_in_newer_releases_only():
    assert request(Session(release="2.1.179"))["messages"][1]["role"] == "system"
    assert [message["role"] for message in request(Session(release="2.1.80"))["messages"]] == ["user"]


def test_each_tool_result_follows_its_tool_use():
    messages = request(Session(), TURNS)["messages"]
    for call, answer in pairwise(messages):
        uses = [block["id"] for block in call["content"] if isinstance(block, dict) and block["type"] == "tool_use"]
        if uses:
            assert [block["tool_use_id"] for block in answer["content"]] == uses


PLAIN = r"x-anthropic-billing-header: cc_version=%s\.[0-9a-f]{3}; cc_entrypoint=sdk-cli;%s"


@pytest.mark.parametrize(
    ("release", "shape"),
    [
        ("2.1.331", PLAIN % (r"2\.1\.331", "")),
        ("2.1.179", PLAIN % (r"2\.1\.179", " cch=[0-9a-f]{5};")),
        ("2.1.80", PLAIN % (r"2\.1\.80", " cch=00000;")),
        ("2.0.76", ""),
        ("0.2.93", r"x-anthropic-billing-header: cc_version=0\.2\.93; cch=[A-Za-z0-9+/]{14}==;"),
    ],
)
def test_each_release_writes_its_header(release, shape):
    rng = random.Random(0)
    lines = {billing_header(rng, release) for _ in range(50)}
    assert all(re.fullmatch(shape, line) for line in lines)
    assert len(lines) == (50 if release in ("2.1.179", "0.2.93") else 1)
    system = request(Session(release=release))["system"]
    assert re.fullmatch(shape, system[0]["text"] if shape else "")
    assert ["cache_control" in block for block in system] == ([False] if shape else []) + [True, True]


def test_a_header_is_new_in_each_request_and_its_version_is_the_sessions():
    lines = [body["system"][0]["text"] for body in islice(requests(Session()), 5)]
    assert len(set(lines)) == 5
    assert len({line.split("cch=")[0] for line in lines}) == 1


def test_a_header_goes_in_front_and_leaves_the_request_as_it_was():
    body = request(Session(), header=False)
    before = json.dumps(body)
    assert with_header(body, "line")["system"][0] == {"type": "text", "text": "line"}
    assert with_header(body, "") == body
    assert with_header({"system": "plain"}, "line")["system"][1]["text"] == "plain"
    assert request(Session(), header="line") == with_header(body, "line")
    assert json.dumps(body) == before


@pytest.mark.parametrize("other", [Session(1), Session(folder="/srv/other")])
def test_sessions_share_nothing_from_the_start(other):
    one, two = (request(session, header=False) for session in (Session(), other))
    assert len(shared_start(one["system"][0]["text"], two["system"][0]["text"])) < 4
    assert len(shared_start(json.dumps(one["tools"]), json.dumps(two["tools"]))) < 80
    assert http_headers(Session()) != http_headers(other)


def test_sessions_of_a_group_share_tools_and_the_prompt_up_to_the_folder():
    one, two = (request(Session(seed, f"/srv/{seed}", group="k"), header=False) for seed in (1, 2))
    assert one["tools"] == two["tools"]
    texts = ["".join(block["text"] for block in body["system"]) for body in (one, two)]
    shared = shared_start(*texts)
    assert shared.endswith("are kept in /srv/")
    assert 1_500 < len(shared) < 4_000


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("tokens", [4_000, 8_000, 52_000, 200_000])
def test_a_sized_request_meets_its_size_in_few_counts(release, tokens):
    count = Counter(guess)
    body = sized_request(Session(release=release), tokens, count, question_seed=9)
    assert count.calls <= 6
    assert count(body) == pytest.approx(tokens, rel=0.005)


@pytest.mark.parametrize("tokens", [8_000, 52_000])
def test_a_sized_request_meets_its_size_with_a_real_tokenizer(tokenizer, tokens):
    count = Counter(lambda text: len(tokenizer.encode(text)))
    body = sized_request(Session(), tokens, count)
    assert count.calls <= 6
    assert count(body) == pytest.approx(tokens, rel=0.005)


def test_question_seeds_share_everything_but_the_last_message():
    count = Counter(guess)
    stable = stable_request(Session(), 30_000, count)
    before = json.dumps(stable)
    one, two = (with_question(stable, seed) for seed in (1, 2))
    assert one == sized_request(Session(), 30_000, count, question_seed=1)
    assert one["messages"].pop() != two["messages"].pop()
    assert json.dumps(one) == json.dumps(two)
    assert json.dumps(stable) == before
    sizes = [size(with_question(stable, seed)) for seed in range(20)]
    assert max(sizes) - min(sizes) < 100


def test_a_size_below_the_shortest_prompt_is_refused():
    with pytest.raises(ValueError, match="no prompt of 500 tokens"):
        stable_request(Session(), 500, Counter(guess))


def test_an_unknown_release_is_refused():
    with pytest.raises(ValueError, match=r"'9\.9'.*2\.1\.331"):
        Session(release="9.9")


@pytest.mark.parametrize("release", RELEASES)
def test_the_server_accepts_every_request(release):
    session = Session(release=release)
    bodies = [request(session), request(session, TURNS), sized_request(session, 8_000, Counter(guess))]
    for body in bodies:
        assert decode_request(json.dumps(body).encode()).stream
