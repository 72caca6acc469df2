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

import time
from collections.abc import Callable, Iterator

import numpy as np

from cache.eviction import BUSY, LastUse, Rank, Rule, State, agent_aware, demotion_s
from cache.eviction_order import EvictionOrder
from cache.journal import Journal, Listed
from cache.keys import HEAD_SALT
from cache.nodes import NO_PAGES, NO_TOKENS, Agent, Dropped, Node, Use, check_nodes, nodes_below
from cache.pool import PagePool, pages_for

BUSY_S = 1.0  # until a leaf whose end was in use is looked at again, while others can be evicted


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Number of leading tokens that two arrays ([n] int32, [m] int32) share."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length


class RadixTree:
    """One radix tree per cache salt, all over one page pool."""

    def __init__(
        self,
        pool: PagePool,
        page_size: int,
        rule: Rule = agent_aware,  # says what is evicted first
        clock: Callable[[], float] = time.monotonic,  # in seconds
        page_cost: Callable[[int], float] = lambda position: 0.0,  # seconds to compute the page that ends there
    ) -> None:
        self.pool = pool
        self.page_size = page_size
        self.rule, self.now, self.page_cost = rule, clock, page_cost
        self.top = Node(b"", 0, NO_TOKENS, NO_PAGES, None)  # its children are the roots, by salt
        self.held = np.zeros(pool.num_pages, bool)  # [pages] bool, whether some node lists the page
        self.evicted_pages = 0
        self.journal: Journal | None = None  # of what is listed, for another thread; None keeps none
        self.clock = 0
        self.leaves: EvictionOrder[Node] = EvictionOrder(self._rank)  # every leaf, and no other node

    def length(self, tokens: np.ndarray, salt: bytes, head: int = 0) -> int:
        """Length of the longest cached prefix of `tokens` ([tokens] int32); does not count as a use.

        All salts share the first `head` tokens, here and in the methods below; a multiple of the page size.
        """
        return self._walk(tokens, salt, head)[1]

    def match(self, tokens: np.ndarray, salt: bytes, head: int = 0, use: Use | None = None) -> tuple[np.ndarray, int]:
        """The longest cached prefix of `tokens` ([tokens] int32): pages ([pages] int32) that cover it, and its length.

        The last page may hold more than the match. A hit counts as a use of every node on the path; where it ends
        inside one, that is another's as long as nothing is inserted.
        """
        path, length = self._walk(tokens, salt, head)
        self._touch(path, use, whole=not path or length == path[-1].end)
        return self._table(path, length), length

    def find(self, tokens: np.ndarray, salt: bytes, head: int = 0) -> tuple[np.ndarray, int]:
        """What `match` returns; does not count as a use."""
        path, length = self._walk(tokens, salt, head)
        return self._table(path, length), length

    def last_use(self, tokens: np.ndarray, salt: bytes, head: int = 0) -> tuple[Use | None, int, bool]:
        """The use of the last node along `tokens` ([tokens] int32), None if several agents share it; and the match.

        And whether the tokens go on where that use's prompt ended, or from all that is left of it.
        """
        path, length = self._walk(tokens, salt, head)
        if not path or path[-1].shared or (use := path[-1].use) is None:
            return None, length, False
        left = length == path[-1].end and path[-1].is_leaf
        return use, length, left or length + self.page_size >= use.tokens

    def rank_again(self, use: Use) -> None:
        """Rank the pages of a use anew, whose state has changed."""
        if (leaf := use.leaf) and leaf.use is use and leaf in self.leaves:
            self._queue(leaf)

    def own_start(self, use: Use) -> int:
        """The position from which on only its agent has used the sequence that a use ends, cached or not."""
        node, start = use.leaf, use.own
        while node is not None and node.use is use and not node.shared:
            start, node = min(start, node.start), node.parent
        return start

    def insert(self, tokens: np.ndarray, pages: np.ndarray, salt: bytes, head: int = 0, use: Use | None = None) -> None:
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
        self._touch(path, use)

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
        """Free up to `wanted` pages from the ends of the leaves that the rule names; returns how many it freed.

        A page in use stays, and so do all pages before it on its path.
        """
        freed, now = 0, self.now()
        set_aside = []
        while freed < wanted and (leaf := self.leaves.pop(now)):
            freed += self._trim(leaf, wanted - freed)
            survivor = self._prune(leaf)
            if survivor is leaf and freed < wanted:
                set_aside.append(leaf)  # its end is in use
            elif survivor is not None:
                self._queue(survivor)
        for leaf in set_aside:  # not looked at again in this call, nor for a while if others can go
            self.leaves.place(leaf, Rank(BUSY, 1, -now, now + BUSY_S))
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
        sequences, pending = list[Dropped](), [(top, first)]
        while pending:
            node, before = pending.pop()
            whole = before._replace(tokens=np.concatenate([before.tokens, node.tokens]))
            if isinstance(node.key, bytes):
                whole = whole._replace(salt=node.key, head=node.start)
            pending += [(child, whole) for child in node.children.values()]
            if node.is_leaf:
                sequences.append(whole)
                self.leaves.discard(node)
                self._leave(node)
            self._swap(old=node.pages, new=NO_PAGES)
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
        return nodes_below(self.top)

    def check(self) -> None:
        """Assert the tree's invariants; slow, for tests."""
        check_nodes(self.top, self.page_size, self.held, self.leaves)

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
            self.leaves.discard(last)
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
        upper.use, upper.shared = node.use, node.shared
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
        self.leaves.put(leaf, self.now())
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

    def _touch(self, path: list[Node], use: Use | None, whole: bool = True) -> None:
        """Note a use of the nodes of a path, of the last one only if it is used as a `whole`."""
        self.clock += 1
        use = use or Use(Agent(), used=self.now())
        for node in path:
            node.last_used = self.clock
        used = path if whole else path[:-1]
        for node in used:
            if node.use is not use:
                node.shared |= node.use is not None and node.use.agent is not use.agent
                node.use = use
        if (left := use.leaf) and left.use is use and left in self.leaves and left not in used:
            left.use = Use(use.agent, use.priority, use.used)  # its sequence took another way
            self._queue(left)
        if used and used[-1] in self.leaves:
            use.leaf = used[-1]
            self._queue(used[-1])

    def _queue(self, leaf: Node) -> None:
        self.leaves.put(leaf, self.now())

    def _rank(self, leaf: Node, now: float) -> Rank:
        use = leaf.use or Use(Agent(), used=now)  # it is new, and ranked again when it is touched
        # That one agent is not expected back soon says nothing of pages that others have used, too.
        state = State.UNKNOWN if leaf.shared and demotion_s(use.state) else use.state
        cost_s = self.page_cost(leaf.end)
        return self.rule(LastUse(use.used, state, use.agent.pace_s, use.priority, cost_s=cost_s), now)

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
                if node.use:
                    node.use.leaf = node
                return node
            self._leave(node)
            del node.parent.children[node.key]
            node = node.parent
        return None

    def _leave(self, node: Node) -> None:
        """Let the use of a node that is forgotten no longer hold on to it."""
        if (use := node.use) and use.leaf is node:
            use.own, use.leaf = self.own_start(use), None
