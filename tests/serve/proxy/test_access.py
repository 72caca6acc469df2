"""A proxy with several keys: what one caller learns of another's requests through it, and of what the engine shows."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from experiments.harness.server import running_server
from serve.proxy.access import is_for_all, salted
from serve.proxy.cli import main
from serve.proxy.prefix import read_prompt
from serve.web.headers import SALT_HEADER
from serve.web.keys import Key, Keys
from tests.helpers.http import Json, ask, encoded, eventually
from tests.serve.proxy.test_chat import headers_of
from tests.serve.proxy.test_proxy import echo, engine, proxy_of

LIMITS: dict[str, Json] = {"alice": {}, "bob": {}, "carol": {"rate": 1}, "ops": {"admin": True}}


def keys() -> Keys:
    return Keys([Key(name, hashlib.sha256(name.encode()).digest(), **limits) for name, limits in LIMITS.items()])


def of(name: str) -> dict[str, str]:
    return {"x-api-key": name}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """A client of a proxy with several keys, and one of its own for the engine, before an engine that echoes."""
    with engine(echo) as url, proxy_of(url, key="the-engines", keys=keys()) as made:
        yield made


def report_on(client: httpx.Client, name: str, text: str, **headers: str) -> Json:
    answer = client.post("/v1/messages", json=ask(text), headers=of(name) | headers)
    assert answer.status_code == 200
    path = f"/v1/requests/{answer.headers['x-tokenzero-report']}"
    eventually(lambda: client.get(path, headers=of(name)).status_code == 200, "the report is made")
    found = client.get(path, headers=of(name)).json()
    assert client.get(path, headers=of("bob" if name == "alice" else "alice")).status_code == 404, "it is its key's own"
    return {
        field: found.get(field) for field in ("cause", "position", "lost_tokens", "nearest", "reused_tokens", "key")
    }


def test_a_prompt_of_another_key_is_in_no_report(client: httpx.Client) -> None:
    text = f"The PIN {'and so on ' * 40}is "
    assert report_on(client, "alice", f"{text}4711")["key"] == "alice"
    guesses = [report_on(client, "bob", f"{text}{pin}", **{SALT_HEADER: pin}) for pin in ("0000", "4700", "4711")]
    assert guesses == [guesses[0]] * 3
    assert report_on(client, "alice", f"{text}4712")["reused_tokens"] > 300, "its own are compared"


def test_each_sees_its_own_requests_and_an_admin_all(client: httpx.Client) -> None:
    for name in ("alice", "bob"):
        report_on(client, name, f"I am {name}")
        listed = client.get("/v1/requests", headers=of(name)).json()
        assert {each["key"] for each in listed["data"]} == {name}
        assert "without_report" not in listed
    assert {"alice", "bob"} <= {each["key"] for each in client.get("/v1/requests", headers=of("ops")).json()["data"]}


@pytest.mark.parametrize("path", ["/metrics", "/slots", "/x/v1/requests", "/api/v1/requests/a"])
def test_what_engines_show_of_others_is_for_admins(client: httpx.Client, path: str) -> None:
    refused = client.get(path, headers=of("alice"))
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
    assert client.get(path, headers=of("ops")).status_code == 200


@pytest.mark.parametrize(
    ("path", "for_all"),
    [
        ("/v1/messages", True),
        ("/anthropic/v1/messages/count_tokens", True),
        ("/chat/completions", True),
        ("/v1/models/a/b", True),
        ("/v1/embeddings", True),
        ("/", True),
        ("/v1/requests/msg_1", True),
        ("/v1/requests/../../slots", False),
        ("/v1/models/../requests", False),
        ("/v1/load_lora_adapter", False),
        ("/server_info", False),
    ],
)
def test_a_key_reaches_what_it_needs(path: str, for_all: bool) -> None:
    assert is_for_all(path) is for_all


def test_the_engine_gets_a_salt_of_each_key_and_not_the_key(client: httpx.Client) -> None:
    sent = [
        headers_of(client.post("/v1/completions", json=ask("Hi"), headers=of(name) | salt))
        for name in ("alice", "bob")
        for salt in ({}, {SALT_HEADER: "s"})
    ]
    assert len({each[SALT_HEADER] for each in sent}) == 4
    assert {each["x-api-key"] for each in sent} == {"the-engines"}


def test_the_choice_of_an_engine_knows_no_prompt_of_another_key() -> None:
    body = encoded(ask("A long prompt. " * 50))
    prompts = []
    for name in ("alice", "bob", "alice"):
        headers = {header.decode(): value.decode() for header, value in salted([], name)}
        prompts.append(read_prompt("1", body, "/v1/messages", headers).keys)
    assert np.array_equal(prompts[0], prompts[2])
    assert not set(prompts[0].tolist()) & set(prompts[1].tolist())


def test_wrong_keys_and_requests_beyond_a_limit_are_refused_in_the_form_of_the_api(client: httpx.Client) -> None:
    assert client.post("/v1/messages", json=ask("Hi"), headers=of("mallory")).status_code == 401
    assert client.post("/v1/messages", json=ask("Hi")).status_code == 401
    assert client.post("/v1/messages", json=ask("Hi"), headers=of("carol")).is_success
    late = client.post("/v1/chat/completions", json=ask("Hi"), headers=of("carol"))
    assert (late.status_code, late.json()["error"]["type"]) == (429, "rate_limit_error")
    assert int(late.headers["retry-after"]) > 30
    assert client.get("/v1/requests", headers=of("carol")).is_success, "reading costs nothing"


def test_a_key_file_is_read_by_the_command_and_again_on_sighup(tmp_path: Path, model_folder: Path) -> None:
    file = tmp_path / "keys"
    line = "{0} sha256:{1}\n".format
    hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("alice", "bob")}
    file.write_text(line("alice", hashes["alice"]))
    with engine(echo) as url:
        flags = ("--upstream", url, "--api-key-file", str(file))
        with running_server(model_folder, *flags, log=tmp_path / "log", program=("-m", "serve", "proxy")) as running:
            known = f"{running.url}/v1/models"
            assert [httpx.get(known, headers=of(name)).status_code for name in hashes] == [200, 401]
            file.write_text(line("bob", hashes["bob"]))
            running.process.send_signal(signal.SIGHUP)
            eventually(lambda: httpx.get(known, headers=of("bob")).status_code == 200, "it is read again")
            assert httpx.get(known, headers=of("alice")).status_code == 401


def test_a_wrong_key_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keys").write_text("alice secret")
    with pytest.raises(SystemExit):
        main(["--upstream", "http://127.0.0.1:9", "--api-key-file", str(tmp_path / "keys")])
    assert f"--api-key-file: {tmp_path / 'keys'}:1: key of alice" in capsys.readouterr().err
