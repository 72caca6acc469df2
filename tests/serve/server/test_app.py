"""A real server process over HTTP: routes, events, usage, stopping, cancelling, refusing."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from experiments.harness.client import scrape
from experiments.harness.server import Server, running_server
from experiments.workloads import sessions
from experiments.workloads.sessions import RELEASES, Session
from tests.helpers.http import (
    BILLING,
    BODY_LIMIT,
    CONTEXT,
    FLAGS,
    Json,
    ask,
    ask_for_long,
    error_of,
    eventually,
    is_idle,
    long,
    open_request,
    post,
    prompt_tokens,
    read_until,
    stream,
    text_block,
    text_of,
)

KEY = "a key, not a secret"
PNG = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
PDF = {"type": "base64", "media_type": "application/pdf", "data": "AAAA"}
IDENTITY = "You are a careful agent that answers in one line. " * 6


def with_header(number: int, **more: Any) -> Json:
    """A request whose system text starts with a billing header of its own."""
    return ask("What now?", system=[{"type": "text", "text": BILLING.format(number)}, text_block(IDENTITY)], **more)


def counted(client: httpx.Client, body: Json, **headers: str) -> int:
    response = client.post("/v1/messages/count_tokens", json=body, headers=headers)
    assert response.status_code == 200, response.text
    assert set(response.json()) <= {"input_tokens", "cache"}
    return response.json()["input_tokens"]


@pytest.fixture(scope="module")
def strict_client(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """A client without a key of a second server, which takes one and strips nothing."""
    log = tmp_path_factory.mktemp("strict") / "server.log"
    flags = (*FLAGS, "--no-strip-anthropic-preamble", "--api-key", KEY, "--model-name", "a/name", "--on-image", "error")
    with running_server(model_folder, *flags, log=log) as running, httpx.Client(base_url=running.url) as client:
        yield client


class TestAnswers:
    def test_a_message_has_the_fields_of_the_api(self, client: httpx.Client) -> None:
        response = client.post("/v1/messages", json=ask("Hello", model="claude-made-up-4"))
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/json"
        assert response.headers["request-id"].startswith("req_")
        answer = response.json()
        usage, count = answer["usage"], counted(client, ask("Hello"))
        assert usage | {"output_tokens": 8} == usage
        assert prompt_tokens(usage) == count
        assert answer == {
            "id": answer["id"],
            "type": "message",
            "role": "assistant",
            "model": "claude-made-up-4",
            "content": [text_block(text_of(answer))],
            "stop_reason": "max_tokens",
            "stop_sequence": None,
            "usage": usage,
        }
        assert answer["id"].startswith("msg_")
        assert text_of(answer)

    def test_a_stream_has_the_events_of_the_api_in_their_order(self, client: httpx.Client) -> None:
        whole = post(client, ask("Stream this", model="haiku"))
        streamed = stream(client, ask("Stream this", model="haiku"))
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert streamed.headers["cache-control"] == "no-cache"
        assert streamed.headers["request-id"].startswith("req_")
        deltas = streamed.kinds[2:-3]
        assert streamed.kinds[:2] == ["message_start", "content_block_start"]
        assert deltas == ["content_block_delta"] * len(deltas)
        assert len(deltas) > 1, "the answer comes piece by piece"
        assert streamed.kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]

        start = streamed.one("message_start")["message"]
        assert start["content"] == []
        assert (start["model"], start["stop_reason"], start["stop_sequence"]) == ("haiku", None, None)
        assert prompt_tokens(start["usage"]) == prompt_tokens(whole["usage"])
        assert streamed.one("content_block_start") == {
            "type": "content_block_start",
            "index": 0,
            "content_block": text_block(""),
        }
        assert streamed.one("content_block_stop") == {"type": "content_block_stop", "index": 0}
        assert {e["index"] for e in streamed.events if e["type"] == "content_block_delta"} == {0}
        end = streamed.one("message_delta")
        assert end["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
        assert end["usage"] == start["usage"] | {"output_tokens": 8}
        assert streamed.text == text_of(whole)

    def test_the_beta_query_and_unknown_fields_are_ignored(self, client: httpx.Client) -> None:
        plain = post(client, ask("Hi"))
        extra = ask("Hi", betas=["x"], metadata={"user_id": "u"}, mcp_servers=[], container=None, speed="fast")
        response = client.post("/v1/messages?beta=true", json=extra)
        assert response.status_code == 200
        assert text_of(response.json()) == text_of(plain)
        assert prompt_tokens(response.json()["usage"]) == prompt_tokens(plain["usage"])

    def test_a_string_system_and_a_block_system_are_the_same_prompt(self, client: httpx.Client) -> None:
        first = post(client, ask("Hi", system=IDENTITY))
        marked = text_block(IDENTITY) | {"cache_control": {"type": "ephemeral"}}
        second = post(client, ask("Hi", system=[marked]))
        assert second["usage"]["cache_read_input_tokens"] == prompt_tokens(first["usage"]) - 1
        assert text_of(first) == text_of(second)

    def test_temperature_zero_repeats_itself_and_a_high_one_does_not(self, client: httpx.Client) -> None:
        assert text_of(post(client, ask("Again", 20))) == text_of(post(client, ask("Again", 20)))
        warm = [text_of(post(client, ask("Again", 20, temperature=2))) for _ in range(3)]
        assert len(set(warm)) > 1
        # With one candidate the choice is always the same, at any temperature.
        assert text_of(post(client, ask("Again", 20, temperature=2, top_k=1))) == text_of(
            post(client, ask("Again", 20))
        )

    @pytest.mark.parametrize("release", RELEASES)
    def test_bodies_of_each_client_release_are_served(self, release: str, client: httpx.Client) -> None:
        session = Session(release=release, scale=0.02, model="claude-whatever")
        bodies = sessions.requests(session)
        before = 0
        for number in range(3):
            body = next(bodies) | {"max_tokens": 4, "temperature": 0}
            answer = stream(client, body, **sessions.http_headers(session))
            start = answer.one("message_start")["message"]
            assert start["model"] == "claude-whatever"
            # Whatever header it bears, a turn reads all that the turn before has computed, up to its generation prompt.
            read, total = start["usage"]["cache_read_input_tokens"], prompt_tokens(start["usage"])
            assert read >= before - 20, f"turn {number}"
            assert total > before
            before = total

    def test_thinking_is_rendered_only_where_it_is_asked_for(self, client: httpx.Client) -> None:
        off = counted(client, ask("Hi", thinking={"type": "disabled"}))
        on = counted(client, ask("Hi", thinking={"type": "adaptive"}))
        assert counted(client, ask("Hi")) == off
        # The demo template opens the answer with an empty block of thought where there shall be none.
        assert on < off


class TestOtherRoutes:
    def test_count_tokens_is_what_the_request_then_uses(self, client: httpx.Client) -> None:
        body = sessions.request(Session(scale=0.02), turn=2) | {"max_tokens": 1, "stream": False}
        assert counted(client, body) == prompt_tokens(post(client, body)["usage"])

    def test_count_tokens_needs_no_max_tokens(self, client: httpx.Client) -> None:
        body = ask("Hi")
        del body["max_tokens"]
        assert counted(client, body) == counted(client, ask("Hi"))

    def test_count_tokens_leaves_the_header_out_unless_stripping_is_off(self, client: httpx.Client) -> None:
        plain = ask("What now?", system=[text_block(IDENTITY)])
        assert counted(client, with_header(1)) == counted(client, plain)
        kept = counted(client, with_header(1), **{"x-tokenzero-normalize": "none"})
        assert kept > counted(client, plain) + 10

    def test_models_names_the_one_model(self, client: httpx.Client) -> None:
        listed = client.get("/v1/models", headers={"anthropic-version": "2023-06-01"}).json()
        assert [m["id"] for m in listed["data"]] == ["tiny-model"] == [listed["first_id"]] == [listed["last_id"]]
        assert listed["has_more"] is False
        assert listed["data"][0] | {"type": "model", "max_input_tokens": CONTEXT} == listed["data"][0]
        assert client.get("/v1/models/", headers={"anthropic-version": "2023-06-01"}).json() == listed

    def test_health_is_ok_and_names_dtype_and_device(self, client: httpx.Client) -> None:
        response = client.get("/health")
        assert response.status_code == 200
        assert response.json() == {"status": "ok", "dtype": "float32", "device": "cpu", "tp": 1}

    def test_ready_counts_the_compiled_shapes(self, client: httpx.Client) -> None:
        response = client.get("/ready")
        assert response.status_code == 200
        assert response.json()["status"] == "ready"
        assert 0 < response.json()["compiled"] <= response.json()["shapes"]

    @pytest.mark.parametrize("path", ["/", "/api/hello"])
    def test_probes_are_answered(self, path: str, client: httpx.Client) -> None:
        response = client.head(path)
        assert (response.status_code, response.content) == (200, b"")
        assert client.get(path).json() == {"name": "tokenzero"}

    @pytest.mark.parametrize("path", ["/v1/complete", "/v1/messages/batches", "/v1", "/nowhere"])
    def test_an_unknown_route_is_a_not_found_error_that_names_it(self, path: str, client: httpx.Client) -> None:
        assert path in error_of(client.post(path, json=ask("Hi")), 404, "not_found_error")

    @pytest.mark.parametrize(("method", "path"), [("GET", "/v1/messages"), ("PUT", "/metrics"), ("POST", "/health")])
    def test_a_wrong_method_is_refused_in_the_apis_form(self, method: str, path: str, client: httpx.Client) -> None:
        response = client.request(method, path)
        assert f"{method} {path}" in error_of(response, 405, "invalid_request_error")
        assert response.headers["allow"]

    def test_request_ids_differ(self, client: httpx.Client) -> None:
        assert len({client.get("/health").headers["request-id"] for _ in range(5)}) == 5


class TestMetrics:
    def test_counters_move_by_what_was_served(self, client: httpx.Client) -> None:
        body = ask("Count me, and the tokens of me", 5)
        post(client, body)
        before = scrape(client)
        answer = post(client, body)
        stream(client, body)
        client.post("/v1/messages", content=b"{")
        after = scrape(client)

        def moved(name: str) -> float:
            return after[name] - before.get(name, 0)

        prompt = prompt_tokens(answer["usage"])
        assert moved("tokenzero_requests_total") == 2
        assert moved("tokenzero_prompt_tokens_total") == 2 * prompt
        assert moved("tokenzero_reused_tokens_total") == 2 * (prompt - 1)
        assert moved("tokenzero_generated_tokens_total") == 10
        assert moved("tokenzero_steps_total") >= 10
        assert moved("tokenzero_ttft_seconds_count") == 2
        assert 0 < moved("tokenzero_ttft_seconds_sum") < 60
        assert moved('tokenzero_http_responses_total{path="/v1/messages",status="200"}') == 2
        assert moved('tokenzero_http_responses_total{path="/v1/messages",status="400"}') == 1
        states = ("free", "cached", "retained", "in_use", "auditor")
        pages = [after[f'tokenzero_pages{{state="{state}"}}'] for state in states]
        assert sum(pages) == 2048, "the pool of 16 MiB"
        assert pages[1] > 0

    def test_rules_that_applied_are_counted_and_told(self, client: httpx.Client) -> None:
        before = scrape(client)
        response = client.post("/v1/messages", json=with_header(7))
        assert response.headers["x-tokenzero-normalized"] == "strip-preamble system[0]"
        assert "x-tokenzero-normalized" not in client.post("/v1/messages", json=ask("Hi")).headers
        name = 'tokenzero_rule_applications_total{rule="strip-preamble"}'
        assert scrape(client)[name] == before.get(name, 0) + 1

    def test_the_list_of_applied_rules_fits_a_header(self, client: httpx.Client) -> None:
        messages = [USER, *({"role": "system", "content": BILLING.format(n) + "\nx"} for n in range(500))]
        response = client.post("/v1/messages", json=ask("", 1, messages=messages))
        assert response.status_code == 200
        assert 0 < len(response.headers["x-tokenzero-normalized"]) < 4096

    def test_a_header_that_does_not_parse_is_counted_each_time_and_logged_once(
        self, client: httpx.Client, server_log: Path
    ) -> None:
        odd = "x-anthropic-billing-header: in a form of the future"
        before = scrape(client)["tokenzero_unparsed_preambles_total"]
        for _ in range(3):
            post(client, ask("Hi", system=f"{odd}\n{IDENTITY}"))
        assert scrape(client)["tokenzero_unparsed_preambles_total"] == before + 3
        assert server_log.read_text().count(odd) == 1

    def test_paths_that_clients_make_up_do_not_grow_the_metrics(self, client: httpx.Client) -> None:
        client.get("/made-up-one")
        client.get("/v1/models/one")
        client.get("/v1/models/one%0A")
        scrape(client)  # is counted itself
        before = scrape(client)
        client.get("/made-up-two")
        client.get("/v1/models/two")
        client.get("/v1/models/two%0A")
        after = scrape(client)
        assert set(after) == set(before)
        name = 'tokenzero_http_responses_total{path="other",status="404"}'
        assert after[name] == before[name] + 1


class TestUsage:
    def test_a_repeated_request_reads_all_but_the_last_token(self, client: httpx.Client) -> None:
        body = ask("A question that nobody asked before, in two halves.")
        first, second = post(client, body)["usage"], post(client, body)["usage"]
        assert prompt_tokens(first) == prompt_tokens(second) == counted(client, body)
        assert second["cache_read_input_tokens"] == prompt_tokens(second) - 1
        assert (second["cache_creation_input_tokens"], second["input_tokens"], first["input_tokens"]) == (0, 1, 1)

    def test_a_longer_request_reads_what_it_shares(self, client: httpx.Client) -> None:
        first = post(client, ask("Shared words, " * 20 + "then one end."))["usage"]
        second = post(client, ask("Shared words, " * 20 + "and quite another tail of it."))["usage"]
        shared = second["cache_read_input_tokens"]
        assert 60 < shared < min(prompt_tokens(first), prompt_tokens(second))

    def test_the_answer_is_reused_when_it_comes_back(self, client: httpx.Client) -> None:
        opening = [{"role": "user", "content": "Begin a story that was never begun."}]
        first = post(client, ask("", 24, messages=opening, thinking={"type": "adaptive"}))
        again = [*opening, {"role": "assistant", "content": text_of(first)}, {"role": "user", "content": "Go on."}]
        second = post(client, ask("", 4, messages=again, thinking={"type": "adaptive"}))
        assert second["usage"]["cache_read_input_tokens"] >= prompt_tokens(first["usage"])

    def test_a_header_that_varies_costs_nothing_when_it_is_stripped(self, client: httpx.Client) -> None:
        first = post(client, with_header(0xA1))
        for number in (0xB2, 0xC3):
            again = post(client, with_header(number))
            assert again["usage"]["cache_read_input_tokens"] == prompt_tokens(first["usage"]) - 1
            assert text_of(again) == text_of(first)

    def test_a_string_system_is_stripped_too(self, client: httpx.Client) -> None:
        first = post(client, ask("And now?", system=f"{BILLING.format(1)}\n{IDENTITY}"))["usage"]
        second = post(client, ask("And now?", system=f"{BILLING.format(2)}\n{IDENTITY}"))["usage"]
        assert second["cache_read_input_tokens"] == prompt_tokens(first) - 1

    def test_a_header_that_varies_costs_the_prompt_when_a_request_turns_the_rule_off(
        self, client: httpx.Client
    ) -> None:
        off = {"x-tokenzero-normalize": "none"}
        first = post(client, with_header(0x11111), **off)["usage"]
        second = post(client, with_header(0x99999), **off)["usage"]
        header = counted(client, ask("What now?", system=BILLING.format(0)), **off)
        assert second["cache_read_input_tokens"] < header < prompt_tokens(first) / 2

    def test_a_header_that_varies_costs_the_prompt_when_the_server_does_not_strip(
        self, strict_client: httpx.Client
    ) -> None:
        key = {"x-api-key": KEY}
        first = post(strict_client, with_header(0x11111), **key)["usage"]
        second = post(strict_client, with_header(0x99999), **key)["usage"]
        assert second["cache_read_input_tokens"] < prompt_tokens(first) / 2
        on = key | {"x-tokenzero-normalize": "strip-preamble"}
        third = post(strict_client, with_header(0x22222), **on)["usage"]
        fourth = post(strict_client, with_header(0x88888), **on)["usage"]
        assert fourth["cache_read_input_tokens"] == prompt_tokens(third) - 1
        plain = ask("What now?", system=[text_block(IDENTITY)])
        assert counted(strict_client, with_header(1), **key) > counted(strict_client, plain, **key) + 10

    def test_an_unknown_rule_is_refused_by_name(self, client: httpx.Client) -> None:
        response = client.post(
            "/v1/messages", json=ask("Hi"), headers={"x-tokenzero-normalize": "strip-preamble, shout"}
        )
        text = error_of(response, 400, "invalid_request_error")
        assert "shout" in text
        assert "expected some of strip-preamble" in text


class TestStopping:
    """The greedy answer to one prompt, cut in all the ways there are."""

    LONG = "Tell me something long"

    @pytest.fixture
    def answer(self, client: httpx.Client) -> str:
        text = text_of(post(client, ask(self.LONG, 40)))
        assert len(text) > 60
        return text

    def test_max_tokens_counts_the_tokens_of_the_answer(self, client: httpx.Client) -> None:
        for tokens in (1, 2, 17):
            answer = post(client, ask(self.LONG, tokens))
            assert (answer["stop_reason"], answer["usage"]["output_tokens"]) == ("max_tokens", tokens)

    def test_a_stop_sequence_ends_the_answer_before_it(self, client: httpx.Client, answer: str) -> None:
        # Every place and width: within tokens, over their boundaries, and at either end of them.
        rng = random.Random(0)
        for width in (1, 2, 3, 5, 9, 14):
            start = rng.randrange(8, len(answer) - width)
            stop = answer[start : start + width]
            body = ask(self.LONG, 60, stop_sequences=["never in it", stop])
            whole, streamed = post(client, body), stream(client, body)
            assert text_of(whole) == answer[: answer.index(stop)] == streamed.text, repr(stop)
            assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", stop)
            assert streamed.one("message_delta")["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": stop}
            assert streamed.one("message_delta")["usage"]["output_tokens"] == whole["usage"]["output_tokens"] < 60

    def test_what_only_begins_like_a_stop_sequence_is_part_of_the_answer(
        self, client: httpx.Client, answer: str
    ) -> None:
        nearly = [answer[at : at + 6] + "\x00" for at in range(0, 30, 3)] + [answer[-4:] + "\x00"]
        body = ask(self.LONG, 40, stop_sequences=nearly)
        whole = post(client, body)
        assert (text_of(whole), whole["stop_reason"], whole["stop_sequence"]) == (answer, "max_tokens", None)
        assert stream(client, body).text == answer

    def test_a_stop_sequence_at_once_leaves_no_text(self, client: httpx.Client, answer: str) -> None:
        body = ask(self.LONG, stop_sequences=[answer[0]])
        assert post(client, body)["content"] == []
        assert stream(client, body).kinds == ["message_start", "message_delta", "message_stop"]

    def test_the_end_of_turn_ends_the_answer_and_stays_out_of_it(self, client: httpx.Client) -> None:
        for number in range(40):
            body = ask(f"question {number}", 300)
            answer = post(client, body)
            if answer["stop_reason"] == "end_turn":
                break
        assert answer["stop_reason"] == "end_turn"
        assert "<|im_end|>" not in text_of(answer)
        assert answer["usage"]["output_tokens"] < 300
        streamed = stream(client, body)
        assert streamed.text == text_of(answer)
        assert streamed.one("message_delta")["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}

    def test_max_tokens_beyond_the_room_is_clamped_to_it(self, client: httpx.Client) -> None:
        body = ask(long(10, CONTEXT - 20 - counted(client, ask(""))), 32_000)
        assert counted(client, body) == CONTEXT - 20
        answer = post(client, body)
        stopped = (answer["stop_reason"], answer["usage"]["output_tokens"])
        assert stopped == ("model_context_window_exceeded", 20)

    def test_the_last_turn_of_an_assistant_is_continued(self, client: httpx.Client, answer: str) -> None:
        begun = answer[:12]
        messages = [ask(self.LONG)["messages"][0], {"role": "assistant", "content": begun}]
        continued = post(client, ask("", 4, messages=messages))
        assert text_of(continued)
        assert prompt_tokens(continued["usage"]) == counted(client, ask("", messages=messages))


class TestManyAtOnce:
    def test_each_of_many_gets_the_answer_that_it_gets_alone(self, client: httpx.Client) -> None:
        rng = random.Random(5)
        bodies = [
            ask(f"{number} of many. " + "Some words of it. " * rng.choice((0, 3, 30, 120)), rng.choice((3, 12, 30)))
            for number in range(24)
        ]
        alone = [text_of(post(client, body)) for body in bodies]
        # Long prompts push all of it out of the cache, so that it is computed again when all come together.
        before = scrape(client)
        for number in (20, 30, 40):
            post(client, ask(long(number), 1))
        assert scrape(client)["tokenzero_pages_evicted_total"] > before["tokenzero_pages_evicted_total"]

        def answer(number: int) -> str:
            body = bodies[number]
            return stream(client, body).text if number % 2 else text_of(post(client, body))

        with ThreadPoolExecutor(12) as pool:
            together = list(pool.map(answer, range(len(bodies))))
        assert together == alone
        assert len(set(alone)) > 12, "the answers differ, so that a mix-up would show"

    def test_equal_requests_at_once_get_equal_answers(self, client: httpx.Client) -> None:
        body = ask("All at once now! " * 30, 12)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: post(client, body), range(8)))
        assert len({text_of(answer) for answer in answers}) == 1
        usages = [answer["usage"] for answer in answers]
        assert len({prompt_tokens(usage) for usage in usages}) == 1
        # They wait for one another's prefill rather than repeat it.
        computed = sum(usage["cache_creation_input_tokens"] + usage["input_tokens"] for usage in usages)
        assert computed < 2 * prompt_tokens(usages[0])


class TestCancelling:
    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_client_that_leaves_during_prefill_stops_it(
        self, streaming: bool, client: httpx.Client, server: Server
    ) -> None:
        body = ask(long(50 + streaming), 50, stream=streaming)
        tokens, before = counted(client, body), scrape(client)
        connection = open_request(server.url, body)
        eventually(lambda: scrape(client)["tokenzero_num_requests_running"] == 1, "the request runs")
        connection.close()
        eventually(lambda: is_idle(client), "the request is given up")
        after = scrape(client)
        prefilled = after["tokenzero_prefilled_tokens_total"] - before["tokenzero_prefilled_tokens_total"]
        assert prefilled < tokens * 0.9, "the prefill was not finished"
        assert after["tokenzero_generated_tokens_total"] == before["tokenzero_generated_tokens_total"]
        assert text_of(post(client, ask("Next")))

    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_client_that_leaves_during_decode_stops_it(
        self, streaming: bool, client: httpx.Client, server: Server
    ) -> None:
        body = self.endless(client) | {"max_tokens": 32_000, "stream": streaming}
        before = scrape(client)
        connection = open_request(server.url, body)
        if streaming:
            read_until(connection, b"event: content_block_delta", times=3)
        else:
            name = "tokenzero_generated_tokens_total"
            eventually(lambda: scrape(client)[name] >= before[name] + 3, "it decodes")
        assert not is_idle(client)
        connection.close()
        eventually(lambda: is_idle(client), "the request is given up")
        generated = scrape(client)["tokenzero_generated_tokens_total"] - before["tokenzero_generated_tokens_total"]
        assert 3 <= generated < 5000
        assert text_of(post(client, ask("Next")))

    @staticmethod
    def endless(client: httpx.Client) -> Json:
        """A request whose greedy answer does not end within 1000 tokens."""
        for number in range(4, 30):
            body = ask(f"Talk without end, {number}", 1000)
            if post(client, body)["stop_reason"] == "max_tokens":
                return body
        raise AssertionError("every answer ends")

    def test_a_client_that_leaves_the_queue_never_runs(self, client: httpx.Client, server: Server) -> None:
        answered = scrape(client)["tokenzero_requests_total"]
        running = [open_request(server.url, ask_for_long(f"Go on for long, {number}")) for number in range(4)]
        eventually(lambda: scrape(client)["tokenzero_requests_total"] == answered + 4, "the batch is full, and decodes")
        queued = [open_request(server.url, ask("I shall not wait", 5)) for _ in range(3)]
        eventually(lambda: scrape(client)["tokenzero_num_requests_waiting"] == 3, "three wait")
        assert scrape(client)["tokenzero_num_requests_running"] == 4
        before = scrape(client)["tokenzero_requests_total"]
        for connection in queued:
            connection.close()
        eventually(lambda: scrape(client)["tokenzero_num_requests_waiting"] == 0, "the queue is empty")
        for connection in running:
            connection.close()
        eventually(lambda: is_idle(client), "all are given up")
        assert scrape(client)["tokenzero_requests_total"] == before

    def test_a_client_that_leaves_in_the_middle_of_its_body_harms_no_other(
        self, client: httpx.Client, server: Server
    ) -> None:
        before = scrape(client)
        connection = open_request(server.url, ask("Hi"))
        read_until(connection, b"max_tokens")
        connection.sendall(b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n{")
        connection.close()
        assert text_of(post(client, ask("Next")))
        assert scrape(client)["tokenzero_requests_total"] == before["tokenzero_requests_total"] + 2


class TestKeys:
    @pytest.mark.parametrize(
        "headers",
        [
            {"x-api-key": KEY},
            {"authorization": f"Bearer {KEY}"},
            {"authorization": f"bearer {KEY}"},
            {"x-api-key": "another", "authorization": f"Bearer {KEY}"},
        ],
    )
    def test_the_key_opens_all_routes(self, headers: dict[str, str], strict_client: httpx.Client) -> None:
        assert counted(strict_client, ask("Hi"), **headers) > 0
        listed = strict_client.get("/v1/models", headers=headers).json()
        assert listed["data"][0]["id"] == "a/name"
        assert strict_client.get("/metrics", headers=headers).status_code == 200

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"x-api-key": ""},
            {"x-api-key": KEY[:-1]},
            {"x-api-key": KEY + "x"},
            {"authorization": KEY},
            {"authorization": f"Basic {KEY}"},
            {"authorization": "Bearer"},
            {"authorization": "Bearer wrong"},
        ],
    )
    @pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", "/nowhere"])
    def test_without_it_every_route_is_closed(
        self, headers: dict[str, str], path: str, strict_client: httpx.Client
    ) -> None:
        error_of(strict_client.post(path, json=ask("Hi"), headers=headers), 401, "authentication_error")

    def test_the_sdk_raises_its_authentication_error(self, strict_client: httpx.Client) -> None:
        with (
            anthropic.Anthropic(base_url=str(strict_client.base_url), api_key="wrong", max_retries=0) as sdk,
            pytest.raises(anthropic.AuthenticationError),
        ):
            sdk.messages.create(model="m", max_tokens=1, messages=[{"role": "user", "content": "Hi"}])

    @pytest.mark.parametrize(
        ("source", "words"), [(PNG, "Could not process image"), (PDF, "does not support PDF input")]
    )
    @pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
    def test_an_image_is_refused_where_the_server_was_asked_to(
        self, source: Json, words: str, path: str, strict_client: httpx.Client
    ) -> None:
        kind = "image" if source is PNG else "document"
        messages = [{"role": "user", "content": [text_block("Look"), {"type": kind, "source": source}]}]
        response = strict_client.post(path, json=ask("", messages=messages), headers={"x-api-key": KEY})
        assert error_of(response, 400, "invalid_request_error").startswith("messages[0].content[1]: ")
        assert words in response.text

    @pytest.mark.parametrize("path", ["/v1/models", "/metrics"])
    def test_what_tells_about_others_is_closed_too(self, path: str, strict_client: httpx.Client) -> None:
        error_of(strict_client.get(path, headers={"anthropic-version": "2023-06-01"}), 401, "authentication_error")

    @pytest.mark.parametrize("path", ["/", "/api/hello", "/health", "/ready"])
    def test_probes_need_no_key(self, path: str, strict_client: httpx.Client) -> None:
        assert strict_client.get(path).status_code == 200
        assert strict_client.head(path).status_code == 200


USER = {"role": "user", "content": "Hi"}
VALID = {"model": "m", "max_tokens": 2, "messages": [USER]}
MISSING = object()


def tool_use(arguments: Json) -> Json:
    return {"type": "tool_use", "id": "toolu_1", "name": "f", "input": arguments}


def changed(**fields: Any) -> Json:
    """A valid body with some fields changed, or left out where MISSING."""
    return {key: value for key, value in (VALID | fields).items() if value is not MISSING}


class TestBadInput:
    @pytest.mark.parametrize(
        ("fields", "named"),
        [
            ({"model": MISSING}, ["model", "required"]),
            ({"messages": MISSING}, ["messages", "required"]),
            ({"max_tokens": MISSING}, ["max_tokens", "required"]),
            ({"max_tokens": -1}, ["max_tokens", ">= 0", "-1"]),
            ({"max_tokens": -5}, ["max_tokens", ">= 0", "-5"]),
            ({"max_tokens": 1.5}, ["max_tokens", "int", "1.5"]),
            ({"max_tokens": "10"}, ["max_tokens", "int", "10"]),
            ({"max_tokens": 2**40}, ["max_tokens"]),
            ({"messages": []}, ["messages", "at least one"]),
            ({"messages": "Hi"}, ["messages", "array"]),
            ({"messages": [{"role": "robot", "content": "Hi"}]}, ["messages[0].role", "robot", "user"]),
            ({"messages": [{"role": "user"}]}, ["messages[0].content", "required"]),
            ({"messages": [{"role": "user", "content": 5}]}, ["messages[0].content", "5"]),
            ({"system": 7}, ["system", "7"]),
            ({"stream": "yes"}, ["stream", "bool"]),
            ({"temperature": 3}, ["temperature", "3"]),
            ({"top_p": -0.1}, ["top_p"]),
            ({"stop_sequences": [""]}, ["stop_sequences[0]"]),
            ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, ["tools[0]"]),
            ({"tools": [{"name": "f"}]}, ["tools[0].input_schema", "required"]),
            ({"thinking": {"type": "enabled"}}, ["thinking", "budget_tokens"]),
            ({"tool_choice": {"type": "tool", "name": "f"}}, ["tool_choice"]),
        ],
    )
    def test_a_broken_field_is_named_with_what_was_expected(
        self, fields: Json, named: list[str], client: httpx.Client
    ) -> None:
        text = error_of(client.post("/v1/messages", json=changed(**fields)), 400, "invalid_request_error")
        assert [part for part in named if part not in text] == [], text

    @pytest.mark.parametrize(
        "body",
        [
            *(b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe{}", b'{"model": "m"', b"{'model': 'm'}"),
            b'{"model": "\xff", "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]}',
            b'{"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "\\ud80"}]}',
            b'{"model": "m", "max_tokens": NaN, "messages": [{"role": "user", "content": "Hi"}]}',
            b"[" * 100_000,
        ],
        ids=lambda body: body[:20].decode("latin-1"),
    )
    @pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
    def test_a_body_that_is_no_request_is_refused(self, body: bytes, path: str, client: httpx.Client) -> None:
        assert error_of(client.post(path, content=body), 400, "invalid_request_error")

    @pytest.mark.parametrize("depth", [100, 400, 700, 950, 1100, 20_000])
    @pytest.mark.parametrize(
        "body",
        [
            changed(tools=[{"name": "f", "input_schema": {"x": "HERE"}}]),
            changed(messages=[{"role": "assistant", "content": [tool_use({"x": "HERE"})]}, USER]),
            changed(unknown="HERE"),
        ],
        ids=["schema", "tool input", "ignored field"],
    )
    def test_json_that_nests_deeply_is_served_or_refused(self, body: Json, depth: int, client: httpx.Client) -> None:
        raw = json.dumps(body).replace('"HERE"', '{"a":' * depth + "1" + "}" * depth)
        response = client.post("/v1/messages", content=raw)
        if response.status_code != 200:
            error_of(response, 400, "invalid_request_error")
            assert depth > 100

    def test_a_prompt_beyond_the_context_is_refused_with_both_lengths(self, client: httpx.Client) -> None:
        body = ask(long(90, CONTEXT))
        text = error_of(client.post("/v1/messages", json=body), 400, "invalid_request_error")
        assert text == f"prompt is too long: {counted(client, body)} tokens > {CONTEXT - 1} maximum", (
            "as clients read it"
        )
        assert error_of(client.post("/v1/messages", json=body | {"stream": True}), 400, "invalid_request_error") == text

    def test_the_longest_prompt_that_fits_gets_one_token(self, client: httpx.Client) -> None:
        most = CONTEXT - 1 - counted(client, ask(""))
        answer = post(client, ask(long(80, most), 50))
        assert prompt_tokens(answer["usage"]) == CONTEXT - 1
        assert (answer["usage"]["output_tokens"], answer["stop_reason"]) == (1, "model_context_window_exceeded")
        error_of(client.post("/v1/messages", json=ask(long(80, most + 1), 50)), 400, "invalid_request_error")

    def test_a_body_above_the_limit_is_refused_by_its_declared_length(self, client: httpx.Client) -> None:
        response = client.post("/v1/messages", json=ask("x" * BODY_LIMIT))
        assert str(BODY_LIMIT) in error_of(response, 413, "request_too_large")
        assert text_of(post(client, ask("Next")))

    def test_a_body_above_the_limit_is_refused_when_it_comes_in_chunks(self, server: Server) -> None:
        def chunks() -> Iterator[bytes]:
            yield b'{"model": "'
            for _ in range(BODY_LIMIT // 8192 + 1):
                yield b"x" * 8192

        with httpx.Client(base_url=server.url, timeout=30) as client:
            response = client.post("/v1/messages", content=chunks())
            assert str(BODY_LIMIT) in error_of(response, 413, "request_too_large")
            assert text_of(post(client, ask("Next")))

    def test_a_body_just_below_the_limit_is_read(self, client: httpx.Client) -> None:
        body = ask("Hi", padding="")
        body["padding"] = "x" * (BODY_LIMIT - len(json.dumps(body)))
        raw = json.dumps(body).encode()
        assert len(raw) == BODY_LIMIT
        assert client.post("/v1/messages", content=raw).status_code == 200
        error_of(client.post("/v1/messages", content=raw + b" "), 413, "request_too_large")
