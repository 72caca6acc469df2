"""What the server reports of its requests: the routes, the metrics, the log, and the API's cache diagnostics."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from experiments.harness.client import scrape
from experiments.harness.server import Server, running_server
from tests.helpers.http import BILLING, FLAGS, Json, ask, error_of, eventually, post, stream, text_block

KEEP = {"x-tokenzero-normalize": "none"}
TOOL = {"name": "Read", "description": "Reads a file.", "input_schema": {"type": "object", "properties": {}}}


def about(client: httpx.Client, answer: Json) -> Json:
    """The report on the request that was answered."""
    response = client.get(f"/v1/requests/{answer['id']}")
    assert response.status_code == 200, response.text
    return response.json()


def with_header(number: int, said: str = "What now?", **more: Any) -> Json:
    """A request whose system text contains `said` and begins with a header of its own."""
    blocks = [text_block(BILLING.format(number)), text_block(f"You answer in one line. {said} " * 12)]
    return ask(said, max_tokens=1, system=blocks, **more)


@pytest.fixture(scope="module")
def discreet(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Path]]:
    """A client with the key of a server that shows no text, and the server's log."""
    log = tmp_path_factory.mktemp("discreet") / "server.log"
    flags = (*FLAGS, "--no-prompt-text-in-reports", "--api-key", "k", "--host-cache-bytes", "16MB")
    with (
        running_server(model_folder, *flags, log=log) as running,
        httpx.Client(base_url=running.url, headers={"x-api-key": "k"}, timeout=60) as client,
    ):
        yield client, log


class TestRoutes:
    def test_the_header_that_broke_the_prefix_is_named(self, client: httpx.Client, server_log: Path) -> None:
        post(client, with_header(0x11111), **KEEP)
        before = scrape(client)
        answer = post(client, with_header(0x22222), **KEEP)
        report = about(client, answer)
        assert (report["cause"], report["section"]) == ("preamble", "system[0]")
        assert report["prompt_text"].startswith("22222")
        assert report["nearest_text"].startswith("11111")
        usage = answer["usage"]
        assert report["reused_tokens"] == usage["cache_read_input_tokens"] == report["position"]
        assert report["recomputed_tokens"] == usage["cache_creation_input_tokens"] + usage["input_tokens"]
        assert report["lost_tokens"] == report["prompt_tokens"] - report["position"] - 1
        after = scrape(client)
        name = 'tokenzero_cache_misses_total{cause="preamble"}'
        assert after[name] == before.get(name, 0) + 1
        eventually(lambda: answer["id"] in server_log.read_text(), "the request is logged")
        (line,) = [line for line in server_log.read_text().splitlines() if answer["id"] in line]
        assert re.search(r" cause=preamble at=\d+ section=system\[0\] lost=\d+ ", line)

    def test_a_stripped_header_breaks_nothing(self, client: httpx.Client) -> None:
        post(client, with_header(1, "Stripped?"))
        report = about(client, post(client, with_header(2, "Stripped?")))
        assert "cause" not in report
        assert report["rules"] == ["strip-preamble system[0]"]
        assert report["recomputed_tokens"] == 1

    def test_sections_cover_the_prompt(self, client: httpx.Client) -> None:
        report = about(client, post(client, with_header(1, "Sections?", tools=[TOOL])))
        sections = report["sections"]
        assert [s["section"] for s in sections] == ["template", "system[0]", "tools[0] Read", "messages[0] user"]
        assert [s["start"] for s in sections[1:]] == [s["stop"] for s in sections[:-1]]
        assert (sections[0]["start"], sections[-1]["stop"]) == (0, report["prompt_tokens"])

    def test_the_latest_requests_are_listed_and_an_unknown_one_is_not_found(self, client: httpx.Client) -> None:
        ids = [post(client, ask(f"List {n}", max_tokens=1))["id"] for n in range(2)]
        listed = client.get("/v1/requests").json()
        assert [report["id"] for report in listed["data"][:2]] == ids[::-1]
        assert "msg_unknown" in error_of(client.get("/v1/requests/msg_unknown"), 404, "not_found_error")

    def test_ids_are_no_labels_of_the_metrics(self, client: httpx.Client) -> None:
        client.get("/v1/requests/msg_a")
        client.get("/v1/requests/msg_b")
        paths = [
            key for key in scrape(client) if key.startswith("tokenzero_http_responses_total") and "requests/" in key
        ]
        assert all('path="/v1/requests/{id}"' in key for key in paths)

    def test_the_conversation_goes_on_without_a_divergence(self, client: httpx.Client) -> None:
        first = post(client, ask("Say something", max_tokens=12))
        said = [
            {"role": "user", "content": "Say something"},
            {"role": "assistant", "content": first["content"]},
            {"role": "user", "content": "And now?"},
        ]
        report = about(client, post(client, ask("", max_tokens=1) | {"messages": said}))
        assert "cause" not in report
        assert report["reused_tokens"] >= first["usage"]["cache_creation_input_tokens"]

    def test_a_guess_under_another_salt_learns_nothing_of_a_prompt(self, client: httpx.Client) -> None:
        secret = "The vault's instructions are longer than a page. " * 6 + "Its PIN is "
        post(client, ask(secret + "4711", 1), **{"x-tokenzero-cache-salt": "told"})
        learnt = set()
        for guess in ("0000", "4000", "4700", "4710", "4711"):
            answer = post(client, ask(secret + guess, 1), **{"x-tokenzero-cache-salt": f"told {guess}"})
            report = about(client, answer)
            said = [report.get(name) for name in ("cause", "lost_tokens", "nearest", "position", "reused_tokens")]
            learnt.add((answer["usage"]["cache_read_input_tokens"], *said))
        assert learnt == {(0, "new_content", None, None, 0, 0)}

    def test_a_field_that_drifts_is_reported_by_its_fifth_request(self, client: httpx.Client) -> None:
        agent = {"user-agent": "drifting/1.0"}
        for number in range(5):
            system = f"You are an agent.\nTrace id: {number * 7919:08x}\nBe brief."
            post(client, ask(f"Turn {number}", max_tokens=1, system=system), **agent)
        (found,) = [v for v in client.get("/v1/requests").json()["volatile"] if v["client"] == agent["user-agent"]]
        assert found == found | {"section": "system", "line": 1, "requests": 5, "after": "Trace id: 00007bbc"}


