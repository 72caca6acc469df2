"""How many bytes of memory a server may take for what it remembers of requests; `serve/README.md` has the table."""

from __future__ import annotations

from dataclasses import astuple, dataclass

MIB = 2**20


@dataclass(frozen=True)
class Bounds:
    """The most bytes for each kind of memory."""

    segments: int = 128 * MIB
    grammars: int = 256 * MIB
    turns: int = 64 * MIB
    unwritten_turns: int = 32 * MIB
    reports: int = 64 * MIB
    outcomes: int = 2 * MIB
    volatility: int = 16 * MIB
    savings: int = 64 * MIB
    audits: int = 16 * MIB

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(astuple(self))

    def scaled(self, total: int) -> Bounds:
        """The same shares of another total."""
        return Bounds(*(total * most // self.total for most in astuple(self)))


DEFAULT_BOUNDS = Bounds()
