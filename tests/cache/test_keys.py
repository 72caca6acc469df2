"""The keys of pages: what they cover, and that they never change between versions."""

import os
import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cache.keys import PageChain, all_keys, page_keys, root_key, tail_key

token_lists = st.lists(st.integers(0, 1), max_size=20)


def keys_of(tokens, fingerprint=b"model", page_size=2, salt=b"") -> list[bytes]:
    return page_keys(root_key(fingerprint, page_size, salt), np.array(tokens, np.int32), page_size)


def test_only_full_pages_have_keys() -> None:
    assert [len(keys_of([7] * n)) for n in range(6)] == [0, 0, 1, 1, 2, 2]
    assert all(len(key) == 32 for key in keys_of([1, 2, 3, 4]))


def test_keys_differ_by_every_ingredient() -> None:
    base = keys_of([1, 2])[0]
    others = [
        keys_of([1, 2], fingerprint=b"other")[0],
        keys_of([1, 2], salt=b"tenant")[0],
        keys_of([1, 2], page_size=1)[-1],
        keys_of([1, 3])[0],
        keys_of([9, 9, 1, 2])[1],
    ]
    assert len({base, *others}) == 6


def test_fingerprint_and_salt_cannot_trade_bytes() -> None:
    assert root_key(b"ab", 4, b"c") != root_key(b"a", 4, b"bc")


def test_keys_do_not_depend_on_the_byte_order_or_width_of_the_token_array() -> None:
    tokens = [1, 258, 70_000, 2**31 - 1]
    root = root_key(b"", 2, b"")
    assert len({tuple(page_keys(root, np.array(tokens, kind), 2)) for kind in ("<i4", ">i4", "i8")}) == 1


def test_keys_are_the_same_in_another_process_with_another_hash_seed() -> None:
    program = (
        "import numpy as np; from cache.keys import *;"
        "print(*[k.hex() for k in page_keys(root_key(b'model', 2, b''), np.arange(6), 2)])"
    )
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        )
        assert run.stdout.decode().split() == [key.hex() for key in keys_of(range(6))]


def test_keys_are_the_ones_that_earlier_versions_wrote_to_disk() -> None:
    assert keys_of([1, 2])[0].hex() == "8320019aeecaef76a5729c456877de94a235e4762abdb2f6e86c3ecf80a6389d"


@given(token_lists, token_lists)
def test_two_sequences_share_exactly_the_keys_of_their_common_full_pages(a, b):
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    keys_a, keys_b = keys_of(a), keys_of(b)
    assert keys_a[: common // 2] == keys_b[: common // 2]
    assert len(set(keys_a) & set(keys_b)) == common // 2


@given(token_lists, st.integers(1, 4), st.integers(0, 3))
def test_all_keys_are_those_of_the_pages_and_of_every_tail_that_may_lie_in_one(tokens, page_size, page):
    start = page * page_size
    root, tokens = root_key(b"model", page_size, b""), np.array(tokens, np.int32)
    found = all_keys(root, tokens, page_size, start)
    wanted = []
    for stop in range(start + 1, len(tokens) + 1):  # each sequence that may have ended within these tokens
        full = page_keys(root, tokens[:stop], page_size)
        at = len(full) * page_size
        wanted.append(full[-1] if at == stop else tail_key(full[-1] if full else root, tokens[at:stop]))
    assert sorted(found) == sorted(wanted)


@given(token_lists, st.integers(1, 4), st.integers(0, 3))
def test_all_keys_of_a_chain_are_those_also_where_a_head_ends(tokens, page_size, page):
    tokens, chain = np.array(tokens, np.int32), PageChain(b"model", page_size, b"s", 2 * page_size)
    wanted = []
    for stop in range(page * page_size + 1, len(tokens) + 1):
        keys = chain.keys(tokens[:stop])
        at = len(keys) * page_size
        wanted.append(keys[-1] if at == stop else tail_key(chain.parent(keys, len(keys)), tokens[at:stop]))
    assert sorted(chain.all_keys(tokens, page * page_size)) == sorted(wanted)


@given(token_lists, st.sampled_from([b"", b"s"]))
def test_without_a_head_a_chain_has_the_keys_of_its_salt(tokens, salt):
    tokens = np.array(tokens, np.int32)
    assert PageChain(b"model", 2, salt).keys(tokens) == page_keys(root_key(b"model", 2, salt), tokens, 2)


@given(token_lists, st.integers(0, 4), st.integers(0, 4))
def test_salts_share_the_keys_of_their_heads_and_no_others(tokens, head, other):
    tokens = np.array(tokens, np.int32)
    one, two, none = (
        PageChain(b"model", 2, salt, 2 * pages).keys(tokens)
        for salt, pages in ((b"one", head), (b"two", other), (b"", 0))
    )
    shared = min(head, other, len(tokens) // 2)
    assert one[:shared] == two[:shared]
    assert len(set(one) & set(two)) == shared
    assert not set(one + two) & set(none), "nor those of requests without a salt"


def test_the_keys_after_a_head_never_change_between_versions() -> None:
    assert (
        PageChain(b"model", 2, b"s", 2).keys(np.arange(4))[1].hex()
        == "23409d4e025a49c8147aae6035f3c733e2b0ab1feb41d526c7c749269598c988"
    )
