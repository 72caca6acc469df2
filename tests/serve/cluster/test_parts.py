"""The parts of a cluster that need no Ray: what travels, who is chosen, what is refused."""

from __future__ import annotations

import asyncio
import itertools
import pickle
import socket
from collections.abc import AsyncGenerator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from cache.eviction import State
from experiments.harness.server import free_port
from model.config import ModelConfig
from model.params import Params
from serve.cluster import deploy
from serve.cluster.client import ClusterEngine
from serve.cluster.config import ROUND_ROBIN, ClusterConfig, parse_config
from serve.cluster.deploy import Impossible, check_equal, check_head, check_installed, check_ours, check_resources
from serve.cluster.dispatch import Call, Dispatch
from serve.cluster.figures import total
from serve.cluster.publisher import Publisher
from serve.cluster.replica import load_of
from serve.cluster.report import NO_LOAD, Costs, Identity, Report
from serve.cluster.speed import REPORTS, UNMEASURED, Speed, expected_flops
from serve.cluster.wire import VERSION, Refused, pack, pack_events, unpack, unpack_events
from serve.cost.model import CostModel, Rate
from serve.engine.engine import Engine
from serve.engine.inbox import Overloaded
from serve.engine.request import Event, Finished, GenerationRequest, Started, TokenEvent
from serve.engine.sessions import AgentNow, KnownAgents
from serve.engine.settings import EngineSettings
from serve.prompt.grammar import Grammar
from serve.prompt.masks import make_constrainer
from serve.prompt.tokenizer import Tokenizer
from serve.router.request import RoutedRequest
from serve.router.summary import Increment, Load, Snapshot
from tests.helpers.forced_answers import Script
from tests.helpers.tiny_engine import SMALL, prompt, tick

CONFIG = ClusterConfig(model="a/model")
IDENTITY = Identity(VERSION, CONFIG.version, b"weights", b"tokenizer", EngineSettings(100, 1000), 500)


def report(
    name: str,
    pages: tuple[Increment, ...] | Snapshot = (),
    flops: float = 1e9,
    chunks: int = 1,
    load: Load = NO_LOAD,
    **other: object,
) -> Report:
    costs = replace(Costs.of(CostModel(1e6, 1e3, Rate(flops))), chunks=chunks, chunk_flops=1e8)
    return Report(name, replace(IDENTITY, **other), "cpu", 128, 0, 0, 0, (1, 1), costs, ("disk",), pages, load)


def call(dispatch: Dispatch, id: str, *keys: int) -> Call:
    return Call(b"packed", False, RoutedRequest(id, np.asarray(keys, np.uint64), 64 * len(keys) + 10, 64), dispatch)


class TestWire:
    def test_a_request_arrives_with_its_grammar_at_the_start(self, tokenizer: Tokenizer) -> None:
        constrainer = make_constrainer(tokenizer.hf, {tokenizer.hf.eos_token_id}, len(tokenizer.hf))
        constraint = constrainer.start(Grammar('start: "yes" | "no"\n', ()))
        sent = GenerationRequest(np.arange(50_000, dtype=np.int32), 7, frozenset({3}), salt=b"s", constraint=constraint)
        constraint.accept(int(tokenizer.encode("y")[0]))  # the sender's own state does not travel
        packed = pack(sent)
        assert len(packed) < 4 * 50_000 + 1000, "the tokens are one buffer"
        came = unpack(packed, constrainer.constraint)
        assert np.array_equal(came.tokens, sent.tokens)
        assert came.tokens.dtype == np.int32
        assert (came.max_tokens, came.stop_ids, came.salt, came.sampling) == (7, {3}, b"s", sent.sampling)
        fresh = constrainer.start(Grammar('start: "yes" | "no"\n', ()))
        assert came.constraint is not None
        assert np.array_equal(came.constraint.mask(), fresh.mask())

    def test_a_grammar_is_compiled_for_the_salt_of_its_request(self, tokenizer: Tokenizer) -> None:
        constrainer = make_constrainer(tokenizer.hf, {tokenizer.hf.eos_token_id}, len(tokenizer.hf))
        constraint = constrainer.start(Grammar('start: "yes"\n', ()))
        held = len(constrainer.compiled)
        for salt in (b"\0key\0alice\0", b"\0key\0bob\0", b"\0key\0bob\0"):
            packed = pack(GenerationRequest(prompt(1, 5), 1, salt=salt, constraint=constraint))
            assert unpack(packed, constrainer.constraint).constraint is not None
        assert len(constrainer.compiled) == held + 2, "one for each salt"

    def test_any_other_constraint_travels_as_it_is(self) -> None:
        came = unpack(pack(GenerationRequest(prompt(1, 5), 1, constraint=Script([1, 2], 64))), lambda text: None)
        assert isinstance(came.constraint, Script)
        assert came.constraint.tokens == [1, 2]

    def test_events_and_refusals_arrive(self) -> None:
        events = [Started(9, 4, 0.5, 0.25, {"disk": 4}), TokenEvent(7), Finished("stop")]
        assert unpack_events(pack_events(events)) == events
        refused = unpack_events(pack_events(Refused("full", overloaded=True)))
        assert isinstance(refused, Refused)
        assert isinstance(refused.error(), Overloaded)
        assert isinstance(Refused("wrong", overloaded=False).error(), ValueError)

    def test_a_call_is_pickled_as_its_bytes(self) -> None:
        assert pickle.loads(pickle.dumps(call(Dispatch(), "1", 5, 6))) == b"packed"


