"""The parts of a cluster that need no Ray: what travels, who is chosen, what is refused."""

from __future__ import annotations

import pickle
import socket
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from experiments.harness.server import free_port
from model.config import ModelConfig
from model.params import Params
from serve.cluster import deploy
from serve.cluster.config import ROUND_ROBIN, ClusterConfig, parse_config
from serve.cluster.deploy import Impossible, check_equal, check_head, check_installed, check_ours, check_resources
from serve.cluster.dispatch import Call, Dispatch
from serve.cluster.figures import total
from serve.cluster.publisher import Publisher
from serve.cluster.report import Costs, Identity, Report
from serve.cluster.wire import VERSION, Refused, pack, pack_events, unpack, unpack_events
from serve.cost.model import CostModel, Rate
from serve.engine.engine import Engine
from serve.engine.inbox import Overloaded
from serve.engine.request import Finished, GenerationRequest, Started, TokenEvent
from serve.engine.settings import EngineSettings
from serve.prompt.grammar import Grammar
from serve.prompt.masks import make_constrainer
from serve.prompt.tokenizer import Tokenizer
from serve.router.request import RoutedRequest
from serve.router.summary import Increment, Snapshot
from tests.helpers.forced_answers import Script
from tests.helpers.tiny_engine import SMALL, prompt, tick

CONFIG = ClusterConfig(model="a/model")
IDENTITY = Identity(VERSION, CONFIG.version, b"weights", b"tokenizer", EngineSettings(100, 1000), 500)


def report(name: str, pages: tuple[Increment, ...] | Snapshot = (), **other: object) -> Report:
    costs = Costs.of(CostModel(1e6, 1e3, Rate(1e9)))
    return Report(name, replace(IDENTITY, **other), "cpu", 128, 0, 0, 0, (1, 1), costs, ("disk",), pages)


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


class TestFigures:
    def test_sums_and_what_is_shared(self) -> None:
        def page(count: int, pages: int) -> list:
            tier = GaugeMetricFamily("tokenzero_tier_pages", "Pages", labels=["tier"])
            tier.add_metric(["disk"], pages)
            return [CounterMetricFamily("tokenzero_steps", "Steps", count), tier]

        steps, tier = total([page(2, 30), page(5, 31)])
        assert [sample.value for sample in steps.samples] == [7]
        assert [(sample.labels, sample.value) for sample in tier.samples] == [({"tier": "disk"}, 31)]


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
