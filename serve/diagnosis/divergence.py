"""Why a prompt missed the cache: where it stops matching, in which section, by which words, and at what price.

Each request is compared with the latest ones, answers included: token by token to find the nearest and the mismatch
position, then part by part to name the cause. What is remembered is bounded; a request whose nearest sequence is cached
and forgotten here gets its position from the store alone.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
from msgspec import Struct

from cache.radix_tree import common_prefix
from serve.api.answers import (
    CacheMissReason,
    Diagnostics,
    MessagesChanged,
    ModelChanged,
    PreviousMessageNotFound,
    SystemChanged,
    ToolsChanged,
    Unavailable,
)
from serve.api.messages import CountTokensRequest, InputMessage, Tool, decode_count_tokens
from serve.diagnosis.sections import Sections, Vocabulary, system_parts
from serve.limits.bounds import DEFAULT_BOUNDS
from serve.limits.recent import Recent
from serve.prompt.conversation import block_text, blocks
from serve.prompt.render import Prompt, PromptSegment
from serve.rules.normalize import strip_preamble

log = logging.getLogger("tokenzero.divergence")

REMEMBERED = 32  # requests that each new one is compared with, at most
REPORT_BYTES = 2**20  # of the reports on the latest requests, about 2 KB each
NAMED = 200  # characters of a section's name, which holds that of a tool
MAX_LISTED_RULES = 32  # that changed a request
SHOWN = 12  # tokens of either side
BEGINNING = 64  # characters of a system text

CAUSES = {
    "preamble": "a billing header in front of the system text differs",
    "system_changed": "the system text differs",
    "tools_reordered": "the same tools, in another order or with their keys in another order",
    "tools_changed": "the tools differ",
    "history_edited": "an earlier message or answer differs from what was said",
    "settings_changed": "the same words, rendered in another way: thinking or tool_choice differ",
    "new_content": "nobody has said this before",
    "below_page_size": "the prompt is shorter than a page",
    "evicted": "it was cached, and had to make room",
    "no_longer_tracked": "the nearest sequence is cached, and no longer remembered by this report",
    "model_changed": "the nearest sequence is another model's",
    "salt": "the nearest sequence has another cache salt",
}
# Nothing that was computed before is computed again, as far as is known.
UNAVOIDABLE = ("new_content", "below_page_size", "no_longer_tracked")


@dataclass(frozen=True, eq=False)
class RememberedRequest:
    """A request as it was rendered, and what was sampled for it."""

    id: str  # of its message
    request: CountTokensRequest  # as the rules left it
    prompt: Prompt
    tokens: np.ndarray  # [tokens] int32: the prompt and, once there is one, the whole answer
    model: str  # whatever names the weights
    salt: bytes = b""


@dataclass(frozen=True, eq=False)
class Kept:
    """What is remembered of a request, which itself is kept as JSON: read, it would take many times as much."""

    id: str
    body: bytes  # JSON of the request as the rules left it
    pieces: tuple[PromptSegment, ...]
    counts: tuple[int, ...]
    prompt_tokens: int
    tokens: np.ndarray  # [tokens] int32, as in RememberedRequest
    model: str
    salt: bytes

    @staticmethod
    def of(seen: RememberedRequest) -> Kept:
        """What to remember of a request."""
        made = seen.prompt
        body = msgspec.json.encode(seen.request)
        return Kept(seen.id, body, made.segments, made.counts, len(made.tokens), seen.tokens, seen.model, seen.salt)

    @property
    def bytes(self) -> int:
        """Memory that it takes, about."""
        pieces = sum(map(sys.getsizeof, self.pieces)) + 40 * len(self.counts)
        return sys.getsizeof(self.body) + pieces + self.tokens.nbytes + len(self.model) + len(self.salt) + 1000

    def seen(self) -> RememberedRequest:
        """The request as it was."""
        tokens = self.tokens[: self.prompt_tokens]
        made = Prompt(self.pieces, tokens, self.counts, None, tokens[:0], False)
        return RememberedRequest(self.id, decode_count_tokens(self.body), made, self.tokens, self.model, self.salt)


@dataclass(frozen=True)
class Difference:
    """What keeps a prompt from matching a sequence any further."""

    section: str
    cause: str
    here: str  # a few tokens of the prompt from the mismatch on
    there: str  # of the other sequence


class Report(Struct, frozen=True, omit_defaults=True):
    """What a request found in the cache, and what kept it from finding more. `position` and lengths are in `unit`."""

    id: str
    time: float  # seconds since 1970
    prompt_tokens: int
    reused_tokens: int
    reused_by_tier: Mapping[str, int]
    recomputed_tokens: int
    position: int  # the mismatch position; prompt_tokens where there is none
    section: str | None = None
    cause: str | None = None  # None: it goes on where a cached sequence ends
    here: str | None = None
    there: str | None = None
    nearest: str | None = None  # id of the message whose sequence is nearest
    lost_tokens: int = 0  # of these recomputed, the ones that the nearest sequence held, at most
    lost_ms: float | None = None  # what computing them took, by the cost model; None if it knows nothing
    rules: tuple[str, ...] = ()  # that changed the request, with their places
    unit: str = "tokens"  # or characters, where no tokenizer is known


class Divergences:
    """The latest requests and their reports. Any thread may use it.

    `prefill_s(start, stop)` is the cost in seconds of computing tokens [start, stop), infinite if not known.
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
        self.vocabulary, self.page_size, self.prefill_s, self.show_prompt_text = (
            vocabulary,
            page_size,
            prefill_s,
            show_prompt_text,
        )
        self.unit = unit
        self.kept: Recent[str, Kept] = Recent(most_bytes, lambda kept: kept.bytes, REMEMBERED)
        self.reports: Recent[str, Report] = Recent(REPORT_BYTES, lambda made: 1000 + len(msgspec.json.encode(made)))

    def started(self, new: RememberedRequest, by_tier: Mapping[str, int], rules: tuple[str, ...] = ()) -> Report:
        """Report on a request whose prompt is computed, `by_tier` of it reused, and remember it."""
        others = self.kept.values()
        self.kept.put(new.id, Kept.of(new))
        made = report(new, others, by_tier, self.vocabulary, self.page_size, self.prefill_s)
        hidden = {} if self.show_prompt_text else {"here": None, "there": None}
        section = made.section and made.section[:NAMED]
        made = msgspec.structs.replace(made, section=section, rules=rules[:MAX_LISTED_RULES], unit=self.unit, **hidden)
        self.reports.put(made.id, made)
        if made.cause and made.cause not in UNAVOIDABLE:
            log.info("%s", sentence(made))
        return made

    def answered(self, id: str, answer: Sequence[int]) -> None:
        """Remember what was sampled for a request, without its stop token."""

        def longer(kept: Kept | None) -> Kept | None:
            return kept and replace(kept, tokens=np.concatenate([kept.tokens, np.asarray(answer, np.int32)]))

        self.kept.change(id, longer)

    @property
    def bytes(self) -> int:
        """Memory that is taken, about."""
        return self.kept.bytes + self.reports.bytes

    def latest(self) -> list[Report]:
        """The reports, the latest first."""
        return self.reports.values()[::-1]

    def find(self, id: str) -> tuple[Report, list[tuple[str, int, int]] | None] | None:
        """A request's report and its sections as (name, first token, token behind the last), None once forgotten."""
        made, kept = self.reports.peek(id), self.kept.peek(id)
        if made is None:
            return None
        return made, sections_of(kept.seen(), self.vocabulary).ranges() if kept else None

    def diagnose(self, new: RememberedRequest, previous_id: str | None, reused: int) -> Diagnostics | None:
        """The API's answer to `diagnostics.previous_message_id`; None if nothing was missed."""
        if previous_id is None:
            return None
        previous = self.kept.peek(previous_id)
        if previous is None:
            return Diagnostics(PreviousMessageNotFound())
        held = previous.prompt_tokens
        missed = min(held, len(new.prompt.tokens) - 1) - reused
        shared = common_prefix(new.prompt.tokens, previous.tokens)
        if missed <= 0 or (shared == len(previous.tokens) and reused >= shared - 1):
            return None
        cause = "evicted"
        if reused >= min(shared, len(new.prompt.tokens) - 1) - 1:
            cause = difference(new, previous.seen(), shared, sections_of(new, self.vocabulary)).cause
        return Diagnostics(miss_reason(cause, missed))


