"""What a radix tree consists of, and whose pages they are: nodes, agents, and one request's use of pages.

An agent is known by the id that its client sends, or else by the prompt that its next request extends. Only the
engine's thread touches any of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from cache.eviction import PACE_S, State, next_pace
from cache.eviction_order import EvictionOrder
from cache.pool import pages_for

SAME_CONVERSATION = 1024  # tokens: a shorter prompt that shares so many with the one before is its compaction
COMPACTED = 0.6  # of the prompt before, at most
MOST_USES = 64  # of an agent: the conversations that it may go on with
NOWHERE = 1 << 62  # a position after all tokens
NO_TOKENS = np.zeros(0, np.int32)  # [0] int32
NO_PAGES = np.zeros(0, np.int32)  # [0] int32


@dataclass(eq=False)
class Agent:
    """A row of requests of which each follows the answer to the one before."""

    id: str = ""
    session: str = ""  # that it belongs to
    parent: str = ""  # the agent that waits for its end
    salt: bytes = b""  # of its pages, and so of its names
    pace_s: float = PACE_S  # from its tool calls to their results
    uses: list[Use] = field(default_factory=list)  # those whose pages are cached still; the latest one is the last
    branches: bool = False  # it goes on with conversations that it seemed to have left

    def begins(self, use: Use, now: float) -> None:
        """Note that a request begins."""
        if self.uses and (last := self.uses[-1]).state is State.TOOL:
            self.pace_s = next_pace(self.pace_s, now - last.used)
        self.uses = [*[each for each in self.uses if each.is_latest][1 - MOST_USES :], use]


@dataclass(eq=False)
class Use:
    """One request's use of pages: what `cache.eviction.LastUse` says of them."""

    agent: Agent
    priority: int = 0
    used: float = 0.0  # seconds: its beginning, and then its end
    state: State = State.UNKNOWN
    tokens: int = 0  # of its prompt
    leases: int = 0  # it runs as long as it has any
    leaf: Node | None = None  # the end of its sequence in the tree; None once it is gone
    own: int = NOWHERE  # of what is gone, the first position that only its agent had used

    @property
    def is_latest(self) -> bool:
        """Whether no later request has used the end of its sequence."""
        return self.leaf is not None and self.leaf.use is self

    def supersedes(self, last: Use, matched: int) -> bool:
        """Whether its agent leaves another use's conversation behind: it starts again, with a summary.

        `matched` is how many tokens the two prompts share.
        """
        if not self.agent.id or self.agent.branches or last.state is State.RUNNING:
            return False
        return SAME_CONVERSATION <= matched < last.tokens and self.tokens < COMPACTED * last.tokens


@dataclass(slots=True, eq=False)
class Node:
    """A run of tokens at positions start .. end - 1 and the pages that it lists, from page start // page_size on."""

    key: int | bytes  # its key in the parent's children: its first token; the cache salt for a root or a head's end
    start: int
    tokens: np.ndarray  # [run] int32
    pages: np.ndarray  # [pages] int32
    parent: Node | None
    last_used: int = 0
    use: Use | None = None  # the latest of it
    shared: bool = False  # several agents have used it
    children: dict[int | bytes, Node] = field(default_factory=dict)

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


def nodes_below(top: Node) -> Iterator[Node]:
    """All nodes with tokens below another one, parents first."""
    pending = list(top.children.values())
    while pending:
        node = pending.pop()
        pending.extend(node.children.values())
        if len(node.tokens):
            yield node


def check_nodes(top: Node, page_size: int, held: np.ndarray, order: EvictionOrder[Node]) -> None:
    """Assert what must hold of a tree's nodes after every step, of the pages `held` ([pages] bool), and of the leaves.

    Slow, for tests.
    """
    leaves, listed = [], NO_PAGES
    for root in top.children.values():
        assert root.children, "a root without children stayed"
    for node in nodes_below(top):
        assert node.parent is not None
        for salt, end in ((key, child) for key, child in node.children.items() if isinstance(key, bytes)):
            assert (end.key, end.start, end.parent, len(end.pages)) == (salt, node.end, node, 0)
            assert end.children, "an end of a head without children stayed"
            assert node.end % page_size == 0, "a head ends inside a page"
        assert node.parent.children[node.key] is node
        assert node.key == node.tokens[0]
        assert node.start == node.parent.end
        assert node.last_used <= node.parent.last_used or not len(node.parent.tokens)
        end_page = pages_for(node.end, page_size) if node.is_leaf else node.end // page_size
        assert len(node.pages) == end_page - node.start // page_size
        listed = np.concatenate([listed, node.pages])
        if node.is_leaf:
            leaves.append(node)
    assert len(np.unique(listed)) == len(listed), "a page is listed twice"
    assert np.array_equal(np.sort(listed), np.flatnonzero(held)), "held and listed pages disagree"
    assert all(leaf in order for leaf in leaves)
    assert len(order) == len(leaves)
