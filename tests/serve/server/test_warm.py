"""Prompts that are computed before they are asked for, up to their last user message: by a route, and at the start."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from experiments.harness.client import scrape
from experiments.harness.server import Server, running_server
from serve.server.config import ServerConfig, parse_config
from serve.server.warm import read_warm
from serve.web.headers import SALT_HEADER
from tests.helpers.http import CONTEXT, FLAGS, Json, ask, encoded, error_of, long, post, prompt_tokens

SYSTEM = "These are instructions that many requests share, and they are longer than a page of the cache. " * 3
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"name": "read", "input_schema": SCHEMA}
CALL = [
    {"role": "user", "content": "Read it."},
    {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "read", "input": {"a": 1}}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "one"}]},
]


def warm(client: httpx.Client, body: Json, **headers: str) -> Json:
    response = client.post("/v1/cache/warm", json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


def read(client: httpx.Client, body: Json, **headers: str) -> int:
    return post(client, body, **headers)["usage"]["cache_read_input_tokens"]


def test_another_last_message_reads_all_that_was_warmed(client: httpx.Client) -> None:
    body = {"model": "m", "system": f"1: {SYSTEM}", "messages": [{"role": "user", "content": "What now?"}]}
    found = warm(client, body)
    assert (found["type"], found["until"]) == ("cache_warmed", "messages[0]")
    assert 100 < found["warmed_tokens"] < found["input_tokens"]
    parts = found["cache_read_input_tokens"], found["cache_creation_input_tokens"]
    assert sum(parts) == found["warmed_tokens"]
    assert parts[1] > 100
    assert found["phases_ms"]["prefill"] > 0
    asked = ask("And then something else?", 1, system=f"1: {SYSTEM}")
    assert read(client, asked) == found["warmed_tokens"]
    again = warm(client, body)
    assert again["cache_read_by_tier"] == {"device": again["warmed_tokens"] - 1}


def test_a_conversation_is_warmed_up_to_the_results_of_its_last_calls(client: httpx.Client) -> None:
    body = ask("", 1, system=f"2: {SYSTEM}", tools=[TOOL], messages=CALL)
    found = warm(client, body)
    assert found["until"] == "messages[2]"
    other = [*CALL[:2], {"role": "user", "content": [{**CALL[2]["content"][0], "content": "another"}]}]
    answer = post(client, body | {"messages": other})
    assert answer["usage"]["cache_read_input_tokens"] == found["warmed_tokens"]
    assert prompt_tokens(answer["usage"]) - found["warmed_tokens"] < 60


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_bodies_of_openais_apis_are_warmed_as_well(client: httpx.Client, api: str) -> None:
    system, question = f"{api}: {SYSTEM}", "Who are you?"
    asked = {
        "chat": {"messages": [{"role": "system", "content": system}, {"role": "user", "content": question}]},
        "responses": {"instructions": system, "input": question},
    }[api]
    found = warm(client, {"model": "m"} | asked)
    assert found["warmed_tokens"] > 100
    assert read(client, ask("What else?", 1, system=system)) == found["warmed_tokens"]


def test_a_salt_warms_for_itself(client: httpx.Client) -> None:
    body = ask("What?", 1, system=f"3: {SYSTEM}")
    warmed = warm(client, body, **{SALT_HEADER: "mine"})["warmed_tokens"]
    assert read(client, body) < 50
    assert read(client, ask("Why?", 1, system=f"3: {SYSTEM}"), **{SALT_HEADER: "mine"}) == warmed


def test_it_generates_nothing_and_refuses_what_a_request_would_be_refused_for(client: httpx.Client) -> None:
    before = scrape(client)["tokenzero_generated_tokens_total"]
    warm(client, ask("Hi", 1, system=f"4: {SYSTEM}"))
    assert scrape(client)["tokenzero_generated_tokens_total"] == before
    too_long = client.post("/v1/cache/warm", json=ask("Hi", 1, system=long(4, CONTEXT + 99)))
    assert "prompt is too long" in error_of(too_long, 400, "invalid_request_error")
    for broken in (b"{", b"[]", b'{"messages": 3}', b'{"model": "m", "messages": []}'):
        response = client.post("/v1/cache/warm", content=broken, headers={"content-type": "application/json"})
        error_of(response, 400, "invalid_request_error")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bodies for a start: a file with one, and one with two on its lines, of which one is far too long."""
    folder = tmp_path_factory.mktemp("warm")
    (folder / "a.json").write_bytes(encoded(ask("Hi", 1, system=f"alone: {SYSTEM}")))
    lines = [ask("Hi", 1, system=f"line: {SYSTEM}"), ask("Hi", 1, system=long(5, CONTEXT + 99))]
    (folder / "b.jsonl").write_bytes(b"\n\n".join(map(encoded, lines)))
    return folder


@pytest.fixture(scope="module")
def warmed(model_folder: Path, folder: Path) -> Iterator[Server]:
    """A server that was ready once it was warm, and a key that all its clients have."""
    flags = (*FLAGS, "--warm", str(folder), "--ready-when-warm")
    with running_server(model_folder, *flags, log=folder.parent / f"{folder.name}.log") as running:
        yield running


def test_a_server_is_ready_once_its_files_are_warm(warmed: Server, folder: Path) -> None:
    with httpx.Client(base_url=warmed.url, timeout=60) as client:
        for name in ("alone", "line"):
            assert read(client, ask("Who?", 1, system=f"{name}: {SYSTEM}")) > 100
    log = (folder.parent / f"{folder.name}.log").read_text()
    assert f"--warm: {folder}/b.jsonl:3: prompt is too long" in log
    assert "Traceback" not in log


def problem(files: str, **more: object) -> str:
    with pytest.raises(ValueError, match="--warm: ") as error:
        read_warm(ServerConfig("m", warm=files, **more))
    return str(error.value)


def test_a_broken_file_is_named_with_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('{"model": "m", "mess')
    (tmp_path / "lines.jsonl").write_text(json.dumps(ask("Hi")) + '\n{"model": "m", "messages": [{"role": "cook"}]}\n')
    assert "nowhere.json: expected a file of request bodies" in problem(str(tmp_path / "nowhere.json"))
    assert "cut.json: expected the body of a request to one of the three APIs" in problem(str(tmp_path / "cut.json"))
    assert "lines.jsonl:2: expected the body" in problem(str(tmp_path / "lines.jsonl"))


def test_keys_of_a_file_need_a_name_in_each_body(tmp_path: Path) -> None:
    keys, body = tmp_path / "keys", tmp_path / "body.json"
    keys.write_text(f"alice sha256:{hashlib.sha256(b'secret').hexdigest()}\n")
    body.write_text(json.dumps(ask("Hi")))
    assert "body.json: key: expected one of alice, found none" in problem(str(body), api_key_file=keys)
    body.write_text(json.dumps({"key": "bob", "body": ask("Hi")}))
    assert "found 'bob'" in problem(str(body), api_key_file=keys)
    body.write_text(json.dumps({"key": "alice", "body": ask("Hi")}))
    (found,) = read_warm(ServerConfig("m", warm=str(body), api_key_file=keys))
    assert found.key == "alice"


def test_ready_when_warm_needs_files(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--model", "m", "--ready-when-warm"])
    assert "--ready-when-warm: expected --warm FILES beside it" in capsys.readouterr().err
