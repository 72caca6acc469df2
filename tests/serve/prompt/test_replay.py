"""The log of sampled turns, and whole sessions in which every prompt extends the one before and what was sampled."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.lmdb_env import RECORDS, StoreError
from serve.api.messages import (
    Block,
    CountTokensRequest,
    InputMessage,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from serve.formats.format import write_turn
from serve.prompt.render import Prompt, prompt
from serve.prompt.replay import RecordedAnswer, ReplayLog, keys, pack, unpack
from serve.prompt.signing import sign, signing_key, verify
from tests.helpers.conversations import (
    OPENING,
    answer_of,
    back,
    generated,
    is_extension,
    message,
    next_messages,
    sent,
    text,
)
from tests.helpers.model_families import FAMILIES, Family, tokenizer_of

Json = dict[str, Any]
SCOPE = b"key and model"
ANSWER = (TextBlock("Done."),)


def sampled(*ids: int, opening: str = "") -> RecordedAnswer:
    return RecordedAnswer(opening, np.asarray(ids, np.int32))


QUESTION = (InputMessage("user", "Fix the bug."),)


def talk(*answers: Any) -> list[InputMessage]:
    """A conversation of these answers, the question before each."""
    return [message for answer in answers for message in (*QUESTION, InputMessage("assistant", answer))]


def key(answer: Any, scope: bytes = SCOPE) -> bytes:
    return keys(scope, talk(answer))[-1]


def as_tuple(found: RecordedAnswer | None) -> tuple[str, list[int]] | None:
    return found and (found.opening, found.tokens.tolist())


def call(input: Json, id: str = "toolu_1") -> tuple[Block, ...]:
    return (ToolUseBlock(id, "Read", input),)


class TestKeys:
    @pytest.mark.parametrize(
        ("left", "right"),
        [
            ((TextBlock("Done.\n"),), (TextBlock(" Done."),)),
            ((TextBlock("Do"), TextBlock("ne.")), ANSWER),
            ((TextBlock(""), *ANSWER, TextBlock("\n")), ANSWER),
            ((ThinkingBlock("Hm.\n", "c2ln"), *ANSWER), (ThinkingBlock("Hm."), *ANSWER)),
            (call({"a": 1, "b": [1.0, {"c": -0.0}]}), call({"b": [1, {"c": 0}], "a": 1.0})),
            (call({"n": 2**53 + 1}), call({"n": 2**53})),  # what JavaScript makes of it
        ],
    )
    def test_what_clients_change_on_the_way_back_changes_nothing(self, left: Any, right: Any) -> None:
        assert key(left) == key(right)

    @pytest.mark.parametrize(
        "edited",
        [
            (TextBlock("Done!"),),
            (TextBlock("Do ne."),),
            (ThinkingBlock("Done."),),
            (ThinkingBlock("Hm."), *ANSWER),
            (*ANSWER, *call({})),
            call({"a": True}),
            call({"a": 1}),
            call({"a": "1"}),
            call({"a": None}),
            call({"a": 1}, "toolu_2"),
            call({"a": [1, 2]}),
            call({"a": [2, 1]}),
            (),
        ],
    )
    def test_an_edited_turn_has_a_key_of_its_own(self, edited: Any) -> None:
        others = [ANSWER, call({"a": 2}), call({"a": [1]})]
        assert key(edited) not in map(key, others)

    def test_half_a_surrogate_pair_is_told_from_another(self) -> None:
        one, other = ((ToolUseBlock("t", "Write", {"text": text}),) for text in ("\ud800", "\ud801"))
        assert key(one) == key(one) != key(other)

    def test_what_was_said_before_is_part_of_the_key(self) -> None:
        first, second = keys(SCOPE, talk(ANSWER, ANSWER))
        assert first == key(ANSWER)
        assert second not in (first, *keys(SCOPE, talk((TextBlock("Edited."),), ANSWER)))
        assert keys(SCOPE, [InputMessage("user", "Other."), InputMessage("assistant", ANSWER)]) != [first]
        as_system = [InputMessage("system", QUESTION[0].content), InputMessage("assistant", ANSWER)]
        assert keys(SCOPE, as_system) != [first]

    def test_strings_and_parts_of_an_answer_have_the_key_of_the_whole(self) -> None:
        blocks = [InputMessage("user", (TextBlock("Fix the bug."),)), InputMessage("assistant", ANSWER)]
        parts = [*QUESTION, InputMessage("assistant", "Do"), InputMessage("assistant", "ne.")]
        assert keys(SCOPE, blocks) == keys(SCOPE, parts) == [key(ANSWER)]

    def test_scopes_share_nothing(self) -> None:
        assert len({key(ANSWER, scope) for scope in (b"", b"a", b"b", b"ab")}) == 4

    def test_how_turns_are_spread_over_messages_makes_no_difference(self) -> None:
        result, words = ToolResultBlock("1", "r"), TextBlock("Go on.")
        one = [InputMessage("user", (result, words)), InputMessage("assistant", ANSWER)]
        two = [InputMessage("user", (result,)), InputMessage("user", "Go on."), InputMessage("assistant", ANSWER)]
        assert keys(SCOPE, one) == keys(SCOPE, two)

    def test_json_that_nests_too_deeply_has_no_key(self) -> None:
        deep: Json = {}
        for _ in range(50_000):
            deep = {"a": deep}
        log = ReplayLog()
        log.put(SCOPE, QUESTION, call(deep), sampled(1))
        assert log.recall(SCOPE, talk(call(deep), ANSWER)) == [None, None]


class TestRecord:
    @given(opening=st.text(), ids=st.lists(st.integers(0, 2**31 - 1)))
    def test_a_record_is_read_as_it_was_written(self, opening: str, ids: list[int]) -> None:
        if opening.isprintable():  # lone surrogates are no UTF-8
            assert as_tuple(unpack(pack(sampled(*ids, opening=opening)))) == (opening, ids)

    @given(st.binary(max_size=40))
    def test_any_other_bytes_are_no_record_or_a_whole_one(self, record: bytes) -> None:
        found = unpack(record)
        assert found is None or pack(found) == record


def look(log: ReplayLog, answer: Any, scope: bytes = SCOPE) -> RecordedAnswer | None:
    (found,) = log.recall(scope, talk(answer))
    return found


@pytest.fixture
def log(tmp_path: Path) -> Iterator[ReplayLog]:
    """A log with a store."""
    log = ReplayLog(tmp_path)
    yield log
    log.close()


class TestReplayLog:
    def test_a_turn_is_found_by_its_content_and_scope(self, log: ReplayLog) -> None:
        log.put(SCOPE, QUESTION, ANSWER, sampled(3, 4, opening="<think>\n"))
        assert as_tuple(look(log, (TextBlock("Done.\n"),))) == ("<think>\n", [3, 4])
        assert look(log, ANSWER, b"another") is None
        assert look(log, (TextBlock("Done!"),)) is None

    def test_of_two_turns_with_one_content_the_later_one_is_kept(self, log: ReplayLog, tmp_path: Path) -> None:
        log.put(SCOPE, QUESTION, ANSWER, sampled(1))
        log.put(SCOPE, QUESTION, ANSWER, sampled(2))
        assert as_tuple(look(log, ANSWER)) == ("", [2])
        log.flush()
        log.memory.clear()
        assert as_tuple(look(log, ANSWER)) == ("", [2])

    def test_without_a_store_the_oldest_turns_go(self) -> None:
        log = ReplayLog(memory_bytes=3 * 1024)
        for n in range(20):
            log.put(SCOPE, QUESTION, call({"n": n}), sampled(n))
        kept = [n for n in range(20) if look(log, call({"n": n}))]
        assert 1 <= len(kept) <= 6
        assert kept[-1] == 19
        log.put(SCOPE, QUESTION, ANSWER, sampled(*range(2000)))
        assert look(log, ANSWER) is None, "larger than the memory"

    def test_turns_outlive_the_process(self, tmp_path: Path) -> None:
        first = ReplayLog(tmp_path)
        first.put(SCOPE, QUESTION, ANSWER, sampled(5))
        first.close()
        second = ReplayLog(tmp_path)
        assert as_tuple(look(second, ANSWER)) == ("", [5])
        second.close()

    def test_turns_outlive_a_killed_process(self, tmp_path: Path) -> None:
        code = """
