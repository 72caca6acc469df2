import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.pool import PagePool, pages_for
from cache.radix_tree import RadixIndex, common_prefix

SALT = b""


def ids(text: str) -> np.ndarray:
    return np.array([ord(c) for c in text], np.int32)


def small_index(num_pages: int = 32, page_size: int = 4) -> RadixIndex:
    return RadixIndex(PagePool(num_pages), page_size)


def put(index: RadixIndex, text: str, salt: bytes = SALT) -> np.ndarray:
    """Insert `text` on pages of its own, which nobody but the tree holds afterwards."""
    pages = index.pool.allocate(pages_for(len(text), index.page_size))
    index.insert(ids(text), pages, salt)
    index.pool.release(pages)
    index.check()
    return pages


def matched(index: RadixIndex, text: str, salt: bytes = SALT) -> int:
    return index.match(ids(text), salt)[1]


def runs(index: RadixIndex) -> list[str]:
    return sorted("".join(map(chr, node.tokens)) for node in index.nodes())


@given(st.lists(st.integers(0, 1), max_size=12), st.lists(st.integers(0, 1), max_size=12))
def test_the_common_prefix_is_the_one_a_loop_finds(a, b):
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    assert common_prefix(np.array(a, np.int32), np.array(b, np.int32)) == length


def test_an_empty_index_matches_nothing():
    pages, length = small_index().match(ids("abc"), SALT)
    assert (len(pages), length) == (0, 0)


def test_a_match_may_end_inside_a_page():
    index = small_index()
    pages = put(index, "abcdefgh")
    found, length = index.match(ids("abcdefXX"), SALT)
    assert length == 6
    assert found.tolist() == pages.tolist()


def test_a_sequence_inserted_chunk_by_chunk_is_one_node():
    index = small_index()
    text = "abcdefghijklmn"
    pages = index.pool.allocate(4)
    for end in (1, 2, 5, 8, 11, 14):
        index.insert(ids(text[:end]), pages[: pages_for(end, 4)], SALT)
        index.check()
    assert runs(index) == [text]
    assert index.match(ids(text), SALT)[0].tolist() == pages.tolist()
    assert index.pool.ref_counts[pages].tolist() == [2, 2, 2, 2]


def test_a_branch_inside_a_page_has_its_own_page_for_that_slot():
    index = small_index()
    first, second = put(index, "abcdefgh"), put(index, "abcdefXYZ")
    assert runs(index) == ["XYZ", "abcdef", "gh"]
    assert index.match(ids("abcdefgh"), SALT)[0].tolist() == first.tolist()
    assert index.match(ids("abcdefXYZ"), SALT)[0].tolist() == [first[0], second[1], second[2]]


def test_a_match_that_ends_where_an_inner_node_ends_finds_the_shared_tokens_in_a_childs_page():
    index = small_index()
    first, second = put(index, "abcdefgh"), put(index, "abcdefXYZ")
    found, length = index.match(ids("abcdefQ"), SALT)
    assert length == 6
    assert found[0] == first[0]
    assert found[1] in (first[1], second[1])


def test_branches_within_one_page_nest():
    index = small_index()
    for text in ("abcd", "abce", "abX", "aY", "abceZ"):
        put(index, text)
    assert [matched(index, text) for text in ("abcd", "abce", "abX", "aY", "abceZ", "abcQ")] == [4, 4, 3, 2, 5, 3]


def test_what_is_cached_already_keeps_its_pages():
    index = small_index()
    first = put(index, "abcdefgh")
    again = put(index, "abcdefgh")
    assert index.match(ids("abcdefgh"), SALT)[0].tolist() == first.tolist()
    assert not index.pool.ref_counts[again].any()


def test_salts_do_not_see_each_other():
    index = small_index()
    put(index, "abcd", b"one")
    assert matched(index, "abcd", b"two") == 0
    put(index, "abcd", b"two")
    assert runs(index) == ["abcd", "abcd"]


def test_a_long_leaf_is_evicted_from_its_tail_page_by_page():
    index = small_index()
    put(index, "abcdefghijklmn")
    for left in (12, 8, 4, 0):
        assert index.evict(1) == 1
        index.check()
        assert matched(index, "abcdefghijklmn") == left
    assert index.evict(1) == 0
    assert index.evicted_pages == 4
    assert not index.top.children


def test_the_least_recently_used_leaf_goes_first():
    index = small_index()
    for text in ("aaaa", "bbbb", "cccc"):
        put(index, text)
    matched(index, "aaaa")
    index.evict(2)
    assert runs(index) == ["aaaa"]


