"""What one key can learn of another's prompts: nothing, by usage, reports, errors, replay or restored pages."""

from __future__ import annotations

import hashlib
import signal
import string
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from contextvars import copy_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from experiments.harness.client import scrape
from experiments.harness.server import Server, running_server
from serve.api.messages import InvalidRequest
from serve.limits.recent import SCOPE
from serve.server.callers import request_context_of
from serve.server.config import ServerConfig
from serve.server.context import RequestContext
from serve.web.keys import Admission, Key, Usage
from tests.helpers.http import (
    FLAGS,
    Json,
    ask,
    ask_for_long,
    error_of,
    eventually,
    open_request,
    post,
    prompt_tokens,
    text_of,
)

SECRETS = {"alice": "alice's key", "bob": "bob's key", "carol": "carol's key", "ops": "the operator's"}
LIMITS = {"carol": "requests=1 tokens=400", "ops": "admin"}
VAULT = "These are the instructions of the vault, and they are longer than a page of the cache. " * 3
PIN = "4711"


def key_lines(names: dict[str, str]) -> str:
    hashes = {name: hashlib.sha256(secret.encode()).hexdigest() for name, secret in names.items()}
    return "\n".join(f"{name} sha256:{hash} {LIMITS.get(name, '')}" for name, hash in hashes.items())


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(key_lines(SECRETS))
    return path


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "server.log"


@pytest.fixture(scope="module")
def server(model_folder: Path, key_file: Path, log: Path) -> Iterator[Server]:
    """A server with several keys and a store."""
    flags = (*FLAGS, "--api-key-file", str(key_file), "--store", str(log.parent / "store"), "--flush-seconds", "0.05")
    with running_server(model_folder, *flags, log=log) as running:
        yield running
    assert "Traceback" not in log.read_text()


Of = Callable[[str], httpx.Client]


@pytest.fixture(scope="module")
def of(server: Server) -> Iterator[Of]:
    """A client with the key of a name."""
    clients = {
        name: httpx.Client(base_url=server.url, headers={"x-api-key": secret}, timeout=60)
        for name, secret in SECRETS.items()
    }
    yield clients.__getitem__
    for client in clients.values():
        client.close()


def read(answer: Json) -> int:
    """The tokens that an answer read from the cache."""
    return answer["usage"]["cache_read_input_tokens"]


def report_of(client: httpx.Client, answer: Json) -> Json:
    reports: list[Json] = []

    def made() -> bool:
        found = client.get(f"/v1/requests/{answer['id']}")
        reports.extend([found.json()] if found.status_code == 200 else [])
        return bool(reports)

    eventually(made, "there is a report")
    return reports[0]


def seen(client: httpx.Client, text: str, **headers: str) -> tuple[Any, ...]:
    """All that a caller is told of a prompt, but for ids and times."""

    def count() -> Json:
        found = client.post("/v1/messages/count_tokens", json=ask(text), headers=headers).json()
        return found | {"cache": {name: each for name, each in found["cache"].items() if name != "predicted_ttft_ms"}}

    asked = count()
    answer = post(client, ask(text, 1), **headers)
    report = report_of(client, answer)
    changing = ("id", "request_id", "time", "ttft_ms", "phases_ms", "prompt_text", "lost_ms")
    listed = [each["key"] for each in client.get("/v1/requests").json()["data"]]
    report["forecast"].pop("predicted_ttft_ms")
    told = {name: value for name, value in report.items() if name not in changing}
    return answer["usage"], told, set(listed), asked, count(), text_of(answer)


