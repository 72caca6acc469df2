"""The agents whose clients say which of them sends a request."""

from __future__ import annotations

from collections import OrderedDict

from cache.nodes import Agent

MOST_AGENTS = 4096  # that are remembered by their ids


class Agents:
    """The agents whose clients name them, the latest ones."""

    def __init__(self, most: int = MOST_AGENTS) -> None:
        self.most = most
        self.known: OrderedDict[tuple[bytes, str], Agent] = OrderedDict()

    def named(self, salt: bytes, id: str, session: str = "", parent: str = "") -> Agent:
        """The agent with this id, which may be new; one without an id is nobody else."""
        if not id:
            return Agent()
        agent = self.known.setdefault((salt, id), Agent(id, session, parent, salt))
        self.known.move_to_end((salt, id))
        if len(self.known) > self.most:
            self.known.popitem(last=False)
        return agent

    def of_session(self, salt: bytes, session: str) -> list[Agent]:
        """The agents of a session; those of another salt may call theirs the same."""
        return [agent for (known, _), agent in self.known.items() if (known, agent.session) == (salt, session)]
