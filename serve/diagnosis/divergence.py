"""Where a prompt stops matching the cache, in which section, by which tokens, for which cause, and at what cost.

Each request is compared with the latest ones and their answers: token by token to find the nearest sequence and the
mismatch position, then part by part (`causes`) to name the cause. What is remembered is bounded in bytes. If the
nearest sequence is cached but no longer remembered, the mismatch position is where the cache's match ended.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import msgspec
import numpy as np
from msgspec import Struct

from cache.radix_tree import common_prefix
from serve.api.answers import Diagnostics, PreviousMessageNotFound
from serve.api.messages import CountTokensRequest, decode_count_tokens
from serve.diagnosis.causes import UNAVOIDABLE, agent_text, changed_part, miss_reason
from serve.diagnosis.sections import Sections, Vocabulary
from serve.limits.bounds import DEFAULT_BOUNDS
from serve.limits.recent import Recent
from serve.prompt.render import Prompt, PromptSegment

REMEMBERED = 32  # requests that each new one is compared with, at most
REPORT_BYTES = 2**20  # for the reports on the latest requests, about 2 KB each
MAX_SECTION_CHARS = 200  # of a section's name, which contains that of a tool
MAX_LISTED_RULES = 32  # of those that changed a request
SHOWN_TOKENS = 12  # of each of the two texts of a report


@dataclass(frozen=True, eq=False)
class RememberedRequest:
    """A request as it was rendered, and the tokens sampled for it."""

    id: str  # of its message
    request: CountTokensRequest  # after the rules
    prompt: Prompt
    tokens: np.ndarray  # [tokens] int32: the prompt and, after the answer, all of the answer
    model: str  # identifies the weights
    salt: bytes = b""
    key: str = ""  # the name of the API key that sent it; "" where keys have none
    head: int = 0  # tokens at its start that may have come from another scope

    @property
    def scope(self) -> tuple[bytes, str]:
        """What a sequence has in common with all that this request may learn of: the salt and the key."""
        return self.salt, self.key


@dataclass(frozen=True, eq=False)
class EncodedRequest:
    """A remembered request, its body as JSON: decoded, it would take many times the memory."""

    id: str
    body: bytes  # JSON of the request after the rules
    segments: tuple[PromptSegment, ...]
    counts: tuple[int, ...]
    prompt_tokens: int
    tokens: np.ndarray  # [tokens] int32, as in RememberedRequest
    model: str
    salt: bytes
    key: str

    @staticmethod
    def encode(new: RememberedRequest) -> EncodedRequest:
        """A request in the form that is kept."""
        prompt, body = new.prompt, msgspec.json.encode(new.request)
        return EncodedRequest(
            new.id, body, prompt.segments, prompt.counts, len(prompt.tokens), new.tokens, new.model, *new.scope
        )

    def decode(self) -> RememberedRequest:
        """The request as it was."""
        tokens = self.tokens[: self.prompt_tokens]
        prompt = Prompt(self.segments, tokens, self.counts, None, tokens[:0], False)
        return RememberedRequest(self.id, decode_count_tokens(self.body), prompt, self.tokens, self.model, *self.scope)

    @property
    def scope(self) -> tuple[bytes, str]:
        """As of RememberedRequest."""
        return self.salt, self.key

    @property
    def bytes(self) -> int:
        """The memory that it takes, approximately."""
        segments = sum(map(sys.getsizeof, self.segments)) + 40 * len(self.counts)
        return sys.getsizeof(self.body) + segments + self.tokens.nbytes + len(self.model) + len(self.salt) + 1000


@dataclass(frozen=True)
class Difference:
    """Why a prompt and another sequence share no more tokens."""

    section: str
    cause: str
    prompt_text: str  # a few tokens of the prompt, from the mismatch position on
    nearest_text: str  # the same of the other sequence


@dataclass(frozen=True)
class Mismatch:
    """Where a prompt stops matching the nearest sequence, and why."""

    position: int  # in the prompt
    difference: Difference
    matchable: int  # tokens of the prompt that the nearest sequence would have covered, at most
    nearest: str | None = None  # id of the message whose sequence is nearest


class Report(Struct, frozen=True, omit_defaults=True):
    """What a request reused from the cache, and why not more. `position` and all lengths are in `unit`."""

    id: str
    time: float  # seconds since 1970
    prompt_tokens: int
    reused_tokens: int
    reused_by_tier: Mapping[str, int]
    recomputed_tokens: int
    position: int  # the mismatch position; prompt_tokens if there is none
    section: str | None = None
    cause: str | None = None  # None: the prompt continues a cached sequence
    prompt_text: str | None = None  # a few tokens of the prompt, from the mismatch position on
    nearest_text: str | None = None  # the same of the nearest sequence
    nearest: str | None = None  # id of the message whose sequence is nearest
    lost_tokens: int = 0  # of the recomputed tokens, those that the nearest sequence covered, at most
    lost_ms: float | None = None  # time to compute them by the cost model; None if it is not calibrated
    rules: tuple[str, ...] = ()  # that changed the request, with their places
    unit: str = "tokens"  # or characters, if no tokenizer is known
    key: str = ""  # the name of the API key that sent the request


class Divergences:
    """The latest requests and the reports on them. Any thread may use it.

    `prefill_s(start, stop)` is the time in seconds to compute tokens [start, stop), infinite if unknown.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        page_size: int,
        prefill_s: Callable[[int, int], float] = lambda start, stop: math.inf,
        show_prompt_text: bool = True,
        unit: str = "tokens",
        most_bytes: int = DEFAULT_BOUNDS.reports,
    ) -> None:
        self.vocabulary, self.page_size, self.prefill_s = vocabulary, page_size, prefill_s
        self.show_prompt_text, self.unit = show_prompt_text, unit
        self.remembered: Recent[str, EncodedRequest] = Recent(most_bytes, lambda request: request.bytes, REMEMBERED)
        self.reports: Recent[str, Report] = Recent(REPORT_BYTES, lambda made: 1000 + len(msgspec.json.encode(made)))

    def started(self, new: RememberedRequest, by_tier: Mapping[str, int], rules: tuple[str, ...] = ()) -> Report:
        """Report on a request when its prompt is computed, and remember it. `by_tier` are the tokens it reused."""
        others = self.remembered.values()
        self.remembered.put(new.id, EncodedRequest.encode(new))
        made = report_divergence(new, others, by_tier, self.vocabulary, self.page_size, self.prefill_s)
        made = msgspec.structs.replace(made, key=new.key)
        hidden = {} if self.show_prompt_text else {"prompt_text": None, "nearest_text": None}
        section = made.section and made.section[:MAX_SECTION_CHARS]
        made = msgspec.structs.replace(made, section=section, rules=rules[:MAX_LISTED_RULES], unit=self.unit, **hidden)
        self.reports.put(made.id, made)
        return made

    def answered(self, id: str, answer: Sequence[int]) -> None:
        """Remember the tokens sampled for a request, without the stop token."""

        def with_answer(request: EncodedRequest | None) -> EncodedRequest | None:
            return request and replace(request, tokens=np.concatenate([request.tokens, np.asarray(answer, np.int32)]))

        self.remembered.change(id, with_answer)

    @property
    def bytes(self) -> int:
        """The memory in use, approximately."""
        return self.remembered.bytes + self.reports.bytes

    def latest(self, viewer: str | None = None) -> list[Report]:
        """The reports, the latest first; of a `viewer`, those on the requests of the key with this name."""
        return [made for made in self.reports.values()[::-1] if viewer in (None, made.key)]

    def find_report(
        self, id: str, viewer: str | None = None
    ) -> tuple[Report, list[tuple[str, int, int]] | None] | None:
        """The report on a request and its sections, as (name, start, stop) in tokens.

        None if it is no longer remembered, or not the `viewer`'s, as in `latest`.
        """
        made, request = self.reports.peek(id), self.remembered.peek(id)
        if made is None or viewer not in (None, made.key):
            return None
        return made, sections_of(request.decode(), self.vocabulary).ranges() if request else None

    def diagnose(self, new: RememberedRequest, previous_id: str | None, reused: int) -> Diagnostics | None:
        """The API's answer to `diagnostics.previous_message_id`; None if nothing was missed."""
        if previous_id is None:
            return None
        previous = self.remembered.peek(previous_id)
        if previous is None or previous.scope != new.scope:
            return Diagnostics(PreviousMessageNotFound())
        limit = len(new.prompt.tokens) - 1
        missed = min(previous.prompt_tokens, limit) - reused
        shared = common_prefix(new.prompt.tokens, previous.tokens)
        if missed <= 0 or (shared == len(previous.tokens) and reused >= shared - 1):
            return None
        cause = "evicted"
        if reused >= min(shared, limit) - 1:
            sections = sections_of(new, self.vocabulary)
            cause = difference(new, previous.decode(), shared, sections, same_agent=True).cause
        return Diagnostics(miss_reason(cause, missed))


