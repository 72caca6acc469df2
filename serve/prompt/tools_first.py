"""Where a chat template writes the tools, for prompts in which they come before the system text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serve.prompt.template import Refused, apply

QUESTION = {"role": "user", "content": "word1"}


@dataclass(frozen=True)
class ToolsPlace:
    """The texts around the system text of a template that writes the tools right after it, in the same turn."""

    before: str  # what the template writes before the system text
    gap: str  # the whitespace between the system text and the tools
    tools: str  # the tools

    def tools_first(self, text: str, system: str) -> str:
        """A conversation's text with tools and system text exchanged; `system` occurs once. Raises Refused."""
        if not self.is_in(text, system):
            raise Refused("expected the tools right after the system text, in its turn, found them elsewhere")
        rest = text[len(self.before + system + self.gap + self.tools) :]
        return self.before + self.tools + self.gap + system + rest

    def is_in(self, text: str, system: str) -> bool:
        """Whether a conversation's text begins with system text and tools in this place."""
        return text.startswith(self.before + system + self.gap + self.tools)


def place_of_tools(hf: Any, system: str, tools: list[dict[str, Any]]) -> ToolsPlace | None:
    """Where a small conversation has these tools, None if they come before the system text already; raises Refused.

    `system` is a text for its system message that the tools do not hold.
    """
    turns = [{"role": "system", "content": system}, QUESTION]
    before, _, after = apply(hf, turns, tools).partition(system)
    plain_before, _, plain_after = apply(hf, turns).partition(system)
    if before != plain_before and after == plain_after:
        return None
    if before != plain_before or not after.endswith(plain_after):
        raise Refused("expected the tools right after the system text, in its turn, found them elsewhere")
    written = after.removesuffix(plain_after)
    first = written.lstrip()
    return ToolsPlace(before, written[: len(written) - len(first)], first)
