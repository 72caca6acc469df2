"""The radix tree over token ids: the longest cached prefix, token by token, and what to evict when pages run short.

It holds one reference to each page it lists. Leases belong to the prefix cache, requests and device copies to the
engine.

A node is a run of tokens that may start and end inside a page. Each page belongs to exactly one node, the deepest that
reaches into it. A leaf lists its pages from the one it starts in to the one it ends in. An inner node that ends inside
a page does not list that page: each of its children has its own copy, which holds the ancestors' tokens too. So the
block table of a path is its nodes' pages joined, and a page is in use if its reference count is above one.

Below a root for each salt are its sequences. Those that share a head with other salts begin below the root of
HEAD_SALT. Where their head ends, with a page, a node without tokens for each salt holds what comes after it.
"""

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from cache.journal import Journal, Listed
from cache.keys import HEAD_SALT
from cache.pool import PagePool, pages_for

NO_TOKENS = np.zeros(0, np.int32)  # [0] int32
NO_PAGES = np.zeros(0, np.int32)  # [0] int32


@dataclass(slots=True, eq=False)
class Node:
    """A run of tokens at positions start .. end - 1 and the pages that it lists, from page start // page_size on."""

    key: int | bytes  # its key in the parent's children: its first token; the cache salt for a root or a head's end
    start: int
    tokens: np.ndarray  # [run] int32
    pages: np.ndarray  # [pages] int32
    parent: "Node | None"
    last_used: int = 0
    children: dict[int | bytes, "Node"] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)

    @property
    def is_leaf(self) -> bool:
        """Whether it has tokens and no children; a leaf always has pages, and only leaves are evicted."""
        return len(self.tokens) > 0 and not self.children


class Dropped(NamedTuple):
    """A sequence that was forgotten, and under which name: see `cache.keys.PageChain`."""

    tokens: np.ndarray  # [tokens] int32
    salt: bytes
    head: int


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Number of leading tokens that two arrays ([n] int32, [m] int32) share."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length


