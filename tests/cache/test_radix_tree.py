"""The radix tree: matches, splits, eviction, and the invariants after every step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.pool import PagePool, pages_for
from cache.radix_tree import RadixTree, common_prefix

SALT = b""


def ids(text: str) -> np.ndarray:
    return np.array([ord(c) for c in text], np.int32)


def small_tree(num_pages: int = 32, page_size: int = 4) -> RadixTree:
    return RadixTree(PagePool(num_pages), page_size)


def put(tree: RadixTree, text: str, salt: bytes = SALT, head: int = 0) -> np.ndarray:
    """Insert `text` on pages of its own, which nobody but the tree holds afterwards."""
    pages = tree.pool.allocate(pages_for(len(text), tree.page_size))
    tree.insert(ids(text), pages, salt, head)
    tree.pool.release(pages)
    tree.check()
    return pages


def matched(tree: RadixTree, text: str, salt: bytes = SALT, head: int = 0) -> int:
    return tree.match(ids(text), salt, head)[1]


def runs(tree: RadixTree) -> list[str]:
    return sorted("".join(map(chr, node.tokens)) for node in tree.nodes())


@given(st.lists(st.integers(0, 1), max_size=12), st.lists(st.integers(0, 1), max_size=12))
def test_the_common_prefix_is_the_one_a_loop_finds(a, b):
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    assert common_prefix(np.array(a, np.int32), np.array(b, np.int32)) == length


def test_an_empty_index_matches_nothing() -> None:
    pages, length = small_tree().match(ids("abc"), SALT)
    assert (len(pages), length) == (0, 0)


def test_a_match_may_end_inside_a_page() -> None:
    tree = small_tree()
    pages = put(tree, "abcdefgh")
    found, length = tree.match(ids("abcdefXX"), SALT)
    assert length == 6
    assert found.tolist() == pages.tolist()


def test_a_sequence_inserted_chunk_by_chunk_is_one_node() -> None:
    tree = small_tree()
    text = "abcdefghijklmn"
    pages = tree.pool.allocate(4)
    for end in (1, 2, 5, 8, 11, 14):
        tree.insert(ids(text[:end]), pages[: pages_for(end, 4)], SALT)
        tree.check()
    assert runs(tree) == [text]
    assert tree.match(ids(text), SALT)[0].tolist() == pages.tolist()
    assert tree.pool.ref_counts[pages].tolist() == [2, 2, 2, 2]


def test_a_branch_inside_a_page_has_its_own_copy_of_that_page() -> None:
    tree = small_tree()
    first, second = put(tree, "abcdefgh"), put(tree, "abcdefXYZ")
    assert runs(tree) == ["XYZ", "abcdef", "gh"]
    assert tree.match(ids("abcdefgh"), SALT)[0].tolist() == first.tolist()
    assert tree.match(ids("abcdefXYZ"), SALT)[0].tolist() == [first[0], second[1], second[2]]


def test_a_match_that_ends_where_an_inner_node_ends_finds_the_shared_tokens_in_a_childs_page() -> None:
    tree = small_tree()
    first, second = put(tree, "abcdefgh"), put(tree, "abcdefXYZ")
    found, length = tree.match(ids("abcdefQ"), SALT)
    assert length == 6
    assert found[0] == first[0]
    assert found[1] in (first[1], second[1])


def test_branches_within_one_page_nest() -> None:
    tree = small_tree()
    for text in ("abcd", "abce", "abX", "aY", "abceZ"):
        put(tree, text)
    assert [matched(tree, text) for text in ("abcd", "abce", "abX", "aY", "abceZ", "abcQ")] == [4, 4, 3, 2, 5, 3]


def test_what_is_cached_already_keeps_its_pages() -> None:
    tree = small_tree()
    first = put(tree, "abcdefgh")
    again = put(tree, "abcdefgh")
    assert tree.match(ids("abcdefgh"), SALT)[0].tolist() == first.tolist()
    assert not tree.pool.ref_counts[again].any()


def test_salts_do_not_see_each_other() -> None:
    tree = small_tree()
    put(tree, "abcd", b"one")
    assert matched(tree, "abcd", b"two") == 0
    put(tree, "abcd", b"two")
    assert runs(tree) == ["abcd", "abcd"]


def test_a_long_leaf_is_evicted_from_its_tail_page_by_page() -> None:
    tree = small_tree()
    put(tree, "abcdefghijklmn")
    for left in (12, 8, 4, 0):
        assert tree.evict(1) == 1
        tree.check()
        assert matched(tree, "abcdefghijklmn") == left
    assert tree.evict(1) == 0
    assert tree.evicted_pages == 4
    assert not tree.top.children


def test_the_least_recently_used_leaf_goes_first() -> None:
    tree = small_tree()
    for text in ("aaaa", "bbbb", "cccc"):
        put(tree, text)
    matched(tree, "aaaa")
    tree.evict(2)
    assert runs(tree) == ["aaaa"]


def test_a_parent_becomes_a_leaf_when_its_last_child_is_evicted() -> None:
    tree = small_tree()
    for text in ("abcdefgh", "abcdefXYZ", "abcdefgQ"):
        put(tree, text)
    assert tree.evict(4) == 4
    tree.check()
    assert runs(tree) == ["abcd"]
    put(tree, "abcdQ")
    assert runs(tree) == ["abcdQ"]


def test_evicting_one_branch_leaves_the_other_whole() -> None:
    tree = small_tree()
    put(tree, "abcdefgh")
    put(tree, "abcdefXYZ")
    matched(tree, "abcdefXYZ")
    tree.evict(1)
    tree.check()
    assert matched(tree, "abcdefXYZ") == 9
    assert matched(tree, "abcdefgh") == 6


def test_a_page_in_use_stops_eviction_of_itself_and_of_what_comes_before() -> None:
    tree = small_tree()
    pages = put(tree, "abcdefghijklmn")
    put(tree, "other")
    tree.pool.retain(pages[1:2])
    assert tree.evict(100) == 4
    tree.check()
    assert runs(tree) == ["abcdefgh"]
    assert tree.evict(1) == 0
    tree.pool.release(pages[1:2])
    assert tree.evict(100) == 2


def test_dropping_from_a_page_on_takes_all_that_goes_on_as_the_sequence_does() -> None:
    tree = small_tree()
    for text in ("abcdefghij", "abcdefXY", "abcdXY", "other"):
        put(tree, text)
    dropped = tree.drop(ids("abcdefghij"), 4, SALT)
    tree.check()
    assert sorted("".join(map(chr, sequence.tokens)) for sequence in dropped) == ["abcdefXY", "abcdefghij"]
    assert runs(tree) == ["XY", "abcd", "other"]
    assert matched(tree, "abcdefghij") == 4
    assert tree.pool.free_pages == 32 - 4


def test_dropping_from_token_zero_leaves_other_sequences_and_salts() -> None:
    tree = small_tree()
    for salt in (b"one", b"two"):
        put(tree, "abcdefgh", salt)
    assert [len(sequence.tokens) for sequence in tree.drop(ids("ab"), 0, b"one")] == [8]
    tree.check()
    assert matched(tree, "abcdefgh", b"one") == 0
    assert matched(tree, "abcdefgh", b"two") == 8
    put(tree, "abcd", b"one")


def test_salts_share_a_head_and_not_a_token_after_it() -> None:
    tree = small_tree()
    put(tree, "HEADabcdef", b"one", 4)
    assert matched(tree, "HEADabcdef", b"two", 4) == 4
    assert matched(tree, "HEADabcdef", b"one", 4) == 10
    assert matched(tree, "HEADabcdef", b"one") == 0, "not below a salt's own root"
    pages = put(tree, "HEADabcdef", b"two", 4)
    assert matched(tree, "HEADabcdef", b"two", 4) == 10
    assert tree.match(ids("HEADabcdef"), b"two", 4)[0][1:].tolist() == pages[1:].tolist()
    assert tree.pool.free_pages == 32 - 5, "the head is there once"


def test_a_head_that_begins_another_is_shared_up_to_its_own_end() -> None:
    tree = small_tree()
    put(tree, "HEADMOREabcd", b"one", 8)
    put(tree, "HEADMORExyz", b"two", 4)
    assert matched(tree, "HEADMOREabcd", b"two", 4) == 8, "its own"
    assert matched(tree, "HEADMOREabcd", b"three", 4) == 4
    assert matched(tree, "HEADMOREabcd", b"three", 8) == 8
    assert matched(tree, "HEADMOREabcd", b"one", 8) == 12


def test_a_head_is_evicted_after_what_comes_after_it_and_before_that_never() -> None:
    tree = small_tree()
    put(tree, "HEADabcd", b"one", 4)
    put(tree, "HEADefgh", b"two", 4)
    for left in (["HEAD", "efgh"], ["HEAD"], []):
        assert tree.evict(1) == 1
        tree.check()
        assert runs(tree) == left
    assert not tree.top.children
    assert tree.pool.free_pages == 32


def test_dropping_within_a_head_takes_what_all_salts_have_after_it_and_says_whose_it_is() -> None:
    tree = small_tree()
    put(tree, "HEADMOREabcd", b"one", 8)
    put(tree, "HEADMOREefgh", b"two", 8)
    put(tree, "HEADelse", b"two", 4)
    dropped = tree.drop(ids("HEADMOREabcd"), 4, b"one", 8)
    tree.check()
    assert sorted(("".join(map(chr, each.tokens)), each.salt, each.head) for each in dropped) == [
        ("HEADMOREabcd", b"one", 8),
        ("HEADMOREefgh", b"two", 8),
    ]
    assert matched(tree, "HEADelse", b"two", 4) == 8
    after = tree.drop(ids("HEADelse"), 4, b"two", 4)
    tree.check()
    assert [(each.salt, each.head) for each in after] == [(b"two", 4)]
    assert runs(tree) == ["HEAD"]
    assert tree.evict(9) == 1
    assert tree.pool.free_pages == 32


def test_dropping_what_is_not_there_changes_nothing() -> None:
    tree = small_tree()
    put(tree, "abcdef")
    assert tree.drop(ids("abcdef"), 8, SALT) == []
    assert tree.drop(ids("abcdXf"), 4, SALT) == []
    assert tree.drop(ids("abcdef"), 0, b"another") == []
    assert matched(tree, "abcdef") == 6
    tree.check()


def test_what_drops_its_end_is_evicted_like_any_other_leaf() -> None:
    tree = small_tree()
    put(tree, "abcdefgh")
    tree.drop(ids("abcdefgh"), 4, SALT)
    assert tree.evict(10) == 1
    tree.check()
    assert tree.pool.free_pages == 32


def test_a_dropped_page_in_use_stays_with_its_user() -> None:
    tree = small_tree()
    pages = put(tree, "abcdefgh")
    tree.pool.retain(pages)
    tree.drop(ids("abcdefgh"), 0, SALT)
    tree.check()
    assert tree.pool.ref_counts[pages].tolist() == [1, 1]


def test_to_find_a_prefix_is_no_use_of_it() -> None:
    tree = small_tree()
    for text in ("aaaa", "bbbb"):
        put(tree, text)
    assert tree.find(ids("aaaa"), SALT)[1] == 4
    tree.evict(1)
    assert runs(tree) == ["bbbb"]


def test_leaves_in_use_are_looked_at_once_per_eviction(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = small_tree(num_pages=100, page_size=8)
    for n in range(50):
        tree.pool.retain(put(tree, f"{n:02} used"))
    for n in range(50):
        put(tree, f"{n:02} idle"[::-1])
    looks = []
    trim = tree._trim
    monkeypatch.setattr(tree, "_trim", lambda leaf, wanted: looks.append(leaf) or trim(leaf, wanted))
    assert tree.evict(5) == 5
    assert len(looks) == len(set(looks)) == 55


@settings(max_examples=60)
@given(
    page_size=st.integers(1, 4),
    texts=st.lists(st.text("ab", min_size=1, max_size=9), min_size=1, max_size=12),
    evictions=st.lists(st.integers(0, 3), min_size=12, max_size=12),
)
def test_any_mix_of_insertions_and_evictions_keeps_the_invariants(page_size, texts, evictions):
    tree = small_tree(num_pages=120, page_size=page_size)
    for text, evicted in zip(texts, evictions, strict=False):
        put(tree, text)
        assert matched(tree, text) == len(text)
        before = tree.idle_pages()
        assert tree.evict(evicted) == min(evicted, before)
        tree.check()
    tree.evict(120)
    assert tree.pool.free_pages == 120
