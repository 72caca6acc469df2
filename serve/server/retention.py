"""What a request asks to be kept, as tokens of its prompt; and what came of it, as the answer tells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import isinf

from cache.retention import Ask, Kept, utc
from serve.api.answers import CacheCreation, Retained
from serve.api.messages import CountTokensRequest
from serve.api.retention import HEAD, LAST, Asked, Wishes
from serve.diagnosis.sections import Sections, Vocabulary
from serve.prompt.render import Prompt

OF_MESSAGE = re.compile(r"messages\[([0-9]+)\]")
FIVE_MINUTES, HOUR = 300.0, 3600.0  # the times that `usage.cache_creation` has fields for


def asks_of(wishes: Wishes, request: CountTokensRequest, prompt: Prompt, vocabulary: Vocabulary) -> tuple[Ask, ...]:
    """What is asked to be kept of a prompt: a marker counts to the end of its message, or of tools and system text."""
    ends = ends_of({each.place for each in wishes.asked}, request, prompt, vocabulary)
    return tuple(Ask(ends[each.place], each.seconds) for each in wishes.asked)


def ends_of(places: set[int], request: CountTokensRequest, prompt: Prompt, vocabulary: Vocabulary) -> dict[int, int]:
    """The token after each place (see `Asked.place`) of a prompt.

    `request` is the prompt's, after the rules; these may have added messages, but none at its end.
    """
    ends = {place: len(prompt.tokens) for place in places}
    if not places - {LAST}:
        return ends
    sections = Sections(request, prompt.segments, prompt.counts, prompt.tokens, vocabulary)
    starts = [(int(found[1]), start) for name, start, _ in sections.ranges() if (found := OF_MESSAGE.match(name))]
    for place in places - {LAST}:
        after = 0 if place == HEAD or place > len(request.messages) else len(request.messages) - place + 1
        ends[place] = next((start for index, start in starts if index >= after), len(prompt.tokens))
    return ends


def retained(asked: Sequence[Asked], kept: Sequence[Kept]) -> tuple[Retained, ...]:
    """What came of each marker."""
    return tuple(
        Retained(
            asked=each.field,
            ttl=each.ttl,
            tokens=done.tokens,
            until=utc(done.until) if done.tokens and not isinf(done.until) else None,
            tier="device" if done.tokens else None,
            instead="; ".join(part for part in (each.instead, done.why) if part) or None,
        )
        for each, done in zip(asked, kept, strict=True)
    )


def cache_creation(asked: Sequence[Asked], kept: Sequence[Kept], reused: int, computed: int) -> CacheCreation:
    """How many of a prompt's new tokens, `computed` after the `reused` ones, are kept for five minutes and an hour.

    Where both hold a token, the hour counts.
    """
    pairs = list(zip(asked, kept, strict=True))
    hour, five = (
        min(max([reused, *(done.tokens for each, done in pairs if each.seconds == seconds)]), reused + computed)
        for seconds in (HOUR, FIVE_MINUTES)
    )
    return CacheCreation(max(0, five - max(hour, reused)), hour - reused)