class TestDiagnostics:
    def test_a_request_that_does_not_ask_is_not_told(self, client: httpx.Client) -> None:
        assert "diagnostics" not in post(client, ask("Hi"))
        assert "diagnostics" not in stream(client, ask("Hi")).one("message_start")["message"]

    @pytest.mark.parametrize("id", [None, "msg_unknown"])
    def test_the_first_request_and_an_unknown_message(self, id: str | None, client: httpx.Client) -> None:
        asked = ask("Hi", diagnostics={"previous_message_id": id})
        expected = id and {"cache_miss_reason": {"type": "previous_message_not_found"}}
        assert post(client, asked)["diagnostics"] == expected
        assert stream(client, asked).one("message_start")["message"]["diagnostics"] == expected

    def test_the_sdk_reads_what_changed(self, server: Server, client: httpx.Client) -> None:
        sdk = anthropic.Anthropic(base_url=server.url, api_key="any")

        def create(system: str, tools: list[Json], id: str | None) -> Any:
            body = ask("Diagnose " * 40, max_tokens=1, system=system, tools=tools)
            del body["temperature"]  # the SDK knows it no more
            body |= {"diagnostics": {"previous_message_id": id}}
            return sdk.beta.messages.create(**body)

        first = create("You are.", [TOOL], None)
        assert first.diagnostics is None
        again = create("You are.", [TOOL], first.id)
        assert again.diagnostics is None
        other = create("You were.", [TOOL], again.id)
        assert other.diagnostics.cache_miss_reason.type == "system_changed"
        assert other.diagnostics.cache_miss_reason.cache_missed_input_tokens > 300
        unlike = create("I am.", [TOOL], first.id)  # from its first word on
        assert unlike.diagnostics.cache_miss_reason.type == "system_changed"
        tools = create("You were.", [TOOL, TOOL | {"name": "Edit"}], other.id)
        assert tools.diagnostics.cache_miss_reason.type == "tools_changed"


class TestTraceText:
    def test_text_is_hidden_and_all_else_told(self, discreet: tuple[httpx.Client, Path]) -> None:
        client, log = discreet
        for number in range(0x33330, 0x33336):
            post(client, with_header(number, "Secretly?"), **KEEP)
        shown = client.get("/v1/requests").text
        report = client.get("/v1/requests").json()["data"][0]
        assert report["cause"] == "preamble"
        assert client.get("/v1/requests").json()["volatile"]
        for text in (shown, log.read_text()):
            assert "33335" not in text
            assert "Secretly" not in text

    def test_milliseconds_come_from_the_cost_model(self, discreet: tuple[httpx.Client, Path]) -> None:
        client, _ = discreet
        for number in range(2):
            answer = post(client, with_header(number, "Lost?"), **KEEP)
        assert 0 < about(client, answer)["lost_ms"] < 60_000

    def test_only_a_client_with_the_key_gets_an_answer(self, discreet: tuple[httpx.Client, Path]) -> None:
        client, _ = discreet
        for path in ("/v1/requests", "/v1/requests/msg_x"):
            error_of(client.get(path, headers={"x-api-key": "wrong"}), 401, "authentication_error")


class TestRulesOfARequest:
    def test_a_request_may_have_its_tools_first(self, client: httpx.Client) -> None:
        headers = {"x-tokenzero-normalize": "tools-first"}
        body = with_header(1, "Tools first?", tools=[TOOL])
        response = client.post("/v1/messages", json=body, headers=headers)
        assert response.headers["x-tokenzero-normalized"] == "tools-first tools"
        sections = [s["section"] for s in about(client, response.json())["sections"]]
        assert sections == ["template", "tools[0] Read", "system[0]", "system[1]", "messages[0] user"]
        usage = post(client, body, **headers)["usage"]
        assert (usage["cache_creation_input_tokens"], usage["input_tokens"]) == (0, 1)

    def test_an_unknown_rule_is_refused(self, client: httpx.Client) -> None:
        response = client.post("/v1/messages", json=ask("Hi"), headers={"x-tokenzero-normalize": "strip-all"})
        assert "got strip-all" in error_of(response, 400, "invalid_request_error")
