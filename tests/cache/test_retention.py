"""What stays on the device because somebody asked for it: for its time, within its share, over restarts."""

from __future__ import annotations

import math
import time
from pathlib import Path
from threading import Event, Timer

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.pool import PoolExhausted
from cache.prefix_cache import PrefixCache
from cache.retained_file import RetainedFile, Row, Rows, read, resumed
from cache.retention import Ask, Client, Kept, Published, Resumed, Retentions

PAGE, PAGES = 4, 32
HOUR = 3600.0


class Bench:
    """Retentions over a prefix cache, with a clock that moves by hand."""

    def __init__(self, budget: int = 16, known: dict[bytes, Resumed] | None = None) -> None:
        self.now, self.known = 1000.0, {} if known is None else known
        self.cache = PrefixCache(PAGES, PAGE, b"model", kept=self.known)
        self.kept = Retentions(lambda: self.cache, budget, self.known, lambda: self.now)

    def compute(self, tokens: np.ndarray, salt: bytes = b"") -> None:
        """Put a sequence into the cache, evicting for it what may go."""
        lease, _ = self.cache.extend(self.cache.match(tokens, salt), len(tokens))
        self.cache.insert(lease, tokens)
        self.cache.release(lease)

    def ask(self, tokens: np.ndarray, *asks: Ask, client: Client = Client(), salt: bytes = b"") -> list[Kept]:  # noqa: B008
        """Compute a sequence and ask to keep it."""
        self.compute(tokens, salt)
        return self.kept.keep(asks, Published(tokens, self.cache.keys(tokens, salt), salt, 0), client)

    def cached(self, tokens: np.ndarray, salt: bytes = b"") -> int:
        return self.cache.peek(tokens, salt)

    def press(self) -> None:
        """Evict all that may go."""
        stats = self.cache.stats()
        self.compute(text(99, (stats.pages_free + stats.pages_cached) * PAGE))

    def check(self) -> None:
        self.cache.check()
        assert len(self.cache.live) == len(self.kept.retained()) + len(self.kept.pins)


def text(seed: int, length: int = 4 * PAGE) -> np.ndarray:
    """Tokens that no other seed's begin with."""
    return np.concatenate([[seed], np.random.default_rng(seed).integers(100, 999, length - 1)]).astype(np.int32)


def test_only_what_was_asked_for_survives_eviction_and_only_for_its_time() -> None:
    bench = Bench()
    (kept,) = bench.ask(text(1), Ask(16, 300))
    assert (kept.tokens, kept.why) == (16, "")
    assert abs(kept.until - time.time() - 300) < 5
    bench.compute(text(2))
    bench.press()
    assert (bench.cached(text(1)), bench.cached(text(2))) == (16, 0)
    bench.now += 301
    bench.kept.expire()
    bench.press()
    assert bench.cached(text(1)) == 0
    bench.check()


def test_each_use_begins_the_time_anew() -> None:
    bench = Bench()
    bench.ask(text(1), Ask(16, 300))
    for _ in range(5):
        bench.now += 200
        bench.ask(text(1))
    bench.press()
    assert bench.cached(text(1)) == 16


def test_whole_pages_count_and_less_than_one_is_told() -> None:
    bench = Bench()
    assert bench.ask(text(1, 11), Ask(11, 300))[0].tokens == 8
    assert "expected a page" in bench.ask(text(2, 11), Ask(3, 300))[0].why


def test_a_conversation_that_goes_on_takes_the_place_of_what_it_extends() -> None:
    bench, whole = Bench(), text(1, 40)
    for length in range(8, 41, 4):
        bench.ask(whole[:length], Ask(length, 300), Ask(8, HOUR))
    assert len(bench.kept.retained()) == 2, "the head for an hour, the rest for five minutes"
    assert bench.kept.pages_of("") == 10
    bench.check()


def test_beyond_its_share_an_owner_loses_what_ends_first_and_is_told_so() -> None:
    bench = Bench(budget=8)
    bench.ask(text(1), Ask(16, 300))
    bench.ask(text(2), Ask(16, HOUR))
    assert bench.ask(text(3), Ask(16, 600))[0].tokens == 16
    bench.press()
    assert [bench.cached(text(seed)) for seed in (1, 2, 3)] == [0, 16, 16]
    (refused,) = bench.ask(text(1), Ask(16, 300))
    assert (refused.tokens, refused.until) == (0, 0.0)
    assert "given up before" in refused.why
    assert "--retain-bytes" in refused.why, "it would end first itself"