class TestDispatch:
    def test_a_prompt_goes_where_its_pages_are(self) -> None:
        dispatch = Dispatch()
        dispatch.published(report("a"))
        dispatch.published(report("b", Snapshot(4, np.arange(1, 9, dtype=np.uint64))))
        assert dispatch.choose(call(dispatch, "1", 1, 2, 3, 4), ["a", "b"]) == "b"
        assert dispatch.known == {"a": -1, "b": 4}

    def test_what_a_prompt_would_find_is_told_without_sending_it(self) -> None:
        dispatch = Dispatch()
        assert dispatch.forecast(call(dispatch, "1", 1).request) is None
        dispatch.published(report("a"))
        dispatch.published(report("b", Snapshot(4, np.arange(1, 9, dtype=np.uint64))))
        asked = call(dispatch, "1", 1, 2, 3, 4)
        found = dispatch.forecast(asked.request)
        assert found
        assert found.cached["device"] == min(4 * asked.request.page_size, asked.request.tokens - 1)
        assert found.ttft_s > 0
        assert not dispatch.router.in_flight
        dispatch.choose(asked, ["a", "b"])
        assert asked.forecast == found

    def test_a_call_that_comes_back_goes_elsewhere(self) -> None:
        dispatch = Dispatch()
        for name in ("a", "b"):
            dispatch.published(report(name))
        lost = call(dispatch, "1", 1, 2)
        tried = [dispatch.choose(lost, ["a", "b"]) for _ in range(2)]
        assert sorted(tried) == ["a", "b"]
        assert dispatch.choose(lost, ["a"]) == "a", "the only one is tried again"
        dispatch.ended(lost, complete=True)
        assert not dispatch.router.in_flight

    def test_a_replica_that_has_not_reported_yet_is_used_if_there_is_no_other(self) -> None:
        dispatch = Dispatch()
        assert dispatch.choose(call(dispatch, "1", 1), ["new"]) == "new"
        dispatch.published(report("old"))
        assert dispatch.choose(call(dispatch, "2", 1), ["new", "old"]) == "old"

    def test_what_a_replica_had_is_forgotten_with_it(self) -> None:
        dispatch = Dispatch()
        dispatch.published(report("a", Snapshot(1, np.arange(4, dtype=np.uint64))))
        dispatch.published(report("b", Snapshot(1, np.zeros(0, np.uint64))))
        assert dispatch.choose(call(dispatch, "1", 0, 1), ["b"]) == "b"
        assert list(dispatch.router.replicas) == ["b"]
        assert "a" not in dispatch.known

    def test_a_gap_in_the_increments_asks_for_a_snapshot(self) -> None:
        dispatch = Dispatch()
        nothing = np.zeros(0, np.uint64)
        dispatch.published(report("a", Snapshot(1, nothing)))
        dispatch.published(report("a", (Increment(2, nothing, nothing),)))
        assert dispatch.known["a"] == 2
        dispatch.published(report("a", (Increment(4, nothing, nothing),)))
        assert dispatch.known["a"] == -1

    def test_round_robin_takes_turns(self) -> None:
        dispatch = Dispatch(round_robin=True)
        for name in ("a", "b"):
            dispatch.published(report(name, Snapshot(1, np.arange(4, dtype=np.uint64))))
        assert [dispatch.choose(call(dispatch, str(i), 1), ["b", "a"]) for i in range(4)] == ["a", "b", "a", "b"]

    def test_pages_count_before_any_replica_has_measured_its_speed(self) -> None:
        dispatch = Dispatch()
        dispatch.published(report("a", flops=0))
        dispatch.published(report("b", Snapshot(4, np.arange(1, 9, dtype=np.uint64)), flops=0))
        assert dispatch.choose(call(dispatch, "1", 1, 2, 3, 4), ["a", "b"]) == "b"

    def test_a_speed_that_is_measured_later_counts(self) -> None:
        dispatch = Dispatch()
        for flops, chunks in ((0, 0), (1e9, 1), *((1e9 + number, 16) for number in range(9))):
            dispatch.published(report("a", flops=flops, chunks=chunks))
            dispatch.published(report("b", flops=4 * flops, chunks=chunks))
        fleet = dispatch.router.fleet
        linear = {name: fleet.constants[fleet.row(name)].linear for name in ("a", "b")}
        assert 1.9 < linear["a"] / linear["b"] < 4
        assert dispatch.choose(call(dispatch, "1", 1, 2), ["a", "b"]) == "b"

    def test_what_other_ingresses_send_counts(self) -> None:
        dispatch = Dispatch()
        dispatch.published(report("a", load=Load((("other's", 0, 10_000),), 0)))
        dispatch.published(report("b"))
        assert dispatch.choose(call(dispatch, "1", 1), ["a", "b"]) == "b"
        dispatch.published(report("a"))
        dispatch.published(report("b", load=Load((("1", 0, 74), ("other's", 0, 10_000)), 0)))
        assert dispatch.choose(call(dispatch, "2", 2), ["a", "b"]) == "a"

    @pytest.mark.parametrize("round_robin", [False, True])
    def test_a_replica_that_hangs_gets_nothing_until_it_reports(self, round_robin: bool) -> None:
        now = [0.0]
        dispatch = Dispatch(round_robin, clock=lambda: now[0])
        pages = Snapshot(1, np.arange(4, dtype=np.uint64))
        dispatch.published(report("a", pages))
        for second in range(1, 8):
            now[0] = float(second)
            dispatch.published(report("b"))
        assert dispatch.silent == {"a"}
        assert dispatch.choose(call(dispatch, "1", 0, 1, 2, 3), ["a", "b"]) == "b"
        tried = call(dispatch, "2", 0, 1)
        tried.tried = ["b"]
        assert dispatch.choose(tried, ["a", "b"]) == "a", "there is no other"
        now[0] = 30.0  # the ingress itself was busy
        dispatch.published(report("a"))
        dispatch.published(report("b"))
        assert not dispatch.silent
        dispatch.ended(tried, complete=True)
        chosen = {dispatch.choose(call(dispatch, str(i), 0, 1, 2, 3), ["a", "b"]) for i in range(3, 4 + round_robin)}
        assert chosen == ({"a", "b"} if round_robin else {"a"})

    def test_a_call_that_is_cancelled_while_ray_chooses_leaves_nothing(self) -> None:
        dispatch = Dispatch()
        dispatch.published(report("a"))
        cancelled = call(dispatch, "1", 1, 2)
        dispatch.ended(cancelled, complete=False)
        assert dispatch.choose(cancelled, ["a"]) == "a"
        assert not dispatch.router.in_flight
        assert dispatch.router.fleet.idle("a")


