"""The dashboard's routes and files, and the statuses in `/v1/requests`. How it looks is tested in tests/clients."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from experiments.harness.client import scrape
from experiments.harness.server import running_server
from serve.api.answers import encode
from serve.api.messages import CountTokensRequest, decode_count_tokens
from serve.diagnosis.savings import CHUNK, LINK_BYTES, Savings
from serve.web.assets import ASSETS
from tests.helpers.http import BILLING, FLAGS, Json, ask, eventually, open_request, post, read_until, text_block

BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
STRIP = "strip-preamble"
LONG = "You answer in one line. " * 100


@pytest.fixture(scope="module")
def locked(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client without the key of a server that wants one."""
    log = tmp_path_factory.mktemp("locked") / "server.log"
    with running_server(model_folder, *FLAGS, "--api-key", "k", log=log) as running:
        yield httpx.Client(base_url=running.url)


class TestFiles:
    def test_browsers_get_the_page_and_other_clients_json(self, client: httpx.Client) -> None:
        page = client.get("/", headers=BROWSER)
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.text.startswith("<!doctype html>")
        assert client.get("/").json() == {"name": "tokenzero"}

    def test_head_is_answered_for_every_media_type(self, client: httpx.Client) -> None:
        for headers in ({}, BROWSER):
            response = client.head("/", headers=headers)
            assert (response.status_code, response.content) == (200, b"")

    def test_all_that_the_page_loads_is_there_and_may_come_from_here_only(self, client: httpx.Client) -> None:
        paths = {path for asset in ASSETS.values() for path in references(asset.content.decode())}
        assert {"/dashboard/main.js", "/dashboard/style.css", "/dashboard/strips.js"} <= paths
        for path in paths:
            response = client.get(path)
            assert response.status_code == 200, path
            assert response.headers["content-type"].startswith("text/css" if path.endswith("css") else "text/java")
            assert "default-src 'none'; script-src 'self';" in response.headers["content-security-policy"]

    def test_nothing_external_is_named(self) -> None:
        for path, asset in ASSETS.items():
            urls = re.findall(r"(?:\w+:)?//[\w.]+[^\s\"']*", asset.content.decode().replace("// ", ""))
            assert set(urls) <= {"http://www.w3.org/2000/svg"}, path

    def test_the_page_needs_no_key_and_what_it_shows_does(self, locked: httpx.Client) -> None:
        assert locked.get("/", headers=BROWSER).status_code == 200
        assert all(locked.get(path).status_code == 200 for path in ASSETS)
        for path in ("/v1/requests", "/metrics"):
            assert locked.get(path).status_code == 401
            assert locked.get(path, headers={"x-api-key": "k"}).status_code == 200

    def test_unknown_files_are_no_labels_of_the_metrics(self, client: httpx.Client) -> None:
        assert client.get("/dashboard/unknown.js").status_code == 404
        assert not [key for key in scrape(client) if "unknown.js" in key]


def references(text: str) -> set[str]:
    """The paths that a file of the page loads."""
    names = re.findall(r'(?:src|href)="(/[^"]+)"|from "\./([^"]+)"', text)
    return {absolute or f"/dashboard/{relative}" for absolute, relative in names}


def record_of(client: httpx.Client, id: str) -> Json:
    return client.get(f"/v1/requests/{id}").json()


