"""Keys: their file, who is admitted, how much at a time, and how those who guess are slowed."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path

import pytest

from serve.api.messages import InvalidRequest
from serve.server.config import ServerConfig, parser, problem_of
from serve.web.keys import (
    FIRST_DELAY,
    FORGET_SECONDS,
    FREE_WRONG_KEYS,
    MOST_DELAY,
    Admission,
    Key,
    Keys,
    LimitReached,
    Usage,
    WrongKeys,
    open_keys,
    private_salt,
    read_keys,
)
from serve.web.settings import read_config


def hashed(secret: str) -> str:
    return "sha256:" + hashlib.sha256(secret.encode()).hexdigest()


ALICE, BOB = hashed("alice's"), hashed("bob's")


def written(folder: Path, *lines: str) -> Path:
    path = folder / "keys"
    path.write_text("\n".join(lines))
    return path


class TestFile:
    def test_a_line_has_a_name_a_hash_and_limits(self, tmp_path: Path) -> None:
        path = written(
            tmp_path, "# people", "", f"alice {ALICE} requests=8 tokens=200000 rate=60 # a", f"ops {BOB} admin"
        )
        assert read_keys(path) == (
            Key("alice", hashlib.sha256(b"alice's").digest(), False, 8, 200_000, 60),
            Key("ops", hashlib.sha256(b"bob's").digest(), admin=True),
        )

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ("alice", "key of alice: expected sha256: and 64 hexadecimal digits, found nothing"),
            (
                "alice my-secret-key",
                "key of alice: expected sha256: and 64 hexadecimal digits, found 13 other characters",
            ),
            (f"alice {ALICE[:-1]}", "found 70 other characters"),
            (f"a/b {ALICE}", "name: expected up to 64 letters, digits, dots, @, _ or -, found 'a/b'"),
            (f"{'a' * 65} {ALICE}", "name: expected up to 64"),
            (
                f"alice {ALICE} speed=1",
                "limits of alice: expected requests=NUMBER, tokens=NUMBER, rate=NUMBER, priority=NAME or admin, found",
            ),
            (f"alice {ALICE} requests", "found 'requests'"),
            (f"alice {ALICE} requests=0", "requests: expected 1 to 1000000000000, found '0'"),
            (f"alice {ALICE} rate=-1", "rate: expected 1 to"),
            (f"alice {ALICE} rate=1e3", "rate: expected 1 to"),
            (f"alice {ALICE} rate=١", "rate: expected 1 to"),
            (f"alice {ALICE} tokens={'9' * 5000}", "tokens: expected 1 to"),
            (f"alice {ALICE} rate=1 rate=2", "rate is given twice"),
            (f"alice {ALICE} priority=low", "priority of alice: expected interactive or background, found 'low'"),
            (f"alice {ALICE} priority=background priority=background", "priority is given twice"),
            (f"bob {ALICE}", "the name bob is given twice"),
            (f"carol {BOB}", "the hash is that of line 1: give each name a key of its own"),
        ],
    )
    def test_a_bad_line_is_named_with_its_number_and_without_the_secret(
        self, line: str, problem: str, tmp_path: Path
    ) -> None:
        path = written(tmp_path, f"bob {BOB}", "# and", line)
        with pytest.raises(ValueError, match=re.escape(f"{path}:3: ")) as error:
            read_keys(path)
        assert problem in str(error.value)
        assert "my-secret" not in str(error.value)

    @pytest.mark.parametrize(
        ("flags", "problem"),
        [
            (["--api-key", "k"], "--api-key-file: found an --api-key as well"),
            (["--host", "0.0.0.0"], None),
            ([], None),
        ],
    )
    def test_the_flags_of_keys_are_checked_at_the_start(
        self, flags: list[str], problem: str | None, tmp_path: Path
    ) -> None:
        path = written(tmp_path, f"bob {BOB}")
        config = read_config(ServerConfig, parser().parse_args(["--model", "m", "--api-key-file", str(path), *flags]))
        found = problem_of(config)
        assert (found is None) if problem is None else problem in (found or "")
        path.write_text("nonsense")
        assert "--api-key-file" in (problem_of(config) or "")
        path.unlink()
        assert "--api-key-file" in (problem_of(config) or "")

    def test_a_wrong_file_leaves_the_old_keys_in_force_and_a_right_one_replaces_them(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = written(tmp_path, f"alice {ALICE} requests=1")
        keys = open_keys(None, path)
        assert keys
        admission = keys.admit(keys.keys[0])
        path.write_text(f"alice {ALICE}\nbob nonsense")
        keys.reload()
        assert f"{path}:2: key of bob" in caplog.text
        assert name_of(keys, b"alice's") == "alice"
        path.write_text(f"alice {hashed('new')} requests=1\nbob {BOB}")
        keys.reload()
        assert [name_of(keys, secret) for secret in (b"alice's", b"new", b"bob's")] == [None, "alice", "bob"]
        with pytest.raises(LimitReached):
            keys.admit(keys.keys[0])  # the request under her old key is still hers
        path.write_text(f"bob {BOB}")
        keys.reload()
        admission.end()
        keys.reload()
        assert set(keys.usages) == {"bob"}


def name_of(keys: Keys, secret: bytes) -> str | None:
    found = keys.find({b"x-api-key": secret})
    return found and found.name


class TestFinding:
    @pytest.mark.parametrize(
        ("headers", "name"),
        [
            ({b"x-api-key": b"alice's"}, "alice"),
            ({b"authorization": b"Bearer alice's"}, "alice"),
            ({b"authorization": b"bearer  alice's"}, "alice"),
            ({b"x-api-key": b"other", b"authorization": b"Bearer alice's"}, "alice"),
            ({b"x-api-key": b"alice's "}, None),
            ({b"x-api-key": ALICE.encode()}, None),
            ({b"authorization": b"Basic alice's"}, None),
            ({b"x-api-key": b""}, None),
            ({}, None),
            ({b"x-api-key": b"\xff\x00"}, None),
        ],
    )
    def test_a_key_is_found_in_either_header(
        self, headers: dict[bytes, bytes], name: str | None, tmp_path: Path
    ) -> None:
        keys = Keys(read_keys(written(tmp_path, f"alice {ALICE}", f"bob {BOB}")))
        found = keys.find(headers)
        assert (found and found.name) == name

    def test_no_salt_that_a_client_can_name_is_that_of_a_key(self) -> None:
        salts = [private_salt(name, salt) for name in ("a", "a.b", "b") for salt in (b"", b"a", b"b", b"\xc3\xa9")]
        assert len(set(salts)) == len(salts)
        assert all(b"\0" in salt for salt in salts)


class TestLimits:
    def key(self, **limits: int) -> Key:
        return Key("alice", b"", **limits)

    def test_requests_in_flight_end_and_leave_room_for_others(self) -> None:
        usage, key = Usage(), self.key(requests=2)
        first, _ = (Admission(key, usage, 0.0) for _ in range(2))
        with pytest.raises(LimitReached, match="'alice' has 2 requests in flight, and may have 2"):
            Admission(key, usage, 0.0)
        first.end()
        Admission(key, usage, 0.0)
        assert (usage.totals["requests"], usage.totals["refused_requests"]) == (3, 1)

    def test_tokens_in_flight_are_given_back(self) -> None:
        usage, key = Usage(), self.key(tokens=100)
        first, second = (Admission(key, usage, 0.0) for _ in range(2))
        first.take(60)
        with pytest.raises(LimitReached, match="60 tokens in flight and may have 100: a request of 41"):
            second.take(41)
        with pytest.raises(
            InvalidRequest, match="'alice' may have 100 tokens in flight, prompt and max_tokens are 101"
        ):
            second.take(101)
        second.end()
        first.end()
        assert (usage.requests, usage.tokens) == (0, 0)

    @pytest.mark.parametrize("start", [0.0, 1e6 / 3, 1e9 + 0.7])
    @pytest.mark.parametrize("rate", [1, 7, 60])
    def test_a_minute_has_so_many_requests_and_they_come_back_evenly(self, rate: int, start: float) -> None:
        usage, key = Usage(), self.key(rate=rate)
        for _ in range(rate):
            Admission(key, usage, start).end()
        with pytest.raises(LimitReached) as reached:
            Admission(key, usage, start)
        assert 1 <= reached.value.retry_s <= 60 // rate + 1
        Admission(key, usage, start + 60 / rate + 1e-3).end()
        with pytest.raises(LimitReached):
            Admission(key, usage, start + 60 / rate + 2e-3)


class TestWrongKeys:
    def test_an_address_that_guesses_waits_longer_and_longer_and_others_do_not(self) -> None:
        wrong = WrongKeys()
        delays = [wrong.delay("10.0.0.1", 0.0) for _ in range(FREE_WRONG_KEYS + 12)]
        assert delays[:FREE_WRONG_KEYS] == [0.0] * FREE_WRONG_KEYS
        assert delays[FREE_WRONG_KEYS] == FIRST_DELAY
        assert delays == sorted(delays)
        assert delays[-1] == MOST_DELAY
        assert wrong.delay("10.0.0.2", 0.0) == 0
        assert wrong.delay("10.0.0.1", FORGET_SECONDS + 1) == 0

    def test_the_log_grows_slowly_and_memory_is_bounded(self, caplog: pytest.LogCaptureFixture) -> None:
        wrong = WrongKeys()
        with caplog.at_level(logging.WARNING):
            for _ in range(1000):
                wrong.delay("10.0.0.1", 0.0)
        assert len(caplog.records) == 10
        caplog.set_level(logging.ERROR)
        for number in range(10_000):
            wrong.delay(f"10.0.{number}", 0.0)
        assert wrong.counts.bytes <= wrong.counts.most_bytes
