"""How many bytes of memory a server may take for what it remembers of requests; `serve/README.md` lists them."""

from __future__ import annotations

from dataclasses import astuple, dataclass

MIB = 2**20
GRAMMAR_CHARS = 2**20  # the most of the schemas that one answer has to obey, all together


@dataclass(frozen=True)
class Bounds:
    """The most bytes for each kind of memory."""

    segments: int = 128 * MIB
    grammars: int = 256 * MIB
    answers: int = 64 * MIB
    unwritten_answers: int = 32 * MIB
    reports: int = 64 * MIB
    statuses: int = 2 * MIB
    volatility: int = 16 * MIB
    savings: int = 64 * MIB
    audits: int = 16 * MIB
    documents: int = 16 * MIB

    @property
    def total(self) -> int:
        """The sum of all."""
        return sum(astuple(self))

    def scaled(self, total: int) -> Bounds:
        """The same shares of another total, in bytes."""
        return Bounds(*(total * most // self.total for most in astuple(self)))


DEFAULT_BOUNDS = Bounds()