class TestExtraction:
    def test_a_secret_of_another_key_cannot_be_guessed_digit_by_digit(self, of: Of) -> None:
        victim, attacker = of("alice"), of("bob")
        prompt = f"{VAULT}The PIN of the safe is "
        post(victim, ask(f"{prompt}{PIN} and stays secret", 1))
        # The head is new to this key once; from then on it reuses its own, and a right digit looks as a wrong one.
        assert read(post(attacker, ask(f"{prompt}x", 1))) == 0
        own = [post(attacker, ask(f"{prompt}{digit}", 1)) for digit in string.digits]
        assert all(read(answer) > 100 for answer in own), "its own prefix is reused in full"
        for at, digit in enumerate(PIN):
            told = {}
            for guess in string.digits:
                usage, report, *_ = seen(attacker, f"{prompt}{PIN[:at]}{guess} is a guess")
                told[guess] = (usage["cache_read_input_tokens"], report["cause"], report.get("lost_tokens"))
            wrong = [value for guess, value in told.items() if guess != digit]
            assert told[digit] in wrong, f"{digit} after {PIN[:at]!r} stands out: {told}"

    def test_a_caller_is_told_the_same_before_and_after_another_key_has_sent_its_prompt(self, of: Of) -> None:
        text = "A story of two cities and a dozen rivers. " * 8
        before = seen(of("bob"), text, **{"x-tokenzero-cache-salt": "before"})
        answer = post(of("alice"), ask(text, 8))
        assert read(post(of("alice"), ask(text, 1))) == prompt_tokens(answer["usage"]) - 1
        assert seen(of("bob"), text, **{"x-tokenzero-cache-salt": "after"}) == before

    def test_a_salt_of_ones_own_opens_no_other_keys_pages(self, of: Of) -> None:
        text = "Salted and shared with nobody else. " * 8
        salt = {"x-tokenzero-cache-salt": "s"}
        post(of("alice"), ask(text, 1), **salt)
        assert read(post(of("alice"), ask(text, 1), **salt)) > 0
        assert read(post(of("alice"), ask(text, 1))) < 10, "the template's first tokens"
        for guess in ("s", "alice", "\\0key\\0alice\\0s"):
            assert read(post(of("bob"), ask(text, 1), **{"x-tokenzero-cache-salt": guess})) == 0

    def test_pages_in_the_store_are_for_their_key_as_well(
        self, of: Of, model_folder: Path, key_file: Path, log: Path, server: Server
    ) -> None:
        text = "What the store has of it. " * 12
        answer = post(of("alice"), ask(text, 1))
        eventually(lambda: scrape(of("ops"))["tokenzero_write_queue_bytes"] == 0, "the pages are written")
        flags = (*FLAGS, "--api-key-file", str(key_file), "--store", str(log.parent / "store"))
        with running_server(model_folder, *flags, log=log.parent / "second.log") as second:
            bob, alice = ({"x-api-key": SECRETS[name]} for name in ("bob", "alice"))
            with httpx.Client(base_url=second.url, timeout=60) as client:
                assert read(post(client, ask(text, 1), **bob)) == 0
                assert read(post(client, ask(text, 1), **alice)) >= prompt_tokens(answer["usage"]) - 17