class Handle:
    """A handle to replicas that answer, and refuse if they are named in `full`."""

    def __init__(self, full: tuple[str, ...]) -> None:
        self.full = full

    def options(self, **options: object) -> Handle:
        return self

    def remote(self, call: Call, constrained: bool, id: str) -> AsyncGenerator[bytes, None]:
        name = call.dispatch.choose(call, ["a", "b"])

        async def answer() -> AsyncGenerator[bytes, None]:
            full = name in self.full
            yield pack_events(Refused("full", overloaded=True) if full else [Started(9, 4, 0.5, 0.25, {}), DONE])

        return answer()


DONE = Finished("stop")


class TestClient:
    @pytest.mark.parametrize("full", [("a",), ("b",), ("a", "b")])
    def test_a_request_that_one_replica_refuses_is_sent_to_another(self, full: tuple[str, ...]) -> None:
        dispatch = Dispatch()
        engine = ClusterEngine(Handle(full), [report("a"), report("b")], dispatch)

        async def events(seed: int) -> list[Event]:
            return [event async for event in engine.generate(GenerationRequest(prompt(seed, 60), 4))]

        for seed in range(2):
            if len(full) == 2:
                with pytest.raises(Overloaded):
                    asyncio.run(events(seed))
            else:
                assert asyncio.run(events(seed))[-1] == DONE
        assert not dispatch.router.in_flight
        assert engine.idle

    def test_a_head_that_is_gone_refuses_requests_and_ends_those_that_wait(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Silent:
            """A handle whose replicas say nothing."""

            def options(self, **options: object) -> Silent:
                return self

            def remote(self, *args: object) -> Silent:
                return self

            def broadcast(self, *args: object) -> None:
                raise RuntimeError("no replica")

            async def __anext__(self) -> bytes:
                return await asyncio.get_running_loop().create_future()

            def cancel(self) -> None:
                """Nothing is left of it."""

        monkeypatch.setattr("serve.cluster.client.REPORT_SECONDS", 0.01)
        engine = ClusterEngine(Silent(), [report("a")], Dispatch(), head_answers=lambda: False)

        async def events(seed: int) -> list[Event]:
            return [event async for event in engine.generate(GenerationRequest(prompt(seed, 60), 4), 60.0)]

        async def both() -> None:
            waits = asyncio.create_task(events(1))
            await asyncio.sleep(0)
            engine.start()
            with pytest.raises(Overloaded, match="Ray's head"):
                await asyncio.wait_for(waits, 10)
            with pytest.raises(Overloaded, match="start it again"):
                await events(2)
            engine.following.cancel()

        asyncio.run(both())
        assert not engine.alive
        assert engine.idle

    def test_each_agent_is_listed_as_the_replica_has_it_that_it_asked_last(self) -> None:
        def agent(id: str, read: float, tokens: int) -> AgentNow:
            return AgentNow(id, "s", "", State.TOOL, read, read, tokens, tokens, tokens)

        older = KnownAgents((agent("main", 1.0, 10), agent("sub", 2.0, 20)), 1)
        newer = KnownAgents((agent("main", 3.0, 30),), 2)

        class Replicas(Handle):
            """A handle to replicas of which some say what they know."""

            def broadcast(self, method: str, *arguments: object) -> Replicas:
                asked.append((method, *arguments))
                return self

            def results(self, **options: object) -> list[object]:
                return [older, newer, RuntimeError("of an older version")] if answering else []

        asked, answering = list[tuple[object, ...]](), True
        engine = ClusterEngine(Replicas(()), [report("a"), report("b"), report("c")], Dispatch())
        found = asyncio.run(engine.sessions("alice"))
        assert asked == [("sessions", "alice")]
        assert found == KnownAgents((newer.known[0], older.known[1]), 3, "1 of 3 replicas do not say")
        answering = False
        assert asyncio.run(engine.sessions("alice")) is None

    def test_a_replica_that_computes_something_else_gets_no_request(self, caplog: pytest.LogCaptureFixture) -> None:
        dispatch = Dispatch()
        engine = ClusterEngine(Handle(()), [report("a")], dispatch)
        for _ in range(2):
            engine.take([report("a"), report("b", fingerprint=b"others")])
        assert list(dispatch.router.replicas) == list(engine.reports) == ["a"]
        (said,) = (record.message for record in caplog.records)
        assert "replica b gets no requests: it differs from this ingress's in fingerprint" in said


def test_a_message_may_hold_the_pages_of_a_large_pool() -> None:
    snapshot = pack_events([Snapshot(1, np.zeros(1_000_000, np.uint64))])
    assert 4 * 2**20 < len(snapshot) < int(deploy.environment(1, on_gpu=True)[next(iter(deploy.MESSAGES))])


def settled(flops: float, chunk_flops: float = 1.0) -> Speed:
    """What a replica has measured in several reports."""
    speed = UNMEASURED
    for number in range(2 * REPORTS):
        speed = speed.again(flops * (1 + 1e-9 * number), 16, 0.0, chunk_flops)
    return speed


class TestSpeed:
    def test_the_first_chunks_of_equal_replicas_do_not_part_them(self) -> None:
        # Measured on two busy cores, by four equal replicas that had timed one chunk each.
        rates = {"a": 16e9, "b": 9e9, "c": 6e9, "d": 4e9}
        speeds = expected_flops({name: UNMEASURED.again(rate, 1, 0.0) for name, rate in rates.items()}, now=1.0)
        assert max(speeds.values()) < 1.1 * min(speeds.values())
        dispatch = Dispatch(clock=itertools.count(0, 0.02).__next__)
        for name, rate in rates.items():
            dispatch.published(report(name, flops=rate, chunks=1))
        talks = [call(dispatch, str(number), *range(100 * number, 100 * number + 36)) for number in range(8)]
        chosen = sorted(dispatch.choose(talk, "abcd") for talk in talks)
        assert chosen == sorted("abcd" * 2), "sessions that share nothing at once: two on each"

    def test_a_replica_that_is_slower_for_long_is_slower(self) -> None:
        measured = {"a": settled(1e9), "b": settled(1e9), "slow": settled(0.25e9)}
        assert expected_flops(measured, now=0.0)["slow"] == pytest.approx(0.5e9)
        # Without requests it measures nothing: what it has measured wears off, so that it is tried again.
        assert expected_flops(measured, now=600.0)["slow"] == pytest.approx(1e9, rel=0.01)

    def test_chunks_of_short_prompts_do_not_make_a_replica_slow(self) -> None:
        # Measured on equal replicas: chunks of 20 tokens, and of 256.
        measured = {"short": settled(1e9, 2e6), "long": settled(6e9, 3e7)}
        speeds = expected_flops(measured, now=0.0)
        assert speeds["long"] == pytest.approx(6e9)
        assert speeds["short"] == speeds["long"]

    def test_a_speed_is_as_old_as_its_measurement(self) -> None:
        speed = UNMEASURED.again(1e9, 3, 5.0)
        assert speed.again(1e9, 3, 8.0).since == 5.0
        assert speed.again(1e9, 4, 8.0).since == 8.0

    def test_a_stall_while_one_prompt_is_computed_makes_no_replica_slow(self) -> None:
        # Measured on two cores that others used, too: nine chunks within 80 ms.
        measured = {name: UNMEASURED.again(1e9, 9, 0.0) for name in "abc"} | {"d": UNMEASURED.again(1.3e8, 9, 0.0)}
        speeds = expected_flops(measured, now=0.0)
        assert speeds["d"] == speeds["a"]


class TestPublisher:
    def test_increments_add_up_to_what_is_cached_and_a_gap_is_a_snapshot(
        self, model: tuple[ModelConfig, Params]
    ) -> None:
        engine = Engine(model[1], model[0], SMALL, b"tiny")
        publisher = Publisher(engine)
        for seed in range(3):
            engine.submit(GenerationRequest(prompt(seed, 60), 4), lambda event: None)
            while engine.core.unfinished or engine.inbox.submissions:
                tick(engine)
            publisher.take()
        increments = publisher.since(0)
        assert isinstance(increments, tuple)
        assert [each.sequence for each in increments] == [1, 2, 3]
        told = set().union(*(each.added.tolist() for each in increments))
        assert told == set(publisher.pages.held().tolist())
        keys = engine.core.memory.prefix_cache.keys(prompt(1, 60))
        assert {int.from_bytes(key[:8], "little") for key in keys} <= told
        assert publisher.since(3) == ()
        for unknown in (-1, 4):
            assert isinstance(publisher.since(unknown), Snapshot)

    def test_a_report_has_the_load_of_all(self, model: tuple[ModelConfig, Params]) -> None:
        engine = Engine(model[1], model[0], SMALL, b"tiny")
        first = engine.submit(GenerationRequest(prompt(1, 60), 4), lambda event: None)
        while not any(each.sampled for each in engine.running):
            tick(engine)
        second = engine.submit(GenerationRequest(prompt(2, 50), 4), lambda event: None)
        engine.receive()
        load = load_of([*engine.waiting, *engine.running], {first: "one", second: "two"})
        assert load == Load((("two", 0, 50),), 1)


class TestFigures:
    def test_sums_and_what_is_shared(self) -> None:
        def page(count: int, pages: int) -> list:
            tier = GaugeMetricFamily("tokenzero_tier_pages", "Pages", labels=["tier"])
            tier.add_metric(["disk"], pages)
            tier.add_metric(["host"], pages)
            return [CounterMetricFamily("tokenzero_steps", "Steps", count), tier]

        steps, tier = total([page(2, 30), page(5, 31)])
        assert [sample.value for sample in steps.samples] == [7]
        values = {sample.labels["tier"]: sample.value for sample in tier.samples}
        assert values == {"disk": 31, "host": 61}, "each process has a memory of its own"


class TestBadInput:
    def test_more_replicas_than_cores(self) -> None:
        with pytest.raises(Impossible, match=r"4 replicas of 1 cores need 4.*has 2.*--cpus-per-replica 0\.5"):
            check_resources(replace(CONFIG, replicas=4), {"CPU": 2.0})
        check_resources(replace(CONFIG, replicas=4, cpus_per_replica=0.5), {"CPU": 2.0})

    def test_more_replicas_than_gpus(self) -> None:
        with pytest.raises(Impossible, match=r"3 replicas on 2 GPU each need 6.*has 4: give --replicas 2"):
            check_resources(replace(CONFIG, replicas=3, tp=2), {"CPU": 64.0, "GPU": 4.0})

    def test_ray_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(deploy, "find_spec", lambda name: None)
        with pytest.raises(Impossible, match=r"ray .*missing.*pip install 'tokenzero\[cluster\]'"):
            check_installed()

    @pytest.mark.parametrize("address", ["somewhere", "host:port"])
    def test_an_address_that_is_none(self, address: str) -> None:
        with pytest.raises(Impossible, match="expected HOST:PORT"):
            check_head(address)

    def test_a_dead_head(self) -> None:
        with pytest.raises(Impossible, match=r"no Ray head answers there.*ray start --head"):
            check_head(f"127.0.0.1:{free_port()}")
        with socket.create_server(("127.0.0.1", 0)) as listening:
            check_head(f"127.0.0.1:{listening.getsockname()[1]}")

    def test_replicas_of_different_models(self) -> None:
        with pytest.raises(Impossible, match="replicas a and b differ in fingerprint"):
            check_equal([report("a"), report("b", fingerprint=b"others")])
        check_equal([report("a"), report("b")])

    @pytest.mark.parametrize(
        ("other", "named"),
        [({"version": 0}, "version 0"), ({"flags": "x"}, "other flags"), ({"tokenizer": b"x"}, "another tokenizer")],
    )
    def test_replicas_that_ran_before_and_are_others(self, other: dict, named: str) -> None:
        with pytest.raises(Impossible, match=f"{named}.*serve shutdown"):
            check_ours(replace(IDENTITY, **other), CONFIG, b"tokenizer")
        check_ours(IDENTITY, CONFIG, b"tokenizer")

    def test_fewer_replicas_at_most_than_at_first(self, capsys: pytest.CaptureFixture) -> None:
        with pytest.raises(SystemExit):
            parse_config(["--model", "m", "--replicas", "3", "--max-replicas", "2"])
        assert "--max-replicas: expected at least --replicas 3, got 2" in capsys.readouterr().err

    def test_why_a_replica_could_not_start_is_one_sentence(self) -> None:
        trace = "The deployment failed to start 1 times in a row. Error:\nray::Serve()\n  File x\nValueError: no room\n"
        application = SimpleNamespace(message="", deployments={"engine": SimpleNamespace(message=trace)})
        assert deploy.cause_of(application, RuntimeError("long\ntext")) == "no room"


def test_where_an_ingress_listens_is_not_the_replicas_business() -> None:
    elsewhere = replace(CONFIG, port=1, api_key="secret", replicas=7, routing=ROUND_ROBIN)
    assert elsewhere.version == CONFIG.version
    assert elsewhere.for_replicas.api_key is None
    assert replace(CONFIG, page_size=16).version != CONFIG.version
