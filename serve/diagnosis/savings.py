"""What each rule saves: tokens that a request reused, and would not have without that rule.

For each rule a shadow of the prefix cache is kept, of the prompts as they would be without that rule and with all
others: hash chains over their text, no tokens and no KV. The text is that of `explain`: system texts, tools, messages
(with the rule tools-first: tools, system texts, messages), which is the order of most chat templates.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from threading import Lock

import xxhash

from serve.api.messages import CountTokensRequest
from serve.diagnosis.compare import characters
from serve.limits.bounds import DEFAULT_BOUNDS
from serve.rules.normalize import normalize

CHUNK = 256  # bytes that a link of a chain stands for
LINK_BYTES = 256  # of memory that a link takes, about


class Savings:
    """Takes request after request. Any thread may use it."""

    def __init__(self, most_bytes: int = DEFAULT_BOUNDS.savings) -> None:
        # Of (rule left out, link) the hash, the latest last; "" for the prompts as they are.
        self.links: OrderedDict[int, None] = OrderedDict()
        self.most = most_bytes // LINK_BYTES
        self.lock = Lock()

    def observe(
        self, request: CountTokensRequest, rules: Collection[str], reused: int, length: int, salt: bytes = b""
    ) -> dict[str, int]:
        """Tokens that each rule alone saved, where it saved any, of `reused` ones of a prompt of `length` tokens.

        `request` is as it came, before the rules.
        """
        if not rules:
            return {}
        normalized = normalize(request, rules)
        applied = {applied.rule for applied in normalized.applied}
        text = text_of(normalized.request, rules)
        chains = {"": chain(text, salt)}
        for rule in rules:
            others = set(rules) - {rule}
            changed = rule in applied
            chains[rule] = chain(text_of(normalize(request, others).request, others), salt) if changed else chains[""]
        tokens_per_link = CHUNK * length / max(1, len(text))
        with self.lock:
            held = {rule: round(self.held(rule, links) * tokens_per_link) for rule, links in chains.items()}
            for rule, links in chains.items():
                self.remember(rule, links)
        most = min(reused, held[""])
        return {rule: most - held[rule] for rule in rules if held[rule] < most}

    def held(self, rule: str, links: list[int]) -> int:
        """How many links from the first on are known."""
        return next((i for i, link in enumerate(links) if hash((rule, link)) not in self.links), len(links))

    def remember(self, rule: str, links: list[int]) -> None:
        """Keep these links, and drop the oldest ones."""
        for link in links:
            key = hash((rule, link))
            self.links[key] = None
            self.links.move_to_end(key)
        # Not `del` of the first of a dict, which looks through all that were deleted before.
        while len(self.links) > self.most:
            self.links.popitem(last=False)

    @property
    def bytes(self) -> int:
        """Memory that is taken, about."""
        return len(self.links) * LINK_BYTES


def text_of(request: CountTokensRequest, rules: Collection[str]) -> bytes:
    """A request's prompt as text."""
    return "".join(map(str, characters(request, "tools-first" in rules).segments)).encode("utf-8", "replace")


def chain(text: bytes, salt: bytes) -> list[int]:
    """A hash for each whole chunk of a text, of all text up to its end."""
    link, links = xxhash.xxh3_64_intdigest(salt), []
    for start in range(0, len(text) - CHUNK + 1, CHUNK):
        link = xxhash.xxh3_64_intdigest(text[start : start + CHUNK], link)
        links.append(link)
    return links