def nearest(tokens: np.ndarray, others: Iterable[Kept]) -> tuple[Kept | None, int]:
    """The latest of the sequences that share the most tokens with a prompt, and how many."""
    best, shared = None, 0
    for seen in reversed(list(others)):
        # Whoever shares more has the next token in common, too.
        if shared < min(len(tokens), len(seen.tokens)) and tokens[shared] == seen.tokens[shared]:
            length = common_prefix(tokens, seen.tokens)
            if length > shared:
                best, shared = seen, length
    return best, shared


def report(
    new: RememberedRequest,
    others: Sequence[Kept],
    by_tier: Mapping[str, int],
    vocabulary: Vocabulary,
    page_size: int,
    prefill_s: Callable[[int, int], float],
) -> Report:
    """What a request reused and, if there was more to find, where it stopped matching and why."""
    tokens = new.prompt.tokens
    reused, limit = sum(by_tier.values()), len(tokens) - 1  # the last token always runs, for its logits
    scope = (new.model, new.salt)
    old, shared = nearest(tokens, [seen for seen in others if (seen.model, seen.salt) == scope])
    stranger, further = nearest(tokens, [seen for seen in others if (seen.model, seen.salt) != scope])
    goes_on = old is not None and shared == len(old.tokens) and reused >= shared - 1
    made = Report(
        id=new.id,
        time=time.time(),
        prompt_tokens=len(tokens),
        reused_tokens=reused,
        reused_by_tier=by_tier,
        recomputed_tokens=len(tokens) - reused,
        position=len(tokens),
    )
    if reused >= limit:
        return made
    if goes_on and further <= shared:
        return msgspec.structs.replace(made, position=shared)
    sections = sections_of(new, vocabulary)
    # Of what the nearest sequence held: what made room, and what stands behind the difference. The larger is the cause.
    gone = min(shared, limit) - reused
    behind = min(len(old.tokens), limit) - shared if old else 0
    if stranger and further > max(shared, reused) and sections.at(further - 1) != "template":
        foreign = "model_changed" if stranger.model != new.model else "salt"
        old, at, held = stranger, reused, min(further, limit)
        found = Difference(sections.at(at), foreign, shown(new, at, vocabulary), "")
    elif old and gone > 1 and gone >= behind and sections.at(shared - 1) != "template":
        at, held = reused, min(shared, limit)
        found = Difference(sections.at(at), "evicted", shown(new, at, vocabulary), "")
    elif old and reused <= shared:
        at, held = shared, min(len(old.tokens), limit)
        found = difference(new, old.seen(), at, sections)
    else:
        old, at, held = None, reused, reused
        cause = "no_longer_tracked" if reused else "new_content"
        found = Difference(sections.at(at), cause, shown(new, at, vocabulary), "")
    cause = "below_page_size" if len(tokens) <= page_size else found.cause
    lost = 0 if cause in UNAVOIDABLE else max(0, held - reused)
    seconds = prefill_s(reused, reused + lost)
    return msgspec.structs.replace(
        made,
        position=at,
        section=found.section,
        cause=cause,
        here=found.here,
        there=found.there,
        nearest=old.id if old else None,
        lost_tokens=lost,
        lost_ms=1000 * seconds if math.isfinite(seconds) else None,
    )