def nearest(tokens: np.ndarray, others: Iterable[EncodedRequest]) -> tuple[EncodedRequest | None, int]:
    """The sequence that shares the most tokens with a prompt [tokens], the latest of several, and their number."""
    best, shared = None, 0
    for other in reversed(list(others)):
        # A sequence that shares more also has the next token in common.
        if shared < min(len(tokens), len(other.tokens)) and tokens[shared] == other.tokens[shared]:
            length = common_prefix(tokens, other.tokens)
            if length > shared:
                best, shared = other, length
    return best, shared


@dataclass(frozen=True)
class NearestMatches:
    """A prompt, the tokens that it reused, and the remembered sequences that are nearest to it."""

    new: RememberedRequest
    reused: int
    same_model: tuple[EncodedRequest | None, int]  # and the tokens that it shares
    other_model: tuple[EncodedRequest | None, int]
    vocabulary: Vocabulary

    @property
    def limit(self) -> int:
        """Tokens that could be reused: all but the last, which is always computed for its logits."""
        return len(self.new.prompt.tokens) - 1

    @property
    def continues(self) -> bool:
        """Whether the prompt continues the nearest sequence, which was reused whole."""
        old, shared = self.same_model
        return old is not None and shared == len(old.tokens) and self.reused >= shared - 1

    @cached_property
    def sections(self) -> Sections:
        """The sections of the prompt."""
        return sections_of(self.new, self.vocabulary)

    def difference_at(self, position: int, cause: str) -> Difference:
        """A difference by a cause that does not lie in the texts."""
        return Difference(self.sections.at(position), cause, shown_text(self.new, position, self.vocabulary), "")