def test_background_requests_lose_first_whenever_they_end() -> None:
    bench = Bench(budget=8)
    bench.ask(text(1), Ask(16, HOUR), client=Client(background=True))
    bench.ask(text(2), Ask(16, 300))
    bench.ask(text(3), Ask(16, 300))
    bench.press()
    assert [bench.cached(text(seed)) for seed in (1, 2, 3)] == [0, 16, 16]


def test_no_owner_takes_anothers_share() -> None:
    bench = Bench(budget=8)
    mine, theirs = Client("a", 0.5), Client("b", 0.5)
    bench.ask(text(1), Ask(16, 300), client=theirs, salt=b"b")
    for seed in range(2, 8):
        assert bench.ask(text(seed), Ask(16, HOUR), client=mine, salt=b"a")[0].tokens == 16
    assert (bench.kept.pages_of("a"), bench.kept.pages_of("b")) == (4, 4)
    assert "may keep 4" in bench.ask(text(8, 24), Ask(24, 2 * HOUR), client=mine, salt=b"a")[0].why
    assert bench.cached(text(1), b"b") == 16


def test_pins_stay_until_dropped_and_take_from_what_may_be_retained() -> None:
    bench = Bench(budget=8)
    assert bench.ask(text(1), Ask(16, math.inf, "p"))[0].until == math.inf
    assert "may keep 4" in bench.ask(text(2, 24), Ask(24, HOUR))[0].why
    assert bench.ask(text(3), Ask(16, HOUR))[0].tokens == 16
    assert "not pinned" in bench.ask(text(4, 32), Ask(32, math.inf, "q"))[0].why
    bench.now += 1e9
    bench.press()
    assert bench.cached(text(1)) == 16
    bench.kept.drop_pin("p")
    bench.press()
    assert bench.cached(text(1)) == 0
    bench.check()


def test_a_request_that_needs_the_pool_gets_it_in_the_order_of_ends_and_pins_last() -> None:
    bench, order = Bench(), []
    bench.ask(text(1), Ask(16, math.inf, "p"))
    bench.ask(text(2), Ask(16, HOUR))
    bench.ask(text(3), Ask(16, 300))
    lease = bench.cache.match(text(9))
    while True:
        try:
            bench.cache.extend(lease, PAGES * PAGE)
            break
        except PoolExhausted:
            assert bench.kept.give_up()
            order.append([len(bench.kept.pins), [each.seconds for each in bench.kept.retained()]])
    assert order == [[1, [HOUR]], [1, []], [0, []]]
    assert not bench.kept.give_up()


def test_a_pin_that_cannot_be_replaced_stays() -> None:
    bench = Bench(budget=8)
    bench.ask(text(1), Ask(16, math.inf, "p"))
    assert "not pinned" in bench.ask(text(2, 36), Ask(36, math.inf, "p"))[0].why
    bench.press()
    assert bench.cached(text(1)) == 16
    assert bench.ask(text(3, 32), Ask(32, math.inf, "p"))[0].tokens == 32, "it needs no room beside the one it replaces"
    assert bench.kept.pinned_pages == 8
    bench.check()


def test_what_was_pinned_and_given_up_can_be_kept() -> None:
    bench = Bench()
    bench.ask(text(1), Ask(16, math.inf, "p"))
    assert bench.kept.give_up()
    (kept,) = bench.ask(text(1), Ask(16, HOUR))
    assert (kept.tokens, kept.why) == (16, "")


def test_what_is_noted_while_the_file_is_written_is_written_as_well(tmp_path: Path) -> None:
    bench, file = Bench(), RetainedFile(tmp_path, b"model")
    write, entered, go = file._write, Event(), Event()

    def slow() -> None:
        write()
        entered.set()
        go.wait(10)

    file._write = slow  # type: ignore[method-assign]
    bench.ask(text(1), Ask(16, HOUR))
    file.note(bench.kept)
    assert entered.wait(10)
    bench.ask(text(2), Ask(16, HOUR))
    file.note(bench.kept)
    Timer(0.2, go.set).start()
    file.close(10)
    assert not file.thread.is_alive()
    assert len(read(tmp_path, b"model", 0.0, time.time())) == 8


def test_what_an_audit_drops_is_kept_no_longer() -> None:
    bench = Bench()
    bench.ask(text(1), Ask(16, HOUR))
    bench.ask(text(2), Ask(16, HOUR))
    bench.cache.drop(text(1), 8)
    bench.kept.forget_unlisted()
    assert len(bench.kept.retained()) == 1
    bench.check()
    assert "given up before" in bench.ask(text(1), Ask(16, HOUR))[0].why