class TestShown:
    def test_a_key_sees_its_own_requests_and_an_admin_all(self, of: Of) -> None:
        answers = {name: post(of(name), ask(f"I am {name}", 1)) for name in ("alice", "bob")}
        for name, answer in answers.items():
            report_of(of(name), answer)
            assert {each["key"] for each in of(name).get("/v1/requests").json()["data"]} == {name}
            listed = {each["id"]: each["key"] for each in of("ops").get("/v1/requests").json()["data"]}
            assert listed[answer["id"]] == name
        foreign, unknown = (of("bob").get(f"/v1/requests/{id}") for id in (answers["alice"]["id"], "msg_0"))
        error_of(foreign, 404, "not_found_error")
        assert foreign.text.replace(answers["alice"]["id"], "msg_0") == unknown.text

    def test_diagnostics_know_no_message_of_another_key(self, of: Of) -> None:
        first = post(of("alice"), ask("What is known? " * 10, 1))
        asked = ask("What is known? " * 10, 1, diagnostics={"previous_message_id": first["id"]})
        assert post(of("bob"), asked)["diagnostics"] == {"cache_miss_reason": {"type": "previous_message_not_found"}}
        assert post(of("alice"), asked)["diagnostics"] is None

    def test_parts_that_change_are_reported_to_whom_they_are_of(self, of: Of) -> None:
        for number in range(5):
            post(of("alice"), ask(f"Turn {number}", 1, system=f"You are.\nTrace id: {number * 7919:08x}\nBe brief."))
        assert "Trace id" in of("alice").get("/v1/requests").text
        assert "Trace id" not in of("bob").get("/v1/requests").text
        assert "Trace id" in of("ops").get("/v1/requests").text

    def test_metrics_are_a_keys_own_and_an_admins_all(self, of: Of) -> None:
        before = scrape(of("bob"))
        usage = post(of("bob"), ask("Count me", 4))["usage"]
        after = scrape(of("bob"))
        assert all('key="bob"' in name for name in after)
        grown = {name.removeprefix("tokenzero_key_"): after[name] - before[name] for name in after}
        assert grown['requests_total{key="bob"}'] == 1
        assert grown['prompt_tokens_total{key="bob"}'] == prompt_tokens(usage)
        assert grown['generated_tokens_total{key="bob"}'] == usage["output_tokens"]
        assert grown['requests_in_flight{key="bob"}'] == 0
        everything = scrape(of("ops"))
        assert {"tokenzero_requests_total", 'tokenzero_key_requests_total{key="alice"}'} <= everything.keys()

    def test_no_word_of_a_prompt_is_in_the_log(self, of: Of, log: Path) -> None:
        for word in ("swordfish", "kingfisher"):
            report_of(of("alice"), post(of("alice"), ask("Hi " * 50, 1, system=f"You are {word}. " * 9)))
        eventually(lambda: "system_changed" in log.read_text(), "the report is logged")
        assert "fish" not in log.read_text()


class TestAdmission:
    def test_a_wrong_key_is_refused_counted_and_logged_with_its_address(self, of: Of, log: Path) -> None:
        before = scrape(of("ops"))["tokenzero_wrong_keys_total"]
        for headers in ({"x-api-key": "wrong"}, {"authorization": "Bearer wrong"}):
            refused = httpx.get(f"{of('ops').base_url}/v1/requests", headers=headers)
            error_of(refused, 401, "authentication_error")
        assert httpx.get(f"{of('ops').base_url}/v1/requests").status_code == 401
        assert scrape(of("ops"))["tokenzero_wrong_keys_total"] == before + 2, "none is no wrong one"
        assert "wrong API key from 127.0.0.1, 1 so far" in log.read_text()

    def test_what_is_beyond_a_limit_is_refused_and_says_when_to_try_again(self, of: Of) -> None:
        too_large = of("carol").post("/v1/messages", json=ask("Hi", 10_000))
        assert "'carol' may have 400 tokens in flight" in error_of(too_large, 400, "invalid_request_error")
        with of("carol").stream("POST", "/v1/messages", json=ask_for_long("Go") | {"max_tokens": 300, "stream": True}):
            second = of("carol").post("/v1/messages", json=ask("Hi", 1))
            assert "1 requests in flight" in error_of(second, 429, "rate_limit_error")
            assert second.headers["retry-after"] == "1"
            assert of("bob").post("/v1/messages", json=ask("Hi", 1)).status_code == 200
        eventually(lambda: of("carol").post("/v1/messages", json=ask("Hi", 1)).status_code == 200, "its place is free")

    def test_keys_are_read_again_on_sighup(self, of: Of, key_file: Path, server: Server, log: Path) -> None:
        late = {"x-api-key": "dave's key"}
        assert httpx.get(f"{server.url}/v1/models", headers=late).status_code == 401
        try:
            key_file.write_text(key_lines(SECRETS | {"dave": "dave's key"}))
            server.process.send_signal(signal.SIGHUP)
            eventually(lambda: httpx.get(f"{server.url}/v1/models", headers=late).status_code == 200, "dave is known")
            key_file.write_text("nonsense")
            server.process.send_signal(signal.SIGHUP)
            eventually(lambda: "the keys before stay in force" in log.read_text(), "the log says what is wrong")
            assert of("alice").get("/v1/models").status_code == 200
        finally:
            key_file.write_text(key_lines(SECRETS))
            server.process.send_signal(signal.SIGHUP)
        eventually(lambda: httpx.get(f"{server.url}/v1/models", headers=late).status_code == 401, "dave is gone")