def model_mismatch(matches: NearestMatches) -> Mismatch | None:
    """The mismatch if a sequence of another model shares more than any of the same."""
    old, shared = matches.other_model
    most = max(matches.same_model[1], matches.reused)
    if old is None or shared <= most or matches.sections.at(shared - 1) == "template":
        return None
    at = matches.reused
    return Mismatch(at, matches.difference_at(at, "model_changed"), min(shared, matches.limit), old.id)


def eviction(matches: NearestMatches) -> Mismatch | None:
    """The mismatch if more of the nearest sequence was evicted than lies after the first differing token."""
    old, shared = matches.same_model
    if old is None:
        return None
    evicted = min(shared, matches.limit) - matches.reused
    after_difference = min(len(old.tokens), matches.limit) - shared
    if evicted <= 1 or evicted < after_difference or matches.sections.at(shared - 1) == "template":
        return None
    at = matches.reused
    return Mismatch(at, matches.difference_at(at, "evicted"), min(shared, matches.limit), old.id)


def text_mismatch(matches: NearestMatches) -> Mismatch | None:
    """The mismatch at the first token that differs from the nearest sequence, unless the cache matched more."""
    old, shared = matches.same_model
    if old is None or matches.reused > shared:
        return None
    found = difference(matches.new, old.decode(), shared, matches.sections)
    return Mismatch(shared, found, min(len(old.tokens), matches.limit), old.id)


def unknown_mismatch(matches: NearestMatches) -> Mismatch:
    """The mismatch if no remembered sequence explains it: at the end of what the cache matched.

    A shared head comes from others, of which nothing is to be told.
    """
    at = matches.reused
    cause = "no_longer_tracked" if at > matches.new.head else "new_content"
    return Mismatch(at, matches.difference_at(at, cause), at)