def test_a_restart_goes_on_with_what_was_promised_once_its_owner_comes(tmp_path: Path) -> None:
    bench = Bench()
    bench.ask(text(1), Ask(16, HOUR), client=Client("a"), salt=b"a")
    bench.now += 60
    file = RetainedFile(tmp_path, b"model")
    file.note(bench.kept)
    file.close(5)
    known = read(tmp_path, b"model", 5000.0, time.time())
    keys = bench.cache.keys(text(1), b"a")
    assert list(known) == keys
    assert all(abs(each.end - 5000 - HOUR + 60) < 5 for each in known.values())
    assert read(tmp_path, b"another model", 5000.0, time.time()) == {}

    later = Bench(known=known)
    later.now = 5001.0
    later.cache.preloaded.add(dict.fromkeys(keys, "disk"))
    later.compute(text(3, (PAGES - 5) * PAGE))
    later.press()
    assert len(later.cache.preloaded) == 4, "others were evicted"
    later.ask(text(2), client=Client("b"), salt=b"a")
    assert len(later.known) == 4
    later.cache.preloaded.drop(keys)
    later.ask(text(1), client=Client("a"), salt=b"a")
    assert (len(later.known), later.kept.pages_of("a")) == (0, 4)
    later.press()
    assert later.cached(text(1), b"a") == 16
    later.now += HOUR
    later.kept.expire()
    assert later.kept.pages_of("a") == 0
    later.check()


@given(set_by=st.floats(-1e9, 1e9), seconds=st.floats(1, 86_400), age=st.floats(0, 86_400))
def test_a_clock_that_was_set_makes_no_promise_longer(set_by: float, seconds: float, age: float) -> None:
    written, key = 1.7e9, bytes(32)
    found = resumed([Row("", seconds, written - age + seconds, key)], now=50.0, wall=written + set_by)
    assert all(50.0 < each.end <= 50.0 + seconds for each in found.values())
    if set_by == 0 and age < seconds:
        assert found


def test_files_of_others_count_until_they_are_over_and_torn_ones_cost_nothing(tmp_path: Path) -> None:
    import msgspec

    def write(name: str, *rows: Row) -> Path:
        path = tmp_path / name
        path.write_bytes(msgspec.msgpack.encode(Rows(b"model", rows)))
        return path

    keys = [bytes([n]) * 32 for n in range(4)]
    write("a", Row("", 300, 1300, keys[0] + keys[1]), Row("", 60, 1010, keys[2]))
    write("b", Row("", 900, 1700, keys[1] + keys[3]))
    over, torn = write("c", Row("", 60, 900, keys[0])), tmp_path / "d"
    torn.write_bytes(b"\x92\x01")
    known = read(tmp_path, b"model", 0.0, 1000.0)
    assert {key: each.end for key, each in known.items()} == dict(zip(keys, (300, 700, 10, 700), strict=True))
    assert not over.exists()
    assert not torn.exists()
    assert list(known)[:2] == keys[:2], "what was used last comes first"


@settings(max_examples=40)
@given(st.data())
def test_whatever_is_asked_the_budget_holds_and_no_page_is_lost(data: st.DataObject) -> None:
    bench, owners = Bench(budget=12), {"a": 0.5, "b": 0.25}
    for _ in range(data.draw(st.integers(1, 12))):
        owner, seed = data.draw(st.sampled_from("ab")), data.draw(st.integers(1, 4))
        length = data.draw(st.integers(1, 6)) * PAGE
        pin = data.draw(st.sampled_from(["", "", "", "p"]))
        ask = Ask(length, math.inf if pin else data.draw(st.sampled_from([10.0, 100.0, 1000.0])), pin)
        client = Client(owner, owners[owner], data.draw(st.booleans()))
        try:
            (kept,) = bench.ask(text(seed, length), ask, client=client, salt=owner.encode())
        except PoolExhausted:
            assert bench.kept.give_up()
            continue
        assert (kept.tokens > 0) != bool(kept.why and "given up" not in kept.why.split(";")[-1])
        for name, share in owners.items():
            assert bench.kept.pages_of(name) <= max(int(12 * share), 0)
        assert bench.kept.pinned_pages <= 12
        bench.now += data.draw(st.sampled_from([0, 5, 50]))
        bench.check()
    bench.kept.end()
    bench.check()
    assert not bench.kept.idle_pages
