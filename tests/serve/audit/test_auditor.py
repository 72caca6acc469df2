"""The auditor finds every fault that is put in, sees none where there is none, and costs no request anything."""

from __future__ import annotations

import logging
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cache.keys import root_key
from cache.tiers import StoredPage, Tiers
from model import checkpoint
from model.config import ModelConfig
from model.kernels.dispatch import arranged
from model.params import Params
from serve.audit.auditor import AuditSettings, attach, audit_pages
from serve.audit.case import Case, read_case, write_case
from serve.audit.cli import main
from serve.audit.comparison import TOLERANCE
from serve.engine import restore
from serve.engine.buckets import SamplingParams
from serve.engine.engine import Engine
from serve.engine.page_names import PageNames
from serve.engine.request import Finished
from serve.engine.restore import Restorer, Slice
from tests.helpers.tiny_engine import ALWAYS, PAGE, SMALL, VOCAB, generate, outcome, prompt, submit, tick, tiers_of

Make = Callable[..., Engine]
# One pool's shape for all, and so one set of compiled steps: requests have all, or little, and the auditor the rest.
ROOMY = replace(SMALL, audit_pages=SMALL.max_model_len // PAGE + 2)
IN_PART = replace(ROOMY, num_pages=ROOMY.num_pages + ROOMY.audit_pages - 6, audit_pages=6)
CRAMPED = replace(ROOMY, num_pages=42, audit_pages=ROOMY.num_pages + ROOMY.audit_pages - 42)
UNLIMITED = AuditSettings(share=1e9, quiet_s=0.0)
MOST = 1000  # audited requests within which a fault has to be found
TRUNK = 96  # tokens that sessions of one kind share


@pytest.fixture
def make(model: tuple[ModelConfig, Params]) -> Iterator[Make]:
    """Makes engines with an auditor, which are not started; the tiers of all are closed at the end."""
    made = []

    def make(
        tiers: Tiers | None = None, settings: Any = ROOMY, audit: AuditSettings = UNLIMITED, params: Any = None
    ) -> Engine:
        engine = Engine(params or model[1], model[0], settings, b"fingerprint", tiers)
        attach(engine, audit)
        if tiers:
            engine.core.costs.model = ALWAYS
            made.append(tiers)
        return engine

    yield make
    for tiers in made:
        tiers.close()


def finish(engine: Engine) -> None:
    """Turn the loop until there is nothing to do."""
    while tick(engine):
        pass
    engine.core.collect()


def audit(engine: Engine) -> None:
    """Audit all there is to audit."""
    auditor = engine.idle_work
    assert auditor is not None
    while auditor.records or auditor.audit:
        auditor.step(engine)
        assert auditor.failures == 0
        if auditor.waits is not None:
            auditor.waits.result(60)
    if auditor.writing:
        auditor.writing.join(60)
    engine.core.memory.prefix_cache.check()


def ask(engine: Engine, tokens: np.ndarray, count: int = 2, **options: Any) -> list[int]:
    """Ask, wait for the end, and audit."""
    events, _ = submit(engine, tokens, count, **options)
    finish(engine)
    audit(engine)
    found, _, end = outcome(events)
    assert end == Finished("length")
    return found


def stored(make: Make, folder: Path, prompts: list[np.ndarray], **options: Any) -> list[list[bytes]]:
    """Let an engine compute prompts and store their pages; the keys of their full pages."""
    tiers = tiers_of(folder)
    engine = make(tiers)
    for tokens in prompts:
        submit(engine, tokens, 1, **options)
        finish(engine)
    assert tiers.writer.flush(60)
    tiers.close()
    return [engine.core.memory.prefix_cache.keys(tokens, options.get("salt", b"")) for tokens in prompts]


def sessions(count: int) -> list[np.ndarray]:
    """Prompts of 100 to 250 tokens, of which four at a time have a trunk in common."""
    rng = np.random.default_rng(5)
    return [np.concatenate([prompt(i // 4, TRUNK), prompt(1000 + i, int(rng.integers(30, 154)))]) for i in range(count)]


def audited_until_found(engine: Engine, prompts: list[np.ndarray], seed: int = 0, **options: Any) -> int:
    """Ask for prompts in a random order until something is found wrong; how many requests were audited by then."""
    auditor, rng = engine.idle_work, np.random.default_rng(seed)
    assert auditor is not None
    while auditor.requests < MOST and not auditor.mismatches:
        ask(engine, prompts[rng.integers(len(prompts))], **options)
    assert auditor.failures == 0
    assert auditor.mismatches == 1, f"{auditor.requests} requests were audited, and nothing was found"
    print(f"found after {auditor.requests} audited requests")
    return auditor.requests


def replaced(folder: Path, payloads: dict[bytes, bytes]) -> None:
    """Put other bytes under keys of a store, with checksums that fit."""
    tiers = tiers_of(folder)
    disk = tiers.pages.tiers[0]
    disk.delete(list(payloads))
    disk.put_many(list(payloads.items()))
    tiers.close()


def payload(folder: Path, *keys: bytes) -> list[bytes]:
    tiers = tiers_of(folder)
    found = [bytes(page) for page in tiers.pages.tiers[0].get_many(keys)]
    tiers.close()
    return found


class TestInjections:
    """One page among many is wrong, or the code that brings them back is."""

    def test_flipped_bits_under_a_checksum_that_fits(self, make: Make, tmp_path: Path) -> None:
        prompts = sessions(24)
        keys = stored(make, tmp_path, prompts)
        key = keys[17][14]
        data = np.frombuffer(payload(tmp_path, key)[0], np.uint8).copy()
        for bit in np.random.default_rng(1).integers(0, 8 * len(data), 4):
            data[bit // 8] ^= 1 << (bit % 8)
        replaced(tmp_path, {key: data.tobytes()})
        engine = make(tiers_of(tmp_path))
        audited_until_found(engine, prompts)

    def test_swapped_pages(self, make: Make, tmp_path: Path) -> None:
        prompts = sessions(24)
        keys = stored(make, tmp_path, prompts)
        a, b = keys[9][12], keys[22][12]
        replaced(tmp_path, dict(zip((b, a), payload(tmp_path, a, b), strict=True)))
        audited_until_found(make(tiers_of(tmp_path)), prompts)

    def test_a_tail_that_is_taken_for_a_page(self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        prompts = sessions(24)
        stored(make, tmp_path, [tokens[: TRUNK + 3] for tokens in prompts[::6]])  # each leaves a tail
        keys = stored(make, tmp_path, prompts)
        tiers = tiers_of(tmp_path)
        tiers.pages.tiers[0].delete([keys[6][TRUNK // PAGE]])  # a hole, and the tail of an earlier turn in its place
        monkeypatch.setattr(restore, "slices_of", careless)
        audited_until_found(make(tiers), prompts)

    def test_a_restore_that_is_off_by_one(self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        prompts = sessions(24)
        stored(make, tmp_path, prompts)
        load = Restorer.load

        def shifted(self: Restorer, pages: list[StoredPage], data: np.ndarray, fetched: Any) -> Any:
            data[1:] = data[:-1].copy()
            return load(self, pages, data, fetched)

        monkeypatch.setattr(Restorer, "load", shifted)
        audited_until_found(make(tiers_of(tmp_path)), prompts)

    def test_a_page_that_another_salt_has_computed(self, make: Make, tmp_path: Path) -> None:
        prompts = sessions(24)
        keys = stored(make, tmp_path, prompts, salt=b"a")
        other = stored(make, tmp_path, [prompt(77, 120)], salt=b"b")[0]
        replaced(tmp_path, {keys[3][6]: payload(tmp_path, other[6])[0]})
        audited_until_found(make(tiers_of(tmp_path)), prompts, salt=b"a")

    def test_the_same_tokens_of_another_salt_in_the_tiers(
        self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They hold what the salt's own pages would: only their names tell."""
        prompts = sessions(4)
        stored(make, tmp_path, prompts, salt=b"a")
        parent = PageNames.parent
        engine = make(tiers_of(tmp_path))

        def confused(self: PageNames, sequence: Any, index: int) -> bytes:
            return parent(self, sequence, index) if index else root_key(b"fingerprint", PAGE, b"a")

        monkeypatch.setattr(PageNames, "parent", confused)
        assert audited_until_found(engine, prompts, salt=b"b") == 1

    def test_the_same_tokens_of_another_salt_on_the_device(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = make()
        match = engine.core.memory.prefix_cache.match
        monkeypatch.setattr(engine.core.memory.prefix_cache, "match", lambda tokens, *_: match(tokens))
        ask(engine, prompt(1), salt=b"a")
        assert audited_until_found(engine, [prompt(1)], salt=b"b") == 1

    def test_a_page_that_is_wrong_on_the_device_alone(self, make: Make) -> None:
        engine, tokens = make(), prompt(3)
        ask(engine, tokens)
        spoil(engine, tokens, 11)
        assert audited_until_found(engine, [tokens]) == 1
        assert engine.idle_work is not None
        assert engine.idle_work.latest is not None
        assert engine.idle_work.latest.position // PAGE == 11

    def test_a_wrong_page_far_back_in_a_prefix_that_is_audited_in_part(self, make: Make) -> None:
        engine, tokens = make(settings=IN_PART), prompt(3, 300)
        ask(engine, tokens)
        spoil(engine, tokens, 30)
        assert audited_until_found(engine, [tokens]) <= 100

    def test_what_is_gone_from_the_device_is_looked_at_in_the_tiers(self, make: Make, tmp_path: Path) -> None:
        tokens = prompt(3)
        tiers = tiers_of(tmp_path)
        engine = make(tiers)
        for _ in range(2):
            submit(engine, tokens, 2)
            finish(engine)
        tiers.writer.flush(60)
        key, right = engine.core.memory.prefix_cache.keys(tokens)[7], None
        (disk,) = tiers.pages.tiers
        right = bytes(disk.get_many([key])[0])
        disk.delete([key])
        disk.put_many([(key, right[::-1])])
        engine.core.memory.prefix_cache.drop(tokens, 0)
        audit(engine)
        assert engine.idle_work is not None
        assert (engine.idle_work.latest.source, engine.idle_work.latest.position) == ("disk", 7 * PAGE)
        tiers.writer.flush(60)
        tiers.searcher.submit(int).result(60)
        assert not any(disk.contains_many(engine.core.memory.prefix_cache.keys(tokens)[7:]))
        assert all(disk.contains_many(engine.core.memory.prefix_cache.keys(tokens)[:7]))

    def test_where_nothing_is_left_the_first_token_tells(self, make: Make, model: tuple[ModelConfig, Params]) -> None:
        engine, tokens = make(), prompt(3)
        ask(engine, tokens)
        spoil(engine, tokens, 0)
        submit(engine, tokens, 2)
        finish(engine)
        engine.core.memory.prefix_cache.drop(tokens, 0)
        audit(engine)
        assert engine.idle_work is not None
        assert engine.idle_work.latest.witness == "token"


def careless(pages: list[StoredPage], page_size: int, most: int) -> list[Slice]:
    """Slices as they once were: a page that is not full does not end one."""
    runs = [[page for _, page in run] for _, run in groupby(enumerate(pages), key=lambda item: item[1].index - item[0])]
    return [Slice(run[at : at + most]) for run in runs for at in range(0, len(run), most)]


def spoil(engine: Engine, tokens: np.ndarray, slot: int) -> None:
    """Write something else into a cached page."""
    page = int(engine.core.memory.prefix_cache.find(tokens)[0][slot])
    engine.core.memory.pool = replace(engine.core.memory.pool, v=engine.core.memory.pool.v.at[:, page].multiply(-1.0))


class TestWhatIsFound:
    def test_the_wrong_pages_leave_tree_and_tiers_and_are_computed_by_the_next_request(
        self, make: Make, tmp_path: Path
    ) -> None:
        tokens = prompt(3)
        right = ask(make(), tokens, 6)
        (keys,) = stored(make, tmp_path, [tokens])
        stored(make, tmp_path, [np.append(tokens[: 10 * PAGE + 3], 5)])  # its tail is on disk as well
        replaced(tmp_path, {keys[10]: payload(tmp_path, keys[11])[0]})
        tiers = tiers_of(tmp_path, host=1 << 20)
        engine = make(tiers)
        ask(engine, tokens, 6)
        assert engine.idle_work is not None
        assert engine.idle_work.mismatches == 1
        assert engine.core.memory.prefix_cache.peek(tokens) == 10 * PAGE
        assert ask(engine, tokens, 6) == right
        assert engine.idle_work.mismatches == 1
        tiers.writer.flush(60)
        tiers.close()
        engine = make(tiers_of(tmp_path))
        assert ask(engine, tokens, 6) == right
        assert engine.idle_work is not None
        assert (engine.idle_work.requests, engine.idle_work.mismatches) == (1, 0)

    def test_a_request_right_after_a_mismatch_finds_nothing_of_it(self, make: Make, tmp_path: Path) -> None:
        tokens = prompt(3)
        (keys,) = stored(make, tmp_path, [tokens])
        replaced(tmp_path, {keys[0]: payload(tmp_path, keys[11])[0]})
        engine = make(tiers_of(tmp_path))
        submit(engine, tokens, 2)
        finish(engine)
        assert engine.idle_work is not None
        while not engine.idle_work.mismatches:
            engine.idle_work.step(engine)
        events, _ = submit(engine, tokens, 2)
        finish(engine)
        assert outcome(events)[1].reused_tokens == 0

    def test_it_is_counted_logged_once_and_kept_in_a_private_file(
        self, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = tmp_path / "audits"
        engine, tokens = make(audit=replace(UNLIMITED, folder=folder)), prompt(3)
        ask(engine, tokens, salt=b"secret")
        page = int(engine.core.memory.prefix_cache.find(tokens, b"secret")[0][11])
        pool = engine.core.memory.pool
        engine.core.memory.pool = replace(pool, v=pool.v.at[1, page, :, 4].add(1.0))
        with caplog.at_level(logging.WARNING):
            ask(engine, tokens, salt=b"secret")
        (line,) = caplog.messages
        assert "page at token 92, values of layer 1 (device): off by 1 of" in line
        (path,) = folder.iterdir()
        assert str(path) in line
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        case = read_case(path)
        assert case.tokens == tokens.tolist()
        assert (case.reused, case.position, case.layer, case.part) == (199, 92, 1, "values")
        assert case.root == root_key(b"fingerprint", PAGE, b"secret").hex()
        assert b"secret" not in path.read_bytes()

    def test_files_are_bounded_in_number_and_bytes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("serve.audit.case.FILES", 3)
        paths = [write_case(tmp_path, case_of(i)) for i in range(5)]
        assert sorted(tmp_path.iterdir()) == paths[2:]
        monkeypatch.setattr("serve.audit.case.BYTES", 1)
        newest = write_case(tmp_path, case_of(9))
        assert list(tmp_path.iterdir()) == [newest]

    def test_a_folder_that_cannot_be_written_costs_the_file_alone(
        self, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "audits").write_text("a file")
        engine, tokens = make(audit=replace(UNLIMITED, folder=tmp_path / "audits")), prompt(3)
        ask(engine, tokens)
        spoil(engine, tokens, 2)
        ask(engine, tokens)
        assert engine.idle_work is not None
        assert (engine.idle_work.mismatches, engine.idle_work.failures) == (1, 0)
        assert "an audit's sequence is not kept" in caplog.messages[0]

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2}'])
    def test_a_file_that_no_audit_wrote_is_refused_by_name(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "case.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"case\.json: expected"):
            read_case(path)


def case_of(number: int) -> Case:
    return Case(
        time=f"2026-01-0{number + 1}T00:00:00+00:00", fingerprint="", root="00" * 32, page_size=PAGE,
        max_prefill_tokens=32, dtype="float32", device="cpu", jax="0", tokens=[1, 2], reused=1, first=None,
        witness="page", source="device", position=0, layer=0, part="keys", error=1.0, scale=1.0,
    )  # fmt: skip


class TestReplay:
    @pytest.mark.slow
    def test_a_file_shows_the_fault_again_on_a_store_that_has_it_and_none_without(
        self, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config, params = checkpoint.load(model_folder, "float32")
        fingerprint, audits = checkpoint.fingerprint(config, params), tmp_path / "audits"
        tokens, params = prompt(3), arranged(params, PAGE)
        right, wrong = tmp_path / "right", tmp_path / "wrong"
        for folder in (right, wrong):
            tiers = tiers_of(folder)
            engine = Engine(params, config, ROOMY, fingerprint, tiers)
            submit(engine, tokens, 1)
            finish(engine)
            assert tiers.writer.flush(60)
            keys = engine.core.memory.prefix_cache.keys(tokens)
            tiers.close()
        replaced(wrong, {keys[9]: payload(wrong, keys[8])[0]})
        engine = Engine(params, config, ROOMY, fingerprint)
        attach(engine, replace(UNLIMITED, folder=audits))
        ask(engine, tokens, 1)
        spoil(engine, tokens, 9)
        ask(engine, tokens, 1)
        (path,) = audits.iterdir()
        for folder, status, said in (
            (wrong, 1, f"differs: page at token {9 * PAGE}"),
            (right, 0, "what was reused is what the model computes"),
            (None, 0, "what was reused is what the model computes"),
        ):
            store = ["--store", str(folder)] if folder else []
            with pytest.raises(SystemExit) as ended:
                main([str(path), "--model", str(model_folder), *store])
            assert ended.value.code == status
            assert said in capsys.readouterr().out
        with pytest.raises(SystemExit, match="--salt: it is not the one"):
            main([str(path), "--model", str(model_folder), "--salt", "another"])
        assert payload(wrong, keys[9]) == payload(wrong, keys[8]), "nothing is written to the store"

    def test_what_is_no_file_of_an_audit_ends_with_a_sentence(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none.json", tmp_path):
            with pytest.raises(SystemExit, match="audit: "):
                main([str(path), "--model", str(tmp_path)])


class TestRequestsGoFirst:
    def test_a_request_waits_for_one_chunk_at_most_and_the_audit_goes_on_later(self, make: Make) -> None:
        engine, tokens = make(), prompt(3, 300)
        submit(engine, tokens, 1)
        finish(engine)
        submit(engine, tokens, 1)
        finish(engine)
        auditor = engine.idle_work
        assert auditor is not None
        auditor.step(engine)
        auditor.step(engine)
        before = auditor.tokens
        assert 0 < before <= 2 * ROOMY.max_mixed_prefill_tokens
        events, _ = submit(engine, prompt(4), 30)
        while tick(engine):
            auditor.step(engine)
            assert auditor.tokens == before or not engine.running
        assert outcome(events)[2] == Finished("length")
        audit(engine)
        assert (auditor.requests, auditor.tokens, auditor.mismatches) == (1, 299, 0)

    def test_a_window_after_cached_pages_ends_where_a_request_came_between(self, make: Make) -> None:
        engine, tokens = make(settings=IN_PART), prompt(3, 300)
        auditor = engine.idle_work
        assert auditor is not None
        while not auditor.start:
            submit(engine, tokens, 1)
            finish(engine)
            auditor.step(engine)
        submit(engine, prompt(4), 1)
        finish(engine)
        auditor.step(engine)
        assert auditor.audit is None or not auditor.start

    def test_it_takes_no_page_of_the_requests_and_is_no_use_of_what_it_reads(self, make: Make) -> None:
        engine, tokens = make(), prompt(3)
        submit(engine, tokens, 1)
        finish(engine)
        submit(engine, tokens, 1)
        finish(engine)
        stats, clock = engine.core.memory.prefix_cache.stats(), engine.core.memory.prefix_cache.tree.clock
        auditor = engine.idle_work
        assert auditor is not None
        while auditor.records or auditor.audit:
            auditor.step(engine)
            assert engine.core.memory.prefix_cache.stats() == stats
        assert engine.core.memory.prefix_cache.tree.clock == clock
        assert auditor.requests == 1

    def test_it_keeps_to_its_share_of_the_device(self, make: Make) -> None:
        engine = make(audit=replace(UNLIMITED, share=0.5))
        auditor = engine.idle_work
        assert auditor is not None
        for _ in range(40):
            submit(engine, prompt(3, 300), 3)
            finish(engine)
            while auditor.sleep_s(engine) is not None:
                auditor.step(engine)
        assert auditor.requests > 0
        # An audit begins when its expected cost fits; what it takes in truth may be more, once.
        assert auditor.records or auditor.seconds <= 0.5 * engine.core.runner.device_s

    def test_no_share_is_no_audit(self, make: Make) -> None:
        engine = make(audit=replace(UNLIMITED, share=0.0))
        for _ in range(2):
            submit(engine, prompt(3), 2)
            finish(engine)
        assert engine.idle_work is not None
        assert engine.idle_work.sleep_s(engine) is None
        engine.idle_work.step(engine)
        assert engine.idle_work.tokens == 0

    def test_it_begins_only_when_nothing_was_asked_for_a_moment(self, make: Make) -> None:
        engine = make(audit=replace(UNLIMITED, quiet_s=1000.0))
        for _ in range(2):
            submit(engine, prompt(3), 2)
            finish(engine)
        auditor = engine.idle_work
        assert auditor is not None
        auditor.step(engine)
        assert auditor.tokens == 0
        assert 0 < auditor.sleep_s(engine) <= 1000
        auditor.quiet_since -= 1000
        auditor.step(engine)
        assert auditor.tokens > 0

    def test_a_running_engine_audits_by_itself_and_stops(self, make: Make) -> None:
        engine = make(audit=replace(UNLIMITED, quiet_s=0.01))
        auditor = engine.idle_work
        assert auditor is not None
        engine.start()
        try:
            for _ in range(2):
                generate(engine, prompt(3))
            engine.thread.join(0)
            while not auditor.requests:
                engine.thread.join(0.01)
            assert generate(engine, prompt(4))[2] == Finished("length")
        finally:
            engine.stop()
        assert (auditor.mismatches, auditor.failures) == (0, 0)

    def test_an_error_of_its_own_costs_the_engine_nothing_and_gives_it_a_rest(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = make()
        auditor = engine.idle_work
        assert auditor is not None
        right = ask(engine, prompt(3), 5)
        monkeypatch.setattr(engine.core.runner, "compute", lambda row: 1 / 0)
        submit(engine, prompt(3), 5)
        finish(engine)
        auditor.step(engine)
        assert (auditor.failures, auditor.requests) == (1, 0)
        monkeypatch.undo()
        events, _ = submit(engine, prompt(3), 5)
        finish(engine)
        tokens, started, _ = outcome(events)
        assert tokens == right
        assert started.reused_tokens > 0
        auditor.step(engine)
        assert auditor.tokens == 0, "it rests"
        assert auditor.sleep_s(engine) is None

    def test_a_pool_that_an_audit_lost_is_replaced(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = make()
        right = ask(engine, prompt(3), 5)

        def lost(row: Any) -> None:
            jax.tree.map(lambda array: array.delete(), engine.core.memory.pool)
            raise RuntimeError("out of memory")

        monkeypatch.setattr(engine.core.runner, "compute", lost)
        submit(engine, prompt(3), 5)
        finish(engine)
        assert engine.idle_work is not None
        engine.idle_work.step(engine)
        monkeypatch.undo()
        assert engine.idle_work.failures == 1
        events, _ = submit(engine, prompt(3), 5)
        finish(engine)
        assert outcome(events)[0] == right

    def test_an_audit_does_not_outlive_the_pool_that_it_computes_in(self, make: Make) -> None:
        engine = make()
        for _ in range(2):
            submit(engine, prompt(3), 2)
            finish(engine)
        auditor = engine.idle_work
        assert auditor is not None
        auditor.step(engine)
        jax.tree.map(lambda array: array.delete(), engine.core.memory.pool)
        engine.core.recover("lost")
        auditor.step(engine)
        ask(engine, prompt(3))
        ask(engine, prompt(3))
        assert (auditor.mismatches, auditor.failures) == (0, 0)

    def test_records_are_bounded_in_bytes(self, make: Make) -> None:
        engine = make(audit=replace(UNLIMITED, sample_bytes=5000))
        for seed in (1, 1, 2, 2, 3, 3, 4, 4, 5, 5):
            submit(engine, prompt(seed), 1)
            finish(engine)
        auditor = engine.idle_work
        assert auditor is not None
        assert 0 < auditor.records.bytes == sum(reuse.size for reuse in auditor.records) <= 5000

    def test_the_pool_is_large_enough_or_it_is_off(self) -> None:
        assert audit_pages(100_000, 64, UNLIMITED) == 8192 // 64 + 2
        assert audit_pages(640, 64, UNLIMITED) == 10
        assert audit_pages(128, 16, UNLIMITED) == 0
        assert audit_pages(100_000, 64, replace(UNLIMITED, share=0.0)) == 0


class TestNoFalseAlarm:
    """Random sessions with tails, branches, sampling, evictions, restores and preemptions."""

    def test_two_thousand_tokens_and_more(self, make: Make, tmp_path: Path) -> None:
        assert wander(make, tmp_path, 2_000) >= 2_000

    @pytest.mark.slow
    def test_a_hundred_thousand_tokens(self, make: Make, tmp_path: Path) -> None:
        assert wander(make, tmp_path, 100_000) >= 100_000

    @pytest.mark.slow
    def test_chunks_of_any_length_stay_far_below_the_bound_in_bfloat16(
        self, make: Make, model: tuple[ModelConfig, Params]
    ) -> None:
        narrow = jax.tree.map(lambda array: array.astype("bfloat16"), model[1])
        engine = make(settings=replace(ROOMY, dtype="bfloat16", max_prefill_tokens=256), params=narrow)
        auditor = engine.idle_work
        assert auditor is not None
        comparison = replace(auditor.work.comparison, bound=TOLERANCE["bfloat16"] / 4)
        auditor.work = replace(auditor.work, comparison=comparison)
        for seed in range(8):
            ask(engine, prompt(seed, 250), 30)
            ask(engine, prompt(seed, 250), 30)
        assert auditor.tokens > 1_900
        assert auditor.mismatches == 0


def wander(make: Make, folder: Path, wanted: int, seed: int = 0) -> int:
    """Random sessions until so many tokens are audited, with a restart now and then; asserts that none is wrong."""
    rng, total, histories = np.random.default_rng(seed), 0, [prompt(i, 40) for i in range(4)]
    while total < wanted:
        settings = (ROOMY, IN_PART, CRAMPED)[rng.integers(3)]
        tiers = Tiers(str(folder), 2 << 20, int(rng.choice([0, 1 << 19])), flush_seconds=0.05)
        engine = make(tiers, settings)
        auditor = engine.idle_work
        assert auditor is not None
        for _ in range(60):
            asked = []
            for _ in range(int(rng.integers(1, 5))):
                base = histories[rng.integers(len(histories))]
                cut = len(base) if rng.random() < 0.7 else int(rng.integers(1, len(base) + 1))
                new = rng.integers(3, VOCAB, int(rng.integers(1, 40))).astype(np.int32)
                tokens = np.concatenate([base[:cut], new])[:260]
                salt = bytes([int(rng.random() < 0.1)])
                sampling = SamplingParams(temperature=float(rng.choice([0.0, 1.0])), seed=int(rng.integers(1 << 30)))
                asked.append((tokens, submit(engine, tokens, int(rng.integers(1, 50)), salt=salt, sampling=sampling)))
                for _ in range(int(rng.integers(0, 4))):
                    tick(engine)
                    auditor.step(engine)
            for _, (_, number) in asked:
                if rng.random() < 0.1:
                    engine.cancel(number)
                    asked = [each for each in asked if each[1][1] != number]
            finish(engine)
            for tokens, (events, _) in asked:
                histories.append(np.concatenate([tokens, outcome(events)[0]]).astype(np.int32)[:250])
            histories = histories[-40:]
            for _ in range(int(rng.integers(0, 30))):
                auditor.step(engine)
                if auditor.waits is not None:
                    auditor.waits.result(60)
            assert auditor.mismatches == 0, auditor.latest
            assert auditor.failures == 0
            engine.core.memory.prefix_cache.check()
            if total + auditor.tokens >= wanted:
                break
        total += auditor.tokens
        tiers.close()
    return total