class TestShares:
    def test_many_requests_of_one_key_do_not_hold_up_anothers(self, of: Of, server: Server) -> None:
        """All places of the batch and more are taken for thousands of tokens, and another key's request is answered."""
        key = {"x-api-key": SECRETS["alice"]}
        bodies = [ask_for_long(f"{number}") | {"stream": True} for number in range(12)]
        with ExitStack() as connections:
            for body in bodies:
                connections.enter_context(open_request(server.url, body, **key))
            eventually(lambda: scrape(of("ops"))["tokenzero_num_requests_waiting"] >= 8, "the batch is full")
            before = scrape(of("ops"))
            assert of("bob").post("/v1/messages", json=ask("And me?", 4)).status_code == 200
            after = scrape(of("ops"))
            assert after["tokenzero_preemptions_total"] > before["tokenzero_preemptions_total"]
            assert after["tokenzero_num_requests_waiting"] >= 8, "the others have not ended meanwhile"
        eventually(lambda: scrape(of("ops"))["tokenzero_num_requests_running"] == 0, "all have ended")


class TestScope:
    """What a request shares, by the keys in force and `--share-prefix`."""

    @pytest.fixture(autouse=True)
    def unscoped(self) -> Iterator[None]:
        before = SCOPE.set("")
        yield
        SCOPE.reset(before)

    def context_of(self, share: str, name: str | None, **headers: str) -> RequestContext:
        sent = {"x-api-key": "secret", **{header.replace("_", "-"): value for header, value in headers.items()}}
        raw = [(header.encode(), value.encode()) for header, value in sent.items()]
        admission = None if name is None else Admission(Key(name, b""), Usage(), 0.0)
        scope = {"type": "http", "headers": raw, "admission": admission}
        server = SimpleNamespace(config=ServerConfig(model="m", share_prefix=share), rules=frozenset())
        return request_context_of(Request(scope), server)  # type: ignore[arg-type]

    @pytest.mark.parametrize(("share", "name"), [("none", None), ("none", ""), ("all", "alice"), ("all", None)])
    def test_without_named_keys_and_with_all_shared_pages_and_answers_have_the_names_of_before(
        self, share: str, name: str | None
    ) -> None:
        found = self.context_of(share, name, x_tokenzero_cache_salt="s")
        assert (found.salt, found.key) == (b"s", b"secret")
        assert self.context_of(share, name).salt == b""

    @pytest.mark.parametrize("name", [None, "alice"])
    def test_tokenised_text_and_grammars_are_kept_for_each_salt(self, name: str | None) -> None:
        scopes = set()
        for salt in ({}, {"x_tokenzero_cache_salt": "s"}, {"x_tokenzero_cache_salt": "t"}):
            context = copy_context()
            found = context.run(self.context_of, "none", name, **salt)
            scopes.add((context[SCOPE], found.salt.decode()))
        assert len(scopes) == 3
        assert all(scope == salt for scope, salt in scopes)

    def test_no_salt_of_a_client_is_that_of_a_key(self) -> None:
        with pytest.raises(InvalidRequest, match="x-tokenzero-cache-salt: expected no zero bytes"):
            self.context_of("none", None, x_tokenzero_cache_salt="\0key\0alice\0")

    def test_a_named_key_has_a_salt_and_answers_of_its_own_under_any_secret(self) -> None:
        alice, bob = self.context_of("none", "alice"), self.context_of("none", "bob")
        assert alice.salt != bob.salt
        assert (alice.key, alice.owner) == (b"alice", "alice")
        assert self.context_of("none", "alice", x_api_key="another").key == b"alice"
        assert self.context_of("none", "alice", x_tokenzero_cache_salt="s").salt != alice.salt
