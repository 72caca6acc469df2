"""What agents hold on the device: walks through the tree that are no use of what they find.

Only the engine's thread calls it. What one look costs is bounded, whatever clients have sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from cache.nodes import Agent, Node, Use

MOST_NODES = 256  # of a path that are looked at, from its end on; what is before them is taken to be there
MOST_USES = 16  # of an agent's latest that are looked at


class Holding(NamedTuple):
    """What the device has of an agent's conversations, in tokens."""

    tokens: int  # of all of them, each counted once
    own: int  # of these, those that no other agent has used
    prompt_tokens: int  # of its latest prompt, as long as that is
    prompt: int  # of the latest prompt, from its start on


def holding(agent: Agent) -> Holding:
    """What an agent holds."""
    counted: dict[Node, int] = {}
    before = prompt_tokens = prompt = 0
    for use in agent.uses[-MOST_USES:]:
        if not (path := path_of(use)):
            continue  # nothing is computed yet, or its end is gone: the rest counts for those who share it
        (first, _), (last, tokens) = path[0], path[-1]
        before = max(before, first.start)
        prompt_tokens, prompt = use.tokens, min(use.tokens, last.start + tokens)
        for node, count in path:
            counted[node] = max(count, counted.get(node, 0))
    own = sum(count for node, count in counted.items() if not node.shared)
    tokens = before + sum(count for node, count in counted.items() if node.start >= before)
    return Holding(tokens, own, prompt_tokens, prompt)


def path_of(use: Use) -> list[tuple[Node, int]]:
    """The nodes of a use's sequence that are in the tree still, first ones first, and how many tokens of each it has.

    Of a path of more than MOST_NODES, the last ones. What was evicted counts again where a later sequence has gone on
    from just the place of the cut, whatever it says there: only the tokens would tell, and they are not kept.
    """
    nodes = list(islice(upwards(use.leaf), MOST_NODES))[::-1]
    path = []
    for node, below in zip(nodes, [*nodes[1:], None], strict=False):
        if node.parent is not None and node.parent.children.get(node.key) is not node:
            break  # it was evicted
        # Another's sequence may go on in a node beyond the place where this one left it, or has ended.
        end = below.start if below else node.end if use.is_latest else use.tokens
        path.append((node, max(0, min(node.end, end) - node.start)))
    return path


def upwards(node: Node | None) -> Iterator[Node]:
    """A node and all above it."""
    while node is not None:
        yield node
        node = node.parent
