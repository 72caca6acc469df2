"""What each rule saves: the tokens that a request reused but would not have reused without that rule.

For each rule, a shadow of the prefix cache holds the prompts as they would be without that rule and with all others: as
hash chains over their text, without tokens and KV. The text is that of `compare.characters`.
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

CHUNK = 256  # bytes of text that a link of a chain stands for
LINK_BYTES = 256  # memory that a link takes, approximately


class Savings:
    """Counts the tokens that each rule saves, from request to request. Any thread may use it."""

    def __init__(self, most_bytes: int = DEFAULT_BOUNDS.savings) -> None:
        # Hashes of (rule left out, link), the latest last. The rule is "" for the prompts as they are.
        self.links: OrderedDict[int, None] = OrderedDict()
        self.max_links = most_bytes // LINK_BYTES
        self.lock = Lock()

    def observe(
        self, request: CountTokensRequest, rules: Collection[str], reused: int, length: int, salt: bytes = b""
    ) -> dict[str, int]:
        """The tokens that each rule alone saved, for rules that saved any.

        `request` is as it came, before the rules. Its prompt has `length` tokens, of which `reused` were in the cache.
        """
        if not rules:
            return {}
        normalized = normalize(request, rules)
        applied = {applied.rule for applied in normalized.applied}
        text = prompt_bytes(normalized.request, rules)
        chains = {"": hash_chain(text, salt)}
        for rule in rules:
            others = set(rules) - {rule}
            changed = rule in applied
            without = prompt_bytes(normalize(request, others).request, others) if changed else text
            chains[rule] = hash_chain(without, salt) if changed else chains[""]
        tokens_per_link = CHUNK * length / max(1, len(text))
        with self.lock:
            matched = {rule: round(self.matched_links(rule, links) * tokens_per_link) for rule, links in chains.items()}
            for rule, links in chains.items():
                self.remember(rule, links)
        most = min(reused, matched[""])
        return {rule: most - matched[rule] for rule in rules if matched[rule] < most}

    def matched_links(self, rule: str, links: list[int]) -> int:
        """The number of leading links that are remembered."""
        return next((i for i, link in enumerate(links) if hash((rule, link)) not in self.links), len(links))

    def remember(self, rule: str, links: list[int]) -> None:
        """Remember these links, and drop the oldest ones."""
        for link in links:
            key = hash((rule, link))
            self.links[key] = None
            self.links.move_to_end(key)
        # An OrderedDict, as finding the first key of a dict steps over all keys deleted before it.
        while len(self.links) > self.max_links:
            self.links.popitem(last=False)

    @property
    def bytes(self) -> int:
        """The memory in use, approximately."""
        return len(self.links) * LINK_BYTES


def prompt_bytes(request: CountTokensRequest, rules: Collection[str]) -> bytes:
    """A request's prompt as plain text in UTF-8."""
    return "".join(map(str, characters(request, "tools-first" in rules).segments)).encode("utf-8", "replace")


def hash_chain(text: bytes, salt: bytes) -> list[int]:
    """For each whole chunk of a text, the hash of all text up to the chunk's end."""
    link, links = xxhash.xxh3_64_intdigest(salt), []
    for start in range(0, len(text) - CHUNK + 1, CHUNK):
        link = xxhash.xxh3_64_intdigest(text[start : start + CHUNK], link)
        links.append(link)
    return links