class RadixTree:
    """One radix tree per cache salt, all over one page pool."""

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self.pool = pool
        self.page_size = page_size
        self.top = Node(b"", 0, NO_TOKENS, NO_PAGES, None)  # its children are the roots, by salt
        self.held = np.zeros(pool.num_pages, bool)  # [pages] bool, whether some node lists the page
        self.evicted_pages = 0
        self.journal: Journal | None = None  # of what is listed, for another thread; None keeps none
        self.clock = 0
        # One entry (last_used, serial, node) for every leaf and no other node; last_used may be older than the node's.
        self.leaves: list[tuple[int, int, Node]] = []
        self.serials = itertools.count()

    def length(self, tokens: np.ndarray, salt: bytes, head: int = 0) -> int:
        """Length of the longest cached prefix of `tokens` ([tokens] int32); does not count as a use.

        All salts share the first `head` tokens, here and in the methods below; a multiple of the page size.
        """
        return self._walk(tokens, salt, head)[1]

    def match(self, tokens: np.ndarray, salt: bytes, head: int = 0) -> tuple[np.ndarray, int]:
        """The longest cached prefix of `tokens` ([tokens] int32): pages ([pages] int32) that cover it, and its length.

        The last page may hold more than the match. A hit counts as a use of every node on the path, as a whole.
        """
        path, length = self._walk(tokens, salt, head)
        self._touch(path)
        return self._table(path, length), length

    def find(self, tokens: np.ndarray, salt: bytes, head: int = 0) -> tuple[np.ndarray, int]:
        """What `match` returns; does not count as a use."""
        path, length = self._walk(tokens, salt, head)
        return self._table(path, length), length

    def insert(self, tokens: np.ndarray, pages: np.ndarray, salt: bytes, head: int = 0) -> None:
        """Add `tokens` ([tokens] int32), whose KV lies in `pages` ([pages] int32, in order of position).

        Tokens that the tree has already keep their pages. From the page of the first new token on, the tree lists the
        given pages, which hold that page's earlier tokens too. They may be filled further later, but must keep what
        they hold.
        """
        assert len(pages) == pages_for(len(tokens), self.page_size), "pages must cover the tokens and no more"
        if not len(tokens):
            return
        root_salt = HEAD_SALT if head else salt
        root = self.top.children.setdefault(root_salt, Node(root_salt, 0, NO_TOKENS, NO_PAGES, self.top))
        shared = min(head or len(tokens), len(tokens))
        path = self._insert([root], tokens[:shared], pages[: pages_for(shared, self.page_size)], root_salt, 0)
        if shared < len(tokens):
            end = self._after_head(path, head, salt)  # which may cut the path's last node
            path = self._insert([*path, end], tokens, pages, salt, head)
        self._touch(path)

    def _insert(self, path: list[Node], tokens: np.ndarray, pages: np.ndarray, salt: bytes, head: int) -> list[Node]:
        """Add `tokens` below a path to a root or the end of a head, as `insert`; returns the path of all of them."""
        path, matched = self._descend(path, tokens)
        if matched < len(tokens):
            rest, new = tokens[matched:].copy(), pages[matched // self.page_size :].copy()
            if matched < path[-1].end:
                path[-1] = self._split(path[-1], matched)
            if path[-1].is_leaf:
                self._grow(path[-1], rest, new)
            else:
                path.append(self._add_leaf(path[-1], rest, new))
            if self.journal is not None:
                first = matched // self.page_size
                self.journal.listed(Listed(salt, tokens, new, first, self._page_at(path, first - 1), head))
        return path

    def evict(self, wanted: int) -> int:
        """Free up to `wanted` pages from the ends of the least recently used leaves; returns how many it freed.

        A page in use stays, and so do all pages before it on its path.
        """
        freed = 0
        set_aside = []
        while freed < wanted and self.leaves:
            queued_at, _, leaf = heapq.heappop(self.leaves)
            if queued_at != leaf.last_used:
                self._queue(leaf)
                continue
            freed += self._trim(leaf, wanted - freed)
            survivor = self._prune(leaf)
            if survivor is leaf:
                # Its end is in use, or enough is freed: do not look at it again in this call.
                set_aside.append(leaf)
            elif survivor is not None:
                self._queue(survivor)
        for leaf in set_aside:
            self._queue(leaf)
        self.evicted_pages += freed
        return freed

    def drop(self, tokens: np.ndarray, start: int, salt: bytes, head: int = 0) -> list[Dropped]:
        """Forget position `start` and later of all sequences that begin with `tokens[: start + 1]`.

        `start` is a multiple of the page size and less than len(tokens). Returns those sequences, whole, and from
        within a head those of all salts. Leases keep the pages that they hold.
        """
        assert start % self.page_size == 0, f"cannot cut at {start}, inside a page of {self.page_size} tokens"
        path, matched = self._walk(tokens[: start + 1], salt, head)
        if matched <= start:
            return []
        top = path[-1]
        if top.start < start:
            self._split(top, start)
        above = top.parent
        assert above is not None
        first = Dropped(tokens[:start], salt, head) if start >= head else Dropped(tokens[:start], HEAD_SALT, 0)
        gone, sequences, pending = set(), list[Dropped](), [(top, first)]
        while pending:
            node, before = pending.pop()
            whole = before._replace(tokens=np.concatenate([before.tokens, node.tokens]))
            if isinstance(node.key, bytes):
                whole = whole._replace(salt=node.key, head=node.start)
            pending += [(child, whole) for child in node.children.values()]
            if node.is_leaf:
                sequences.append(whole)
                gone.add(node)
            self._swap(old=node.pages, new=NO_PAGES)
        self.leaves = [entry for entry in self.leaves if entry[2] not in gone]
        heapq.heapify(self.leaves)
        del above.children[top.key]
        while not above.children and not len(above.tokens) and above.parent is not None:  # a root, or a head's end
            del above.parent.children[above.key]
            above = above.parent
        if above.is_leaf:
            self._queue(above)
        return sequences

    def idle_pages(self) -> int:
        """Pages that only the tree holds: no eviction can free more than these."""
        return int(np.count_nonzero(self.held & (self.pool.ref_counts == 1)))

    def nodes(self) -> Iterator[Node]:
        """All nodes with tokens, parents first."""
        pending = list(self.top.children.values())
        while pending:
            node = pending.pop()
            pending.extend(node.children.values())
            if len(node.tokens):
                yield node

    def check(self) -> None:
        """Assert the tree's invariants; slow, for tests."""
        leaves, listed = [], NO_PAGES
        for root in self.top.children.values():
            assert root.children, "a root without children stayed"
        for node in self.nodes():
            assert node.parent is not None
            for salt, end in ((key, child) for key, child in node.children.items() if isinstance(key, bytes)):
                assert (end.key, end.start, end.parent, len(end.pages)) == (salt, node.end, node, 0)
                assert end.children, "an end of a head without children stayed"
                assert node.end % self.page_size == 0, "a head ends inside a page"
            assert node.parent.children[node.key] is node
            assert node.key == node.tokens[0]
            assert node.start == node.parent.end
            assert node.last_used <= node.parent.last_used or not len(node.parent.tokens)
            end_page = pages_for(node.end, self.page_size) if node.is_leaf else node.end // self.page_size
            assert len(node.pages) == end_page - node.start // self.page_size
            listed = np.concatenate([listed, node.pages])
            if node.is_leaf:
                leaves.append(node)
        assert len(np.unique(listed)) == len(listed), "a page is listed twice"
        assert np.array_equal(np.sort(listed), np.flatnonzero(self.held)), "held and listed pages disagree"
        assert {id(entry[2]) for entry in self.leaves} == {id(leaf) for leaf in leaves}
        assert len(self.leaves) == len(leaves)

    def _walk(self, tokens: np.ndarray, salt: bytes, head: int) -> tuple[list[Node], int]:
        """The path along `tokens`, and how many tokens match; the match may end inside the last node.

        The path is empty where the root is not there.
        """
        root = self.top.children.get(HEAD_SALT if head else salt)
        if root is None:
            return [], 0
        path, matched = self._descend([root], tokens[: head or None])
        if not head or matched < head or matched < path[-1].end or len(tokens) == head:
            return path, matched
        end = path[-1].children.get(salt)
        return self._descend([*path, end], tokens) if end else (path, matched)

    def _descend(self, path: list[Node], tokens: np.ndarray) -> tuple[list[Node], int]:
        """A path of nodes that match `tokens` as far as these go on to, and how many tokens match."""
        path, matched = path.copy(), path[-1].end
        while matched < len(tokens) and matched == path[-1].end:
            child = path[-1].children.get(int(tokens[matched]))
            if child is None:
                break
            matched += common_prefix(child.tokens, tokens[matched:])
            path.append(child)
        return path, matched

    def _after_head(self, path: list[Node], head: int, salt: bytes) -> Node:
        """The node for a salt after a head, whose path this is: below it are the sequences that go on from there."""
        assert head % self.page_size == 0, f"a head of {head} tokens ends inside a page of {self.page_size}"
        if path[-1].end > head:
            path[-1] = self._split(path[-1], head)
        last = path[-1]
        if last.is_leaf:
            self.leaves = [entry for entry in self.leaves if entry[2] is not last]
            heapq.heapify(self.leaves)
        return last.children.setdefault(salt, Node(salt, head, NO_TOKENS, NO_PAGES, last))

    def _table(self, path: list[Node], length: int) -> np.ndarray:
        """The pages of a path's first `length` tokens, [pages] int32."""
        count = pages_for(length, self.page_size)
        pages = np.concatenate([NO_PAGES, *(node.pages for node in path)])[:count]
        if len(pages) < count:  # the match ends in a page that an inner node leaves to its children
            below = path[-1]
            while below is path[-1] or not len(below.pages):
                below = next(iter(below.children.values()))
            pages = np.append(pages, below.pages[0])
        assert len(pages) == count
        return pages

    def _page_at(self, path: list[Node], index: int) -> int:
        """The page with number `index` among those of a path; -1 for index -1."""
        for node in reversed(path):
            at = index - node.start // self.page_size
            if 0 <= at < len(node.pages):
                return int(node.pages[at])
        assert index < 0, f"no node of the path lists page {index}"
        return -1

    def _split(self, node: Node, at: int) -> Node:
        """Cut `node` at position `at` inside it; returns the new upper half. The lower half stays the same object."""
        assert node.parent is not None
        assert node.start < at < node.end
        cut, page_cut = at - node.start, at // self.page_size - node.start // self.page_size
        upper = Node(node.key, node.start, node.tokens[:cut], node.pages[:page_cut], node.parent, node.last_used)
        node.parent.children[node.key] = upper
        node.key, node.start, node.parent = int(node.tokens[cut]), at, upper
        node.tokens, node.pages = node.tokens[cut:], node.pages[page_cut:]
        upper.children[node.key] = node
        return upper

    def _grow(self, leaf: Node, rest: np.ndarray, new: np.ndarray) -> None:
        """Continue a leaf in place; the first new page replaces a partly filled last one."""
        kept = leaf.pages[: leaf.end // self.page_size - leaf.start // self.page_size]
        self._swap(old=leaf.pages[len(kept) :], new=new)
        leaf.pages = np.concatenate([kept, new])
        leaf.tokens = np.concatenate([leaf.tokens, rest])

    def _add_leaf(self, parent: Node, rest: np.ndarray, new: np.ndarray) -> Node:
        leaf = Node(int(rest[0]), parent.end, rest, new, parent)
        assert leaf.key not in parent.children
        parent.children[leaf.key] = leaf
        self._swap(old=NO_PAGES, new=new)
        self._queue(leaf)
        return leaf

    def _swap(self, old: np.ndarray, new: np.ndarray) -> None:
        # New first: a page that is in both must not become free in between.
        self.pool.retain(new)
        self.pool.release(old)
        self.held[old] = False
        if self.journal is not None and len(old):
            self.journal.unlisted(old)
        assert not self.held[new].any(), "a page was listed twice: its lease inserted tokens that it had not computed"
        self.held[new] = True

    def _touch(self, path: list[Node]) -> None:
        self.clock += 1
        for node in path:
            node.last_used = self.clock

    def _queue(self, leaf: Node) -> None:
        heapq.heappush(self.leaves, (leaf.last_used, next(self.serials), leaf))

    def _trim(self, leaf: Node, wanted: int) -> int:
        """Release up to `wanted` pages from the leaf's end, stopping at a page in use; returns how many."""
        tail = leaf.pages[-wanted:]
        busy = np.flatnonzero(self.pool.ref_counts[tail] > 1)
        idle = tail[busy[-1] + 1 :] if len(busy) else tail
        self._swap(old=idle, new=NO_PAGES)
        leaf.pages = leaf.pages[: len(leaf.pages) - len(idle)]
        return len(idle)

    def _prune(self, leaf: Node) -> Node | None:
        """Forget tokens without pages, from the leaf upwards; returns the leaf that is left, if any."""
        node = leaf
        while node.parent is not None and not node.children:
            covered = (node.start // self.page_size + len(node.pages)) * self.page_size - node.start
            node.tokens = node.tokens[: max(covered, 0)]
            if len(node.tokens):
                return node
            del node.parent.children[node.key]
            node = node.parent
        return None