class TestStatuses:
    def test_a_status_has_the_ttft_and_the_generated_tokens(self, client: httpx.Client) -> None:
        answer = post(client, ask("A status?", max_tokens=5))
        record = record_of(client, answer["id"])
        assert record["state"] == "done"
        assert record["generated_tokens"] == answer["usage"]["output_tokens"]
        assert 0 < record["ttft_ms"] < 60_000
        listed = client.get("/v1/requests").json()
        assert listed["data"][0] | {"sections": record["sections"]} == record
        assert listed["causes"]["preamble"]

    def test_a_request_runs_until_its_client_goes_away(self, client: httpx.Client) -> None:
        with open_request(str(client.base_url), ask("7", max_tokens=10_000, stream=True)) as connection:
            id = re.search(rb'"id":\s*"(msg_\w+)"', read_until(connection, b"content_block_delta"))[1].decode()
            assert record_of(client, id).get("state", "running") == "running"
        eventually(lambda: record_of(client, id).get("state") == "aborted", "the request is over")

    def test_what_a_rule_saved_is_reported_and_counted(self, client: httpx.Client) -> None:
        name = f'tokenzero_rule_saved_tokens_total{{rule="{STRIP}"}}'
        before = scrape(client).get(name, 0)
        for number in (0x11111, 0x22222):
            system = [text_block(BILLING.format(number)), text_block(f"Saved? {LONG}")]
            answer = post(client, ask("Hi", max_tokens=1, system=system))
        eventually(lambda: "saved_tokens" in record_of(client, answer["id"]), "what was saved is known")
        saved = record_of(client, answer["id"])["saved_tokens"]
        reused = answer["usage"]["cache_read_input_tokens"]
        assert 0.75 * reused < saved[STRIP] <= reused
        assert scrape(client)[name] == before + saved[STRIP]

    def test_what_was_audited_is_counted_for_the_page(self, client: httpx.Client) -> None:
        named = set(re.findall(r'"(tokenzero_audit\w+)"', ASSETS["/dashboard/main.js"].content.decode()))
        assert named == {"tokenzero_audited_requests_total", "tokenzero_audit_mismatches_total"}
        figures = scrape(client)
        assert named <= figures.keys()
        assert figures["tokenzero_audit_mismatches_total"] == 0


def request(header: str = "", system: str = LONG, **more: Any) -> CountTokensRequest:
    blocks = [{"type": "text", "text": text} for text in (header, system) if text]
    return decode_count_tokens(encode(ask("Hi", system=blocks) | more))


def tools(*names: str) -> list[Json]:
    return [{"name": name, "description": LONG, "input_schema": {"type": "object"}} for name in names]


class TestSavings:
    """Prompts are as many tokens as characters here, so that figures can be checked by eye."""

    LENGTH = len(LONG) + 4

    def observe(self, savings: Savings, *args: Any, rules: tuple[str, ...] = (STRIP,), **more: Any) -> dict[str, int]:
        reused = more.pop("reused", 10**6)
        return savings.observe(request(*args, **more), rules, reused, self.LENGTH)

    def test_a_fresh_header_costs_all_but_for_the_rule(self) -> None:
        savings = Savings()
        assert self.observe(savings, BILLING.format(1)) == {}
        saved = self.observe(savings, BILLING.format(2))
        assert saved == {STRIP: pytest.approx(self.LENGTH, abs=CHUNK)}

    def test_a_header_that_stays_the_same_costs_nothing(self) -> None:
        savings = Savings()
        self.observe(savings, BILLING.format(1))
        assert sum(self.observe(savings, BILLING.format(1)).values()) <= CHUNK

    def test_a_rule_saves_no_more_than_was_reused(self) -> None:
        savings = Savings()
        self.observe(savings, BILLING.format(1))
        assert self.observe(savings, BILLING.format(2), reused=700) == {STRIP: 700}

    def test_each_rule_is_credited_with_what_it_alone_saved(self) -> None:
        savings, rules = Savings(), (STRIP, "sort-tools")
        self.observe(savings, BILLING.format(1), tools=tools("A", "B"), rules=rules)
        saved = self.observe(savings, BILLING.format(1), tools=tools("B", "A"), rules=rules)
        # The header was the same, so the system text would have matched without the rule for tools.
        assert saved.keys() == {"sort-tools"}

    def test_memory_is_bounded_and_a_full_one_costs_no_more(self) -> None:
        savings = Savings(most_bytes=4 * LINK_BYTES)
        for number in range(100):
            self.observe(savings, BILLING.format(number), system=LONG + str(number))
            assert savings.bytes <= 4 * LINK_BYTES
        assert isinstance(savings.links, OrderedDict), "whose oldest entry is found at once; a dict's is not"

    def test_salts_share_nothing(self) -> None:
        savings = Savings()
        for salt in (b"a", b"b"):
            assert savings.observe(request(BILLING.format(1)), (STRIP,), 10**6, self.LENGTH, salt) == {}