def report_divergence(
    new: RememberedRequest,
    others: Sequence[EncodedRequest],
    by_tier: Mapping[str, int],
    vocabulary: Vocabulary,
    page_size: int,
    prefill_s: Callable[[int, int], float],
) -> Report:
    """What a request reused and, if there was more to reuse, where it stopped matching and why.

    Of the `others`, only those of the same salt and key count: a report on another's would tell what it contains.
    """
    tokens, reused = new.prompt.tokens, sum(by_tier.values())
    made = Report(
        id=new.id,
        time=time.time(),
        prompt_tokens=len(tokens),
        reused_tokens=reused,
        reused_by_tier=by_tier,
        recomputed_tokens=len(tokens) - reused,
        position=len(tokens),
    )
    own = [old for old in others if old.scope == new.scope]
    same_model = nearest(tokens, [old for old in own if old.model == new.model])
    other_model = nearest(tokens, [old for old in own if old.model != new.model])
    matches = NearestMatches(new, reused, same_model, other_model, vocabulary)
    if reused >= matches.limit:
        return made
    if matches.continues and other_model[1] <= same_model[1]:
        return msgspec.structs.replace(made, position=same_model[1])
    mismatch = model_mismatch(matches) or eviction(matches) or text_mismatch(matches) or unknown_mismatch(matches)
    found = mismatch.difference
    cause = "below_page_size" if len(tokens) <= page_size else found.cause
    lost = 0 if cause in UNAVOIDABLE else max(0, mismatch.matchable - reused)
    seconds = prefill_s(reused, reused + lost)
    return msgspec.structs.replace(
        made,
        position=mismatch.position,
        section=found.section,
        cause=cause,
        prompt_text=found.prompt_text,
        nearest_text=found.nearest_text,
        nearest=mismatch.nearest,
        lost_tokens=lost,
        lost_ms=1000 * seconds if math.isfinite(seconds) else None,
    )


def sections_of(request: RememberedRequest, vocabulary: Vocabulary) -> Sections:
    """The sections of a request's prompt."""
    prompt = request.prompt
    return Sections(request.request, prompt.segments, prompt.counts, prompt.tokens, vocabulary)


def shown_text(request: RememberedRequest, position: int, vocabulary: Vocabulary) -> str:
    """A few tokens of a sequence from a position on, as text."""
    return vocabulary.text(request.tokens[position : position + SHOWN_TOKENS])


def difference(
    new: RememberedRequest, old: RememberedRequest, at: int, sections: Sections, same_agent: bool = False
) -> Difference:
    """Why a prompt with these sections shares only `at` tokens with another sequence.

    With nothing in common, the other is taken for another agent's and this prompt for new, unless `same_agent`.
    """
    new_bytes, old_bytes = (sections.vocabulary.data(side.tokens[at : at + SHOWN_TOKENS]) for side in (new, old))
    # Two tokens may differ in their last byte only.
    into = common_prefix(np.frombuffer(new_bytes, np.uint8), np.frombuffer(old_bytes, np.uint8))
    section, cause = sections.at(at, into), ""
    if new.model != old.model:
        cause = "model_changed"
    else:
        section, cause = changed_part(new.request, old.request, section)
    nothing_shared = not sections.section_starts or at == 0 or sections.at(at, into - 1) == "template"
    other_agent = cause == "preamble" and agent_text(new.request) != agent_text(old.request)
    unlike = other_agent or (nothing_shared and cause in ("system_changed", "tools_changed", "tools_reordered"))
    if unlike and not same_agent:
        cause = "new_content"
    return Difference(section, cause, new_bytes.decode("utf-8", "replace"), old_bytes.decode("utf-8", "replace"))


def report_line(made: Report) -> str:
    """A report as one line of the log, without words of the prompt."""
    cost = f", {made.lost_ms:,.0f} ms" if made.lost_ms is not None else ""
    return (
        f"{made.id}: {made.reused_tokens:,} of {made.prompt_tokens:,} {made.unit} reused, mismatch at "
        f"{made.position:,} in {made.section}: {made.cause}; up to {made.lost_tokens:,} {made.unit}{cost} lost"
    )