def test_a_parent_becomes_a_leaf_when_its_last_child_is_evicted():
    index = small_index()
    for text in ("abcdefgh", "abcdefXYZ", "abcdefgQ"):
        put(index, text)
    assert index.evict(4) == 4
    index.check()
    assert runs(index) == ["abcd"]
    put(index, "abcdQ")
    assert runs(index) == ["abcdQ"]


def test_evicting_one_branch_leaves_the_other_whole():
    index = small_index()
    put(index, "abcdefgh")
    put(index, "abcdefXYZ")
    matched(index, "abcdefXYZ")
    index.evict(1)
    index.check()
    assert matched(index, "abcdefXYZ") == 9
    assert matched(index, "abcdefgh") == 6


def test_a_page_in_use_stops_eviction_of_itself_and_of_what_comes_before():
    index = small_index()
    pages = put(index, "abcdefghijklmn")
    put(index, "other")
    index.pool.retain(pages[1:2])
    assert index.evict(100) == 4
    index.check()
    assert runs(index) == ["abcdefgh"]
    assert index.evict(1) == 0
    index.pool.release(pages[1:2])
    assert index.evict(100) == 2


def test_dropping_from_a_page_on_takes_all_that_goes_on_as_the_sequence_does():
    index = small_index()
    for text in ("abcdefghij", "abcdefXY", "abcdXY", "other"):
        put(index, text)
    dropped = index.drop(ids("abcdefghij"), 4, SALT)
    index.check()
    assert sorted("".join(map(chr, sequence)) for sequence in dropped) == ["abcdefXY", "abcdefghij"]
    assert runs(index) == ["XY", "abcd", "other"]
    assert matched(index, "abcdefghij") == 4
    assert index.pool.free_pages == 32 - 4


def test_dropping_from_token_zero_leaves_other_sequences_and_salts():
    index = small_index()
    for salt in (b"one", b"two"):
        put(index, "abcdefgh", salt)
    assert [len(sequence) for sequence in index.drop(ids("ab"), 0, b"one")] == [8]
    index.check()
    assert matched(index, "abcdefgh", b"one") == 0
    assert matched(index, "abcdefgh", b"two") == 8
    put(index, "abcd", b"one")


def test_dropping_what_is_not_there_changes_nothing():
    index = small_index()
    put(index, "abcdef")
    assert index.drop(ids("abcdef"), 8, SALT) == []
    assert index.drop(ids("abcdXf"), 4, SALT) == []
    assert index.drop(ids("abcdef"), 0, b"another") == []
    assert matched(index, "abcdef") == 6
    index.check()


def test_what_drops_its_end_is_evicted_like_any_other_leaf():
    index = small_index()
    put(index, "abcdefgh")
    index.drop(ids("abcdefgh"), 4, SALT)
    assert index.evict(10) == 1
    index.check()
    assert index.pool.free_pages == 32


def test_a_dropped_page_in_use_stays_with_its_user():
    index = small_index()
    pages = put(index, "abcdefgh")
    index.pool.retain(pages)
    index.drop(ids("abcdefgh"), 0, SALT)
    index.check()
    assert index.pool.ref_counts[pages].tolist() == [1, 1]


def test_to_find_a_prefix_is_no_use_of_it():
    index = small_index()
    for text in ("aaaa", "bbbb"):
        put(index, text)
    assert index.find(ids("aaaa"), SALT)[1] == 4
    index.evict(1)
    assert runs(index) == ["bbbb"]


def test_leaves_in_use_are_looked_at_once_per_eviction(monkeypatch):
    index = small_index(num_pages=100, page_size=8)
    for n in range(50):
        index.pool.retain(put(index, f"{n:02} used"))
    for n in range(50):
        put(index, f"{n:02} idle"[::-1])
    looks = []
    trim = index._trim
    monkeypatch.setattr(index, "_trim", lambda leaf, wanted: looks.append(leaf) or trim(leaf, wanted))
    assert index.evict(5) == 5
    assert len(looks) == len(set(looks)) == 55


@settings(max_examples=60)
@given(
    page_size=st.integers(1, 4),
    texts=st.lists(st.text("ab", min_size=1, max_size=9), min_size=1, max_size=12),
    evictions=st.lists(st.integers(0, 3), min_size=12, max_size=12),
)
def test_any_mix_of_insertions_and_evictions_keeps_the_invariants(page_size, texts, evictions):
    index = small_index(num_pages=120, page_size=page_size)
    for text, evicted in zip(texts, evictions, strict=False):
        put(index, text)
        assert matched(index, text) == len(text)
        before = index.idle_pages()
        assert index.evict(evicted) == min(evicted, before)
        index.check()
    index.evict(120)
    assert index.pool.free_pages == 120