import signal, sys
from pathlib import Path
import numpy as np
from serve.api.messages import InputMessage, TextBlock
from serve.prompt.replay import ReplayLog, RecordedAnswer
log = ReplayLog(Path(sys.argv[1]))
question = [InputMessage("user", "Fix the bug.")]
log.put(b"key and model", question, [TextBlock("Done.")], RecordedAnswer("", np.arange(3, dtype=np.int32)))
log.writer.submit(int).result()  # after the record
print("ready", flush=True)
signal.pause()
"""
        with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            process.send_signal(signal.SIGKILL)
        log = ReplayLog(tmp_path)
        assert as_tuple(look(log, ANSWER)) == ("", [0, 1, 2])
        log.close()

    def test_what_waits_for_a_slow_disk_is_bounded_and_stays_in_memory(self, tmp_path: Path) -> None:
        lost, may_write = [], threading.Event()
        log = ReplayLog(tmp_path, queue_bytes=4000, on_lost=lambda: lost.append(1))
        assert log.disk is not None
        put_many = log.disk.put_many
        log.disk.put_many = lambda items: may_write.wait(30) and put_many(items)  # type: ignore[method-assign]
        for n in range(20):
            log.put(SCOPE, QUESTION, call({"n": n}), sampled(n))
            assert log.waiting_bytes <= 4000
        assert 0 < len(lost) < 20
        assert all(look(log, call({"n": n})) for n in range(20))
        may_write.set()
        log.flush()
        log.memory.clear()
        assert [n for n in range(20) if look(log, call({"n": n}))] == list(range(20 - len(lost)))
        log.close()

    def test_closing_ends_though_the_disk_hangs(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        log, may_write = ReplayLog(tmp_path), threading.Event()
        assert log.disk is not None
        log.disk.put_many = lambda items: may_write.wait(30)  # type: ignore[method-assign,assignment,return-value]
        log.put(SCOPE, QUESTION, ANSWER, sampled(1))
        log.close(seconds=0.05)
        (record,) = caplog.records
        assert re.fullmatch(r"sampled turns of \d+ bytes are not written: the disk hangs", record.getMessage())
        may_write.set()
        log.writer.thread.join(30)

    def test_a_damaged_record_is_a_miss(self, tmp_path: Path) -> None:
        log = ReplayLog(tmp_path)
        log.put(SCOPE, QUESTION, ANSWER, sampled(7, 8, 9))
        log.close()
        damaged = key(ANSWER)
        with lmdb.open(str(tmp_path / "replay" / RECORDS), max_dbs=2) as env:
            pages = env.open_db(b"pages")
            with env.begin(write=True) as txn:
                record = txn.get(damaged, db=pages)
                txn.put(damaged, record[:-1] + bytes([record[-1] ^ 1]), db=pages)
        again = ReplayLog(tmp_path)
        assert look(again, ANSWER) is None
        again.put(SCOPE, QUESTION, ANSWER, sampled(7, 8, 9))
        again.flush()
        again.memory.clear()
        assert as_tuple(look(again, ANSWER)) == ("", [7, 8, 9])
        again.close()

    def test_the_store_stays_within_its_budget(self, tmp_path: Path) -> None:
        log = ReplayLog(tmp_path, memory_bytes=1024, disk_bytes=2**20)
        for n in range(1000):
            log.put(SCOPE, QUESTION, call({"n": n}), sampled(*range(1000)))
        log.flush()
        assert log.disk is not None
        assert 0 < log.disk.stats().bytes <= 2**20
        assert look(log, call({"n": 999}))
        log.close()


class TestSignatures:
    def test_a_signature_fits_its_tokens_and_its_key_only(self) -> None:
        key, other = signing_key(None), signing_key(None)
        signature = sign(key, [1, 2])
        assert verify(key, np.asarray([1, 2], np.int32), signature)
        assert not verify(key, [1, 3], signature)
        assert not verify(other, [1, 2], signature)
        assert not any(verify(key, [1, 2], foreign) for foreign in ("", "c2ln", "é\ud800"))

    def test_the_key_belongs_to_the_store_and_only_its_owner_reads_it(self, log: ReplayLog, tmp_path: Path) -> None:
        key = signing_key(tmp_path)
        assert signing_key(tmp_path) == key
        path = tmp_path / "replay" / "signing.key"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert sorted(os.listdir(path.parent)) == ["signing.key", RECORDS]
        path.write_bytes(b"short")
        with pytest.raises(StoreError, match=r"signing\.key: found 5 bytes, expected a key of 32"):
            signing_key(tmp_path)

    def test_a_disk_without_room_for_the_key_costs_no_start(
        self, log: ReplayLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def full(file: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        assert signing_key(tmp_path) != signing_key(tmp_path)
        assert os.listdir(tmp_path / "replay") == [RECORDS]
        assert "signing.key cannot be written" in caplog.text
        assert "No space left on device" in caplog.text


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
class TestSessions:
    @pytest.mark.parametrize("thinking", [False, True])
    def test_every_prompt_extends_the_one_before_and_what_was_sampled(self, family: Family, thinking: bool) -> None:
        tokenizer, log, rng = tokenizer_of(family), ReplayLog(), random.Random(family.name)
        messages, previous, uncommon = list(OPENING), np.zeros(0, np.int32), 0
        for turn in range(30):
            request = sent(messages, thinking, turn)
            made = prompt(request, tokenizer, log.recall(SCOPE, request.messages))
            assert is_extension(made.tokens, previous), f"turn {turn}"
            answer = answer_of(turn, rng, thinking and family.thinks)
            ids = generated(answer, made.opening.endswith("<think>\n"), tokenizer)
            uncommon += not np.array_equal(ids, tokenizer.encode(write_turn(tokenizer.template.format, answer)))
            previous = np.concatenate([made.tokens, ids])
            log.put(SCOPE, request.messages, answer, RecordedAnswer(made.opening, ids))
            messages += [message("assistant", *back(answer)), *next_messages(turn, answer)]
        assert uncommon == 30, "no turn was sampled the way in which its text would be tokenised"

    @pytest.mark.parametrize("thinking", [False, True])
    def test_without_records_every_prompt_extends_the_one_before_up_to_its_opening(
        self, family: Family, thinking: bool
    ) -> None:
        tokenizer, rng = tokenizer_of(family), random.Random(family.name)
        messages, previous = list(OPENING), np.zeros(0, np.int32)
        for turn in range(30):
            made = prompt(sent(messages, thinking, turn), tokenizer)
            assert is_extension(made.tokens, previous), f"turn {turn}"
            *front, end = made.segments
            assert isinstance(end, str)
            assert made.opening is not None
            assert end.endswith(made.opening)
            kept = [*front, end.removesuffix(made.opening)]
            previous = np.concatenate([tokenizer.encode(p) if isinstance(p, str) else p for p in kept])
            answer = answer_of(turn, rng, thinking and family.thinks)
            messages += [message("assistant", *back(answer)), *next_messages(turn, answer)]

    def test_an_edited_turn_is_tokenised_afresh(self, family: Family) -> None:
        tokenizer, log, rng = tokenizer_of(family), ReplayLog(), random.Random(1)
        messages, ids = list(OPENING), [np.full(5, 7 + n, np.int32) for n in range(3)]
        for turn in (0, 1, 2):
            answer = answer_of(turn, rng, False)
            log.put(SCOPE, sent(messages, False, 0).messages, answer, RecordedAnswer("", ids[turn]))
            messages += [message("assistant", *back(answer)), *next_messages(turn, answer)]
        edited = json.loads(json.dumps(messages).replace("at the file, turn 1", "at the file. Edited."))

        def replayed(messages: list[Json]) -> list[list[int]]:
            request = sent(messages, False, 0)
            made = prompt(request, tokenizer, log.recall(SCOPE, request.messages))
            return [piece.tolist() for piece in made.segments if isinstance(piece, np.ndarray)]

        assert replayed(messages) == [piece.tolist() for piece in ids]
        assert replayed(edited) == [ids[0].tolist()]

    def test_the_same_words_sampled_twice_are_two_turns(self, family: Family) -> None:
        tokenizer, log = tokenizer_of(family), ReplayLog()
        messages, previous = list(OPENING), np.zeros(0, np.int32)
        for turn in range(4):
            request = sent(messages, turn % 2 == 0, turn)
            made = prompt(request, tokenizer, log.recall(SCOPE, request.messages))
            assert is_extension(made.tokens, previous)
            ids = np.arange(50 + turn, 60, dtype=np.int32)
            previous = np.concatenate([made.tokens, ids])
            log.put(SCOPE, request.messages, ANSWER, RecordedAnswer(made.opening, ids))
            messages += [message("assistant", text("Done.")), message("user", text("Again."))]

    def test_an_answer_that_the_client_continues_is_replayed(self, family: Family) -> None:
        tokenizer, log = tokenizer_of(family), ReplayLog()

        def made(*messages: Json) -> tuple[CountTokensRequest, Prompt]:
            request = sent(list(messages), False, 0)
            return request, prompt(request, tokenizer, log.recall(SCOPE, request.messages))

        question, rest = message("user", text("Write.")), np.asarray([42], np.int32)
        request, first = made(question)
        cut = np.asarray([40, 41], np.int32)
        log.put(SCOPE, request.messages, [TextBlock("One,")], RecordedAnswer(first.opening, cut))
        request, second = made(question, message("assistant", text("One,")))
        assert is_extension(second.tokens, np.concatenate([first.tokens, cut]))
        assert second.prefilled_answer_ids.tolist() == cut.tolist()
        whole = np.concatenate([second.prefilled_answer_ids, rest])
        log.put(SCOPE, request.messages, [TextBlock(" two.")], RecordedAnswer(second.opening, whole))
        # The client may join the two parts, in one block or in two, or send two messages.
        for answers in (
            [message("assistant", text("One, two."))],
            [message("assistant", text("One,"), text(" two."))],
            [message("assistant", text("One,")), message("assistant", text(" two."))],
        ):
            _, third = made(question, *answers, message("user", text("More.")))
            assert is_extension(third.tokens, np.concatenate([second.tokens, rest]))

    def test_an_answer_that_the_client_began_is_replayed(self, family: Family) -> None:
        tokenizer, log = tokenizer_of(family), ReplayLog()
        question, rest = message("user", text("Write.")), np.asarray([42], np.int32)
        request = sent([question, message("assistant", text("Begun "))], False, 0)
        made = prompt(request, tokenizer, log.recall(SCOPE, request.messages))
        assert made.prefilled_answer_ids.tolist() == tokenizer.encode("Begun ").tolist()
        log.put(
            SCOPE,
            request.messages,
            [TextBlock("well")],
            RecordedAnswer(made.opening, np.concatenate([made.prefilled_answer_ids, rest])),
        )
        request = sent([question, message("assistant", text("Begun well")), question], False, 0)
        after = prompt(request, tokenizer, log.recall(SCOPE, request.messages))
        assert is_extension(after.tokens, np.concatenate([made.tokens, rest]))
