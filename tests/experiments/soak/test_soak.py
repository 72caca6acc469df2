"""The soak: what its clients say and notice, what its checks refuse, and runs on real servers."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from cache.disk import DiskTier
from experiments.soak import checks
from experiments.soak.__main__ import main
from experiments.soak.clients import Kept, Seen, joined, refused
from experiments.soak.cold import Cold, Difference, by_body, shortfall
from experiments.soak.picture import draw, rates
from experiments.soak.stage import Broken, Life, Sample, Stage, Up, ends, figures, lose
from experiments.soak.talk import BAD, FORMATS, TOOLS, Topics, branched, demand, disobeys, edited, following, opening
from experiments.workloads.demo_model import TINY, write_demo_model
from serve.api.messages import decode_request
from serve.prompt.replay import RecordedAnswer

RESTING = {"running": 0, "waiting": 0, "pages_in_use": 0}
BUSY = {"answers": 9, "hits_device": 5, "evicted_device": 4, "hits_disk": 3, "evicted_disk": 2, "errors_disk": 0}
TOPICS = Topics.of(0, 0.3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("soak") / "model"
    write_demo_model(folder, config=replace(TINY, end_scale=1.25))
    return str(folder)


MAPPED = 100 << 20


def life_of(
    seconds: float = 300, mib: float = 800, growth: float = 0, files: float = 30, more: float = 0
) -> list[Sample]:
    """A life in which memory grows by a share, and descriptors and threads by a number, all at an even pace."""
    steps = np.linspace(0, 1, 101)
    return [
        Sample(
            at * seconds,
            0,
            int(mib * 2**20 * (1 + growth * at)) + MAPPED,
            MAPPED,
            round(files + more * at),
            round(files + more * at),
            BUSY,
        )
        for at in steps.tolist()
    ]


class TestChecks:
    def test_mapped_files_are_not_the_servers_memory(self) -> None:
        growing = [replace(s, rss=s.rss + i * 2**20, mapped=s.mapped + i * 2**20) for i, s in enumerate(life_of())]
        assert checks.memory(growing).passed is True
        assert checks.memory([replace(s, mapped=MAPPED) for s in growing]).passed is False

    def test_memory_may_grow_by_less_than_two_percent_between_the_fifths(self) -> None:
        assert checks.memory(life_of(growth=0.03)).passed is True, "1.8% between the middles of the two"
        failed = checks.memory(life_of(growth=0.04))
        assert failed.passed is False
        assert "+2.4%" in failed.detail

    def test_a_short_life_is_not_judged_and_of_several_the_longest_is(self) -> None:
        short = life_of(seconds=100, growth=0.5)
        assert checks.memory(short).passed is None
        assert checks.memory([]).passed is None
        longer = [replace(s, life=1, at_s=s.at_s + 100) for s in life_of()]
        assert checks.memory([*short, *longer]).passed is True

    @pytest.mark.parametrize("check", [checks.descriptors, checks.threads])
    def test_a_leak_of_descriptors_or_threads_is_found(self, check: Any) -> None:
        assert check(life_of(more=8)).passed is True
        assert check(life_of(more=20)).passed is False

    @pytest.mark.parametrize("held", RESTING)
    def test_a_page_or_request_that_is_left_is_found(self, held: str) -> None:
        sample = life_of()[-1]
        assert checks.quiet(replace(sample, figures=RESTING)).passed
        left = checks.quiet(replace(sample, figures=RESTING | {held: 1}))
        assert not left.passed
        assert f"{held} 1" in left.detail
        assert not checks.quiet(None).passed

    @pytest.mark.parametrize(
        "name",
        ["server_errors", "failed_requests", "errors_disk", "corrupt_disk", "dropped_host", "audit_mismatches_total"],
    )
    def test_an_error_that_any_life_counts_is_found(self, name: str) -> None:
        first, second = life_of()[-1], replace(life_of()[-1], life=1)
        assert checks.counters([first, second]).passed
        bad = checks.counters([replace(first, figures=BUSY | {name: 2}), second])
        assert not bad.passed
        assert f"{name} 2" in bad.detail

    def test_a_tier_that_was_never_reached_is_found(self) -> None:
        assert checks.tiers(life_of()).passed
        idle = [replace(s, figures=BUSY | {"hits_disk": 0}) for s in life_of()]
        assert checks.tiers(idle).passed is False
        assert checks.tiers(idle[:10]).passed is None, "too short to say"

    def test_an_audit_that_found_something_wrong_fails_and_so_does_one_that_never_ran(self) -> None:
        audited = {"audited_requests_total": 9, "audited_tokens_total": 500, "audit_mismatches_total": 0}

        def after(**figures: float) -> checks.Check:
            return checks.audits([replace(s, figures=BUSY | audited | figures) for s in life_of()])

        assert after().passed
        assert after(audit_mismatches_total=1).passed is False
        assert after(audited_requests_total=0).passed is False

    def test_a_server_that_ends_with_another_status_is_found(self) -> None:
        killed, ended = Life(0, 0, 1, "kill -9", -9, Path()), Life(1, 2, 3, "SIGTERM", -15, Path())
        assert checks.ended([killed, ended, replace(ended, status=0)]).passed
        for odd in (replace(ended, status=-9), replace(killed, status=-11), replace(ended, end="by itself", status=0)):
            assert not checks.ended([killed, odd]).passed
        assert not checks.ended([]).passed

    def test_lines_that_a_sound_server_never_logs_are_found(self) -> None:
        stamp = "2026-01-01 00:00:00,000"
        start = [
            "compiling steps      ━━━━━ 100% 0:00:01",
            ".cache/demo-model: float32 on cpu, 288 pages of 16 ",
            "tokens, context 2048",
        ]
        usual = [
            *start,
            f"{stamp} uvicorn.error Started server process [1]",
            f"{stamp} tokenzero.engine request 7 is preempted at 90 tokens: the pool is full",
            f"{stamp} tokenzero.requests POST /v1/messages status=200 request_id=req_1 id=msg_1 state=done read=3",
            "",
        ]
        odd = [
            f"{stamp} cache.lmdb_env /store: write fails, going on without: no room",
            f"{stamp} tokenzero.engine ERROR a step failed: 2 running requests end with an error",
            "Traceback (most recent call last):",
            f"{stamp} uvicorn.error ERROR Exception in ASGI application",
        ]
        assert checks.unexpected([*usual, *odd]) == odd
        assert checks.unexpected([*start, *odd[:3]]) == odd[:3], "a server that never started"
        assert checks.logs({"server-0": [], "server-1": []}).passed
        assert not checks.logs({"server-0": [], "server-1": odd}).passed

    def test_problems_of_clients_and_no_answers_at_all_are_found(self) -> None:
        assert checks.clients([], 5).passed
        assert not checks.clients(["turn 0: 500"], 5).passed
        assert not checks.clients([], 0).passed

    def test_a_first_turn_that_differs_without_a_tie_is_found(self) -> None:
        tied = Difference(kept("a"), "b", tied=True)
        passed = checks.first_turns(9, [tied], 0)
        assert passed.passed
        assert "1 flipped" in passed.detail
        assert not checks.first_turns(9, [tied, replace(tied, tied=False)], 0).passed
        assert not checks.first_turns(0, [], 0).passed
        assert not checks.first_turns(9, [], 16).passed, "a twin that reuses is none"

    def test_a_later_turn_that_its_logits_do_not_give_is_found(self) -> None:
        assert checks.later_turns(50, 5, 2, []).passed is True
        assert checks.later_turns(50, 5, 2, [Difference(kept("a"), "b")]).passed is False
        assert checks.later_turns(50, 6, 0, []).passed is False, "too few are known"
        assert checks.later_turns(0, 0, 0, []).passed is None


def kept(text: str, body: dict[str, Any] | None = None, prompt_tokens: int = 3, reason: str = "max_tokens") -> Kept:
    usage = {"input_tokens": 0, "cache_creation_input_tokens": prompt_tokens, "cache_read_input_tokens": 0}
    content = [{"type": "text", "text": text}]
    ended = {"stop_reason": reason, "stop_sequence": None, "usage": usage | {"output_tokens": 4}}
    return Kept({}, body or {}, 0, {"content": content, **ended})


class TestTalk:
    def test_equal_seeds_say_the_same(self) -> None:
        assert [opening(random.Random(n), TOPICS) for n in range(9)] == [
            opening(random.Random(n), TOPICS) for n in range(9)
        ]

    def test_conversations_are_bodies_that_the_api_takes_through_branches_and_edits(self) -> None:
        rng = random.Random(0)
        for _ in range(60):
            body = opening(rng, TOPICS)
            messages = body["messages"]
            for turn in range(4):
                asked = body | {"messages": messages}
                decode_request(json.dumps(asked | demand(rng, asked)).encode())
                call = {"type": "tool_use", "id": f"t{turn}", "name": "look", "input": {}}
                content = rng.choice(([], [{"type": "text", "text": "an answer"}], [call]))
                messages = [*messages, {"role": "assistant", "content": content}, *following(rng, TOPICS, content)]
                messages = rng.choice((messages, branched(rng, TOPICS, messages), edited(rng, messages)))
                assert messages[0]["role"] == "user"

    @pytest.mark.parametrize(
        ("demanded", "content", "reason", "problem"),
        [
            ({}, [], "end_turn", ""),
            ({"stop_sequences": ["self"]}, [{"type": "text", "text": "itself"}], "end_turn", "stop sequence 'self'"),
            ({"tool_choice": {"type": "any"}}, [], "max_tokens", ""),
            ({"tool_choice": {"type": "any"}}, [], "end_turn", "expected a tool call"),
            (
                {"tool_choice": {"type": "tool", "name": "move"}},
                [("look", {"path": "a", "whole": True})],
                "tool_use",
                "look",
            ),
            ({"tool_choice": {"type": "any"}}, [("look", {"path": "a", "whole": 1})], "tool_use", "whole"),
            ({"tool_choice": {"type": "any"}}, [("look", {"path": "a", "whole": False})], "tool_use", ""),
            ({}, [("unknown", {})], "tool_use", ""),
            ({"output_config": {}}, [{"type": "text", "text": '{"x": 1, "unit": "mm"}'}], "end_turn", ""),
            ({"output_config": {}}, [{"type": "text", "text": '{"x": 1, "unit": "m"}'}], "end_turn", "does not fit"),
            ({"output_config": {}}, [{"type": "text", "text": '{"x": 1, '}], "end_turn", "expected JSON"),
            ({"output_config": {}}, [{"type": "text", "text": '{"x": 1, '}], "max_tokens", ""),
        ],
    )
    def test_an_answer_that_disobeys_its_request_is_noticed(
        self, demanded: dict[str, Any], content: list[Any], reason: str, problem: str
    ) -> None:
        if "output_config" in demanded:
            demanded = {"output_config": {"format": {"type": "json_schema", "schema": FORMATS[0]}}}
        blocks = [b if isinstance(b, dict) else {"type": "tool_use", "name": b[0], "input": b[1]} for b in content]
        found = disobeys({"tools": TOOLS} | demanded, {"content": blocks, "stop_reason": reason})
        assert problem in found
        assert bool(problem) == bool(found)


def events(*kinds: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"type": "message_start", "message": {"content": [], "usage": {"input_tokens": 7, "output_tokens": 0}}}
    yield from kinds


def block(at: int, started: dict[str, Any], *deltas: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_start", "index": at, "content_block": started},
        *({"type": "content_block_delta", "index": at, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": at},
    ]


class TestClients:
    END = (
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 5}},
        {"type": "message_stop"},
    )

    def test_a_stream_makes_the_message_that_a_whole_answer_would_be(self) -> None:
        text = block(0, {"type": "text", "text": ""}, {"text": "one "}, {"text": "two"})
        call = block(
            1,
            {"type": "tool_use", "id": "t", "name": "f", "input": {}},
            {"partial_json": '{"a"'},
            {"partial_json": ": 1}"},
        )
        made = joined(events(*text, {"type": "ping"}, *call, *self.END))
        assert made == {
            "content": [
                {"type": "text", "text": "one two"},
                {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
            ],
            "stop_reason": "tool_use",
            "usage": {"input_tokens": 7, "output_tokens": 5},
        }

    @pytest.mark.parametrize("last", [{"type": "ping"}, {"type": "error", "error": {"message": "it broke"}}])
    def test_a_stream_that_breaks_off_is_broken(self, last: dict[str, Any]) -> None:
        with pytest.raises(Broken):
            joined(events(last))

    def test_random_ids_are_no_difference_and_all_else_is(self) -> None:
        call = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
        one = kept("")
        with_call = replace(one, message=one.message | {"content": [call]})
        assert with_call.said == replace(one, message=one.message | {"content": [call | {"id": "b"}]}).said
        assert kept("a").said != kept("b").said
        assert kept("a").said != kept("a", prompt_tokens=4).said
        assert kept("a").said != kept("a", reason="end_turn").said

    def test_an_answer_is_free_unless_something_was_demanded_of_it(self) -> None:
        assert kept("a").free
        assert not kept("a", reason="stop_sequence").free
        assert not kept("a", {"tool_choice": {"type": "any"}}).free
        assert not kept("a", {"output_config": {}}).free

    @pytest.mark.parametrize(("status", "problems"), [(400, 0), (200, 1), (413, 1)])
    def test_a_bad_request_that_is_not_refused_by_its_own_status_is_a_problem(
        self, monkeypatch: pytest.MonkeyPatch, status: int, problems: int
    ) -> None:
        for name in set(BAD) - {"null"}:
            monkeypatch.delitem(BAD, name)
        seen = Seen()
        answered = httpx.Response(status, json={"error": {"message": "no"}})
        asyncio.run(refused(stage_of(answered), seen, random.Random(0), {}, {}))
        assert len(seen.problems) == problems

    def test_a_server_error_is_broken_unless_the_server_was_being_ended(self) -> None:
        async def run() -> None:
            failing = stage_of(httpx.Response(500))
            with pytest.raises(Broken):
                await refused(failing, Seen(), random.Random(0), {}, {})
            # The next life answers, and the request is sent again to it.
            assert failing.up is not None
            failing.up.ending = True
            failing.ready.clear()
            waiting = asyncio.create_task(refused(failing, seen := Seen(), random.Random(1), {}, {}))
            await asyncio.sleep(0)
            assert not waiting.done()
            failing.up = stage_of(httpx.Response(400, json={"error": {"message": "no"}})).up
            failing.ready.set()
            await waiting
            assert seen.counts["refused"] == 1

        asyncio.run(run())


def stage_of(answered: httpx.Response) -> Stage:
    """A stage whose server answers everything alike."""
    transport = httpx.MockTransport(lambda request: answered)
    stage = Stage()
    client = httpx.AsyncClient(transport=transport, base_url="http://mocked")
    stage.up = Up(0, client, SimpleNamespace(), 0)  # type: ignore[arg-type]
    stage.ready.set()
    return stage


class TestStage:
    def test_a_request_whose_server_is_ended_meanwhile_is_sent_again(self) -> None:
        async def run() -> None:
            stage, asked = stage_of(httpx.Response(200)), list[int]()

            async def work(http: httpx.AsyncClient) -> str:
                asked.append(1)
                if len(asked) == 1:
                    assert stage.up is not None
                    stage.up.ending = True
                    raise httpx.ReadError("gone")
                return "answered"

            assert await stage.on(work) == "answered"
            assert stage.interrupted == 1

        asyncio.run(run())

    def test_the_server_is_ended_early_and_in_turns_and_lives_longest_at_last(self) -> None:
        for seconds in (20, 300, 1200):
            plan = ends(seconds, random.Random(0))
            times, kinds = [at for at, _ in plan], [kind for _, kind in plan]
            assert times == sorted(times)
            assert times[-1] == seconds
            assert times[-2] <= 0.4 * seconds
            assert kinds[-1] == "SIGTERM"
            assert kinds[:-1] == (["kill -9", "SIGTERM"] * len(kinds))[: len(kinds) - 1]
        assert len(plan) == 9

    def test_figures_are_taken_by_tier(self) -> None:
        made = figures(
            {
                'tokenzero_tier_pages{tier="host"}': 1,
                'tokenzero_tier_pages{tier="disk"}': 1,
                "tokenzero_reused_tokens_total": 100,
                'tokenzero_restored_tokens_total{tier="disk"}': 30,
                'tokenzero_tier_evicted_total{tier="disk"}': 8,
                'tokenzero_tier_errors_total{tier="host"}': 2,
                'tokenzero_http_responses_total{path="/health",status="200"}': 5,
                'tokenzero_http_responses_total{path="/v1/messages",status="503"}': 1,
                'tokenzero_pages{state="in_use"}': 4,
                'tokenzero_pages{state="free"}': 9,
                "tokenzero_audit_mismatches_total": 3,
            }
        )
        assert (made["hits_device"], made["hits_disk"], made["hits_host"]) == (70, 30, 0)
        assert (made["evicted_disk"], made["errors_host"]) == (8, 2)
        assert (made["answers"], made["server_errors"], made["pages_in_use"]) == (6, 1, 4)
        assert made["audit_mismatches_total"] == 3

    def test_a_store_loses_a_share_of_its_pages(self, tmp_path: Path) -> None:
        with closing(DiskTier(tmp_path, 1 << 24)) as tier:
            tier.put_many([(bytes([n]) * 32, b"page" * 100) for n in range(50)])
        assert lose(tmp_path, 1 << 24, 0.2, random.Random(0)) == 10
        with closing(DiskTier(tmp_path, 1 << 24)) as tier:
            assert len(tier.entries()) == 40

    def test_rates_are_within_a_life_and_a_picture_is_drawn_of_several(self, tmp_path: Path) -> None:
        counts = BUSY | RESTING
        one = [Sample(at, 0, 1 << 30, 1 << 29, 9, 9, counts | {"answers": 10 * at}) for at in range(5)]
        two = [replace(s, life=1, at_s=s.at_s + 10) for s in one]
        assert list(rates(one, "answers")) == [(at + 0.5, 10) for at in range(4)]
        lives = [Life(0, 0, 5, "kill -9", -9, Path()), Life(1, 10, 15, "SIGTERM", 0, Path())]
        draw([*one, *two], lives, tmp_path / "soak.png")
        assert (tmp_path / "soak.png").stat().st_size > 10_000


class TestCold:
    def test_tokens_are_judged_by_how_far_they_lie_below_the_best(self) -> None:
        logits = np.asarray([[0, 10, 5], [-20, 4, 2]], np.float32)
        assert shortfall(logits, [(1,), (2, 0)]).tolist() == pytest.approx([0, 0.1])
        assert shortfall(logits, [(0,), (1,)]).tolist() == pytest.approx([1, 0])

    def test_answers_to_one_body_are_grouped(self) -> None:
        one, other = kept("a", {"x": 1}), kept("b", {"x": 2})
        assert by_body([one, other, one]) == [[one, one], [other]]

    def test_the_greedy_answer_is_right_and_any_other_wrong(self, model: str, tmp_path: Path) -> None:
        history = [{"role": "assistant", "content": "I did."}, {"role": "user", "content": "And then?"}]
        messages = [{"role": "user", "content": "What did you do?"}, *history]
        body = {"model": "m", "max_tokens": 4, "temperature": 0, "messages": messages}
        with closing(Cold(model, tmp_path, 256)) as cold:
            request, scope, made = cold.prompt(kept("", body))
            ids = list[int]()
            for _ in range(4):
                (row,) = cold.logits(np.concatenate([made.tokens, np.asarray(ids, np.int32)]), 1)
                ids.append(int(row.argmax()))

            def answered(tokens: Sequence[int]) -> Kept:
                one = kept(cold.tokenizer.hf.decode(tokens), body, len(made.tokens))
                whole = body | {"messages": [*messages, {"role": "assistant", "content": one.message["content"]}]}
                (*_, said) = decode_request(json.dumps(whole).encode()).messages
                assert not isinstance(said.content, str)
                sampled = RecordedAnswer(made.opening or "", np.asarray(tokens, np.int32))
                cold.replay.put(scope, request.messages, said.content, sampled)
                return one

            right, wrong = answered(ids), answered([*ids[:2], (ids[2] + 1) % 256 + 300, ids[3]])
            assert cold.judge(right) == (None, 0)
            judged = cold.judge(wrong)
            assert judged is not None
            assert judged[0] is not None
            assert "token 2 is" in judged[0].other
            assert cold.judge(kept("never sampled", body, len(made.tokens))) is None
            assert cold.judge(replace(right, message=kept("", body, 1).message)) is None, (
                "another prompt than was served"
            )
            assert not cold.tied(Difference(wrong, "")).tied


class TestRuns:
    def test_a_short_soak_passes_and_reports_what_it_did(self, model: str, tmp_path: Path) -> None:
        sizes = "--minutes 0.15 --sessions 3 --scale 0.2 --sample-s 0.5 --lose-s 2 --judged 0"
        assert main(["--model", model, *sizes.split(), "--out", str(tmp_path)]) == 0
        written = json.loads((tmp_path / "soak.json").read_text())
        assert written["passed"] is True
        assert [life["end"] for life in written["lives"]] == ["kill -9", "SIGTERM"]
        assert written["requests"]
        assert written["machine"]["cores"]
        assert {"life", "rss", "figures"} <= set(json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0]))
        assert (tmp_path / "differences.jsonl").read_text() == ""
        assert (tmp_path / "soak.png").stat().st_size > 10_000

    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    def test_five_minutes_of_sessions_restarts_and_losses_pass(self, tmp_path: Path) -> None:
        command = [
            sys.executable,
            "-m",
            "experiments.soak",
            "--minutes",
            "5",
            "--judged",
            "300",
            "--out",
            str(tmp_path),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    @pytest.mark.parametrize("wrong", ["--minutes 0", "--sessions 0", "--lose-share 2"])
    def test_a_size_that_means_nothing_is_refused_by_name(self, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(wrong.split())
        assert wrong.split()[0] in capsys.readouterr().err.splitlines()[-1]

    def test_a_server_that_does_not_start_is_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--model", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 2
        assert "nothing" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