def sections_of(seen: RememberedRequest, vocabulary: Vocabulary) -> Sections:
    """The sections of a request's prompt."""
    return Sections(seen.request, seen.prompt.segments, seen.prompt.counts, seen.prompt.tokens, vocabulary)


def shown(seen: RememberedRequest, at: int, vocabulary: Vocabulary) -> str:
    """A few tokens of a sequence."""
    return vocabulary.text(seen.tokens[at : at + SHOWN])


def difference(new: RememberedRequest, old: RememberedRequest, at: int, sections: Sections) -> Difference:
    """Why a prompt, which has these sections, and a sequence that share `at` tokens share no more."""
    here, there = (sections.vocabulary.data(seen.tokens[at : at + SHOWN]) for seen in (new, old))
    # Tokens may begin alike and differ in their last byte.
    into = common_prefix(np.frombuffer(here, np.uint8), np.frombuffer(there, np.uint8))
    section, cause = why(new, old, sections.at(at, into))
    begins = not sections.section_starts or at == 0 or sections.at(at, into - 1) == "template"
    strangers = cause == "preamble" and beginning(new.request) != beginning(old.request)
    if strangers or (begins and cause in ("system_changed", "tools_changed", "tools_reordered")):
        cause = "new_content"
    return Difference(section, cause, here.decode("utf-8", "replace"), there.decode("utf-8", "replace"))


def beginning(request: CountTokensRequest) -> str:
    """What a system text begins with behind its headers: whether two requests are of one agent."""
    return "".join(strip_preamble(text).kept for _, text in system_parts(request))[:BEGINNING]


