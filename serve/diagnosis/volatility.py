"""Which parts of a client's prompts change in every request though their neighbours do not.

So a new volatile field is noticed when a client's format drifts, before any rule knows it. Nothing here changes a
request. A segment is a line of a system text, a line of a reminder in a user's message, or a whole tool; what users,
tools and the model said is none.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from threading import Lock

import msgspec
from msgspec import Struct

from serve.api.messages import CountTokensRequest, TextBlock
from serve.diagnosis.sections import message_parts, system_parts
from serve.limits.bounds import DEFAULT_BOUNDS
from serve.limits.recent import Recent

log = logging.getLogger("tokenzero.volatility")

REQUESTS = 5  # in a row that a segment differs in before it is reported
LINES = 3  # neighbours that change together, at most: more is a new text and no field
VALUES = 64  # of a segment that are remembered: one that comes back is no new one
REPORTED = 256
FOUND_BYTES = 1000  # that one of them takes at most, about
SHOWN = 200  # characters of a segment, or of a name
SEGMENTS = 2**14  # of a request that are looked at: the first ones
SEGMENT_BYTES, VALUE_BYTES, CLIENT_BYTES = 500, 40, 1000  # of memory that each takes at most, about

Place = tuple[str, int]  # a part's name, and the line in it
Segment = tuple[int, str]  # its hash, and how it begins


class Volatile(Struct, frozen=True, omit_defaults=True):
    """A segment that differs in each of a client's requests."""

    client: str  # user agent
    section: str
    line: int  # counted from 0, over all texts of that name
    requests: int  # of this client, when it was noticed
    before: str | None = None
    after: str | None = None


@dataclass
class Client:
    """What is known of one client: its last request, and the places that changed."""

    requests: int = 0
    segments: dict[Place, Segment] = field(default_factory=dict)
    streaks: dict[Place, int] = field(default_factory=dict)
    values: dict[Place, list[int]] = field(default_factory=dict)  # hashes, of places in the last request
    reported: set[Place] = field(default_factory=set)  # of places in the last request

    @property
    def bytes(self) -> int:
        """Memory that it takes, about."""
        places = len(self.segments) + len(self.reported)
        return CLIENT_BYTES + places * SEGMENT_BYTES + sum(map(len, self.values.values())) * VALUE_BYTES


class Volatility:
    """Compares each client's consecutive requests. Any thread may use it."""

    def __init__(self, show_prompt_text: bool = True, most_bytes: int = DEFAULT_BOUNDS.volatility) -> None:
        self.show_prompt_text = show_prompt_text
        self.clients: Recent[bytes, Client] = Recent(most_bytes, lambda client: client.bytes)
        self.found: list[Volatile] = []
        self.lock = Lock()

    def observe(self, user_agent: str, request: CountTokensRequest) -> list[Volatile]:
        """Take a client's next request, as the rules left it; returns what is noticed with it for the first time."""
        names = (user_agent, *(tool.name for tool in request.tools or ()))
        key = hashlib.blake2b("\0".join(names).encode("utf-8", "replace"), digest_size=16).digest()
        user_agent = user_agent[:SHOWN]
        segments = {place: (hash(text), text[:SHOWN]) for place, text in islice(segments_of(request), SEGMENTS)}
        with self.lock:
            client = self.clients.get(key) or Client()
            noticed = [
                Volatile(
                    user_agent,
                    section,
                    line,
                    client.requests,
                    *((before, after) if self.show_prompt_text else ()),
                )
                for (section, line), before, after in follow(client, segments)
            ]
            self.clients.put(key, client)
            self.found += noticed
            del self.found[:-REPORTED]
        for new in noticed:
            log.warning("line %d of %s changes in every request of %.80r", new.line, new.section, user_agent)
        return noticed

    @property
    def bytes(self) -> int:
        """Memory that is taken, about."""
        return self.clients.bytes + len(self.found) * FOUND_BYTES

    def latest(self) -> list[Volatile]:
        """All that was noticed, the latest first."""
        with self.lock:
            return self.found[::-1]


def follow(client: Client, segments: dict[Place, Segment]) -> list[tuple[Place, str, str]]:
    """Compare a client's segments with those before: the places that have differed long enough, and their texts."""
    old, client.segments = client.segments, segments
    client.requests += 1
    before, now = (Counter(section for section, _ in places) for places in (old, segments))
    noticed = []
    fresh: dict[Place, int] = {}
    # Lines of a text that has become longer or shorter are other lines.
    comparable = [place for place in segments if before[place[0]] == now[place[0]]]
    for changed, run in groupby(comparable, key=lambda place: old[place] != segments[place]):
        places = list(run)
        if not changed or len(places) > LINES or len(places) == len(comparable):
            continue
        for place in places:
            value, seen = segments[place][0], client.values.setdefault(place, [old[place][0]])
            if value in seen:
                continue
            seen.append(value)
            del seen[:-VALUES]
            fresh[place] = client.streaks.get(place, 0) + 1
            if fresh[place] == REQUESTS - 1 and place not in client.reported:
                client.reported.add(place)
                noticed.append((place, old[place][1], segments[place][1]))
    client.streaks = fresh
    client.values = {place: seen for place, seen in client.values.items() if place in segments}
    client.reported &= segments.keys()
    return noticed


def segments_of(request: CountTokensRequest) -> Iterator[tuple[Place, str]]:
    """The segments of a request, in their order."""
    count: Counter[str] = Counter()

    def lines_of(section: str, text: str) -> Iterator[tuple[Place, str]]:
        for line in text.split("\n"):
            yield (section, count[section]), line
            count[section] += 1

    for section, text in system_parts(request):
        yield from lines_of(section, text)
    for i, tool in enumerate(request.tools or ()):
        yield (f"tools[{i}] {tool.name:.{SHOWN}}", 0), msgspec.json.encode(tool).decode()
    for section, block in message_parts(request):
        if isinstance(block, TextBlock) and (section.endswith("system") or block.text.startswith("<system-reminder>")):
            yield from lines_of(section, block.text)