def why(new: RememberedRequest, old: RememberedRequest, section: str) -> tuple[str, str]:
    """The section and the cause of a difference that was found in `section`, where the template may have moved it."""
    if new.model != old.model:
        return section, "model_changed"
    if new.salt != old.salt:
        return section, "salt"
    kind = section.partition("[")[0]
    checks = {"system": system_cause, "tools": tools_cause, "messages": messages_cause}
    for part in sorted(checks, key=lambda part: part != kind):
        if cause := checks[part](new.request, old.request, section):
            return (section if part == kind else part), cause
    return section, "settings_changed"


def system_cause(new: CountTokensRequest, old: CountTokensRequest, section: str) -> str | None:
    """Why system texts differ, if they do."""
    ours, theirs = ([text for _, text in system_parts(request)] for request in (new, old))
    return text_cause(ours, theirs) if ours != theirs else None


def text_cause(ours: Sequence[str], theirs: Sequence[str]) -> str:
    """Whether system texts differ in a header in front of one of them, or in what follows."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    headers = [strip_preamble(text).removed for texts in (ours, theirs) for text in texts[at : at + 1]]
    return "preamble" if any(headers) and (len(headers) == 1 or headers[0] != headers[1]) else "system_changed"


def tools_cause(new: CountTokensRequest, old: CountTokensRequest, section: str) -> str | None:
    """Why tools differ, if they do. Chat templates keep the order of keys, so that counts."""

    def written(tools: Iterable[Tool], order: str | None) -> list[bytes]:
        return [msgspec.json.encode(tool, order=order) for tool in tools]  # type: ignore[arg-type]

    ours, theirs = new.tools or (), old.tools or ()
    try:
        if written(ours, None) == written(theirs, None):
            return None
        same = sorted(written(ours, "sorted")) == sorted(written(theirs, "sorted"))
    except RecursionError:  # schemas that nest too deeply to be compared
        same = False
    return "tools_reordered" if same else "tools_changed"


def messages_cause(new: CountTokensRequest, old: CountTokensRequest, section: str) -> str | None:
    """Why messages differ, if they do, from the one named by `section` on."""
    ours, theirs = new.messages, old.messages
    named = int(section.partition("[")[2].partition("]")[0]) if section.startswith("messages") else 0
    at = named
    while at < min(len(ours), len(theirs)) and blocks(ours[at]) == blocks(theirs[at]):
        at += 1
    if at == len(ours) or named < at == len(theirs):
        if section.endswith(("assistant", "thinking", "tool_use")):
            return "history_edited"  # the same content: the answer was not rendered as it was sampled
        return "new_content" if section.startswith("messages") and len(ours) < len(theirs) else None
    if ours[at].role == "system" and at < len(theirs):
        cause = text_cause(system_texts(ours[at]), system_texts(theirs[at]))
        if cause == "preamble":
            return cause
    again = at > 0 or any(blocks(a) == blocks(b) for a, b in zip(ours[at + 1 :], theirs[at + 1 :], strict=False))
    edited = again and any(message.role == "assistant" for message in ours[at:])
    return "history_edited" if edited else "new_content"


def system_texts(message: InputMessage) -> list[str]:
    """The texts of a message."""
    return [block_text(block) for block in blocks(message)]


def miss_reason(cause: str, missed: int) -> CacheMissReason:
    """A cause in the API's terms, which know no more than which part changed."""
    if cause == "model_changed":
        return ModelChanged(missed)
    if cause in ("preamble", "system_changed"):
        return SystemChanged(missed)
    if cause in ("tools_reordered", "tools_changed"):
        return ToolsChanged(missed)
    if cause in ("history_edited", "new_content"):
        return MessagesChanged(missed)
    return Unavailable()


def sentence(made: Report) -> str:
    """A report on one line."""
    parts = [
        f"{made.id}: {made.reused_tokens:,} of {made.prompt_tokens:,} {made.unit} reused,",
        f"mismatch at {made.position:,} in {made.section}: {made.cause};",
        f"up to {made.lost_tokens:,} {made.unit}"
        + (f", {made.lost_ms:,.0f} ms" if made.lost_ms is not None else "")
        + " lost",
    ]
    texts = f" ({made.here!r:.80} where there was {made.there!r:.80})" if made.here and made.there else ""
    return " ".join(parts) + texts
