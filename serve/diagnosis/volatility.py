"""Segments of a client's prompts that change in every request while their neighbours stay the same.

So a new volatile field of a client is noticed before any rule knows it. Nothing here changes a request. A segment is a
line of a system text, a line of a reminder in a user's message, or a whole tool definition. Other texts of users, tools
and the model are not segments.
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
from serve.prompt.conversation import shown

log = logging.getLogger("tokenzero.volatility")

REQUESTS = 5  # consecutive requests with different values, after which a segment is reported
LINES = 3  # neighbours that may change together: more are a new text, not a field
VALUES = 64  # remembered values of a segment: one that comes back is not new
REPORTED = 256  # volatile segments that are kept
FOUND_BYTES = 1000  # memory that one of them takes at most, approximately
SHOWN_CHARS = 200  # of a segment or of a name
MAX_SEGMENTS = 2**14  # of a request; later ones are ignored
SEGMENT_BYTES, VALUE_BYTES, CLIENT_BYTES = 500, 40, 1000  # memory that each takes at most, approximately

Place = tuple[str, int]  # the name of a section, and the line in it
Segment = tuple[int, str]  # the hash of its text, and the start of the text


class Volatile(Struct, frozen=True, omit_defaults=True):
    """A segment that has another value in each of a client's requests."""

    client: str  # user agent
    section: str
    line: int  # from 0, over all texts of that section
    requests: int  # of this client, up to the one in which it was noticed
    before: str | None = None
    after: str | None = None
    key: str = ""  # the name of the API key that sent them


@dataclass
class Client:
    """The state of one client: its last request, and the places that changed."""

    requests: int = 0
    segments: dict[Place, Segment] = field(default_factory=dict)
    streaks: dict[Place, int] = field(default_factory=dict)  # consecutive changes
    values: dict[Place, list[int]] = field(default_factory=dict)  # hashes of the values, for places in the last request
    reported: set[Place] = field(default_factory=set)  # places in the last request

    @property
    def bytes(self) -> int:
        """The memory that it takes, approximately."""
        places = len(self.segments) + len(self.reported)
        return CLIENT_BYTES + places * SEGMENT_BYTES + sum(map(len, self.values.values())) * VALUE_BYTES


class Volatility:
    """Compares each client's consecutive requests. Any thread may use it."""

    def __init__(self, show_prompt_text: bool = True, most_bytes: int = DEFAULT_BOUNDS.volatility) -> None:
        self.show_prompt_text = show_prompt_text
        self.clients: Recent[bytes, Client] = Recent(most_bytes, lambda client: client.bytes)
        self.found: list[Volatile] = []
        self.lock = Lock()

    def observe(self, user_agent: str, request: CountTokensRequest, key: str = "") -> list[Volatile]:
        """The segments first noticed as volatile in a client's next request, which is given as the rules left it.

        `key` is the name of its API key: one agent with two keys is two clients.
        """
        names = (key, user_agent, *(tool.name for tool in request.tools or () if not tool.defer_loading))
        id = hashlib.blake2b("\0".join(names).encode("utf-8", "replace"), digest_size=16).digest()
        user_agent = user_agent[:SHOWN_CHARS]
        segments = {
            place: (hash(text), text[:SHOWN_CHARS]) for place, text in islice(segments_of(request), MAX_SEGMENTS)
        }
        with self.lock:
            client = self.clients.get(id) or Client()
            noticed = [
                Volatile(user_agent, section, line, client.requests, *self.shown(before, after), key=key)
                for (section, line), before, after in volatile_segments(client, segments)
            ]
            self.clients.put(id, client)
            self.found += noticed
            del self.found[:-REPORTED]
        for new in noticed:
            log.warning("line %d of %s changes in every request of %.80r", new.line, new.section, user_agent)
        return noticed

    def shown(self, before: str, after: str) -> tuple[str | None, str | None]:
        """The texts of a segment as they are reported."""
        return (before, after) if self.show_prompt_text else (None, None)

    @property
    def bytes(self) -> int:
        """The memory in use, approximately."""
        return self.clients.bytes + len(self.found) * FOUND_BYTES

    def latest(self, viewer: str | None = None) -> list[Volatile]:
        """The volatile segments noticed so far, the latest first; of a `viewer`, those of the key with this name."""
        with self.lock:
            return [found for found in self.found[::-1] if viewer in (None, found.key)]


def volatile_segments(client: Client, segments: dict[Place, Segment]) -> list[tuple[Place, str, str]]:
    """The places that have changed often enough with these segments, with their texts before and now."""
    old, client.segments = client.segments, segments
    client.requests += 1
    before, now = (Counter(section for section, _ in places) for places in (old, segments))
    noticed = []
    streaks: dict[Place, int] = {}
    # In a section with another number of lines, a line number may mean another line.
    comparable = [place for place in segments if before[place[0]] == now[place[0]]]
    for changed, run in groupby(comparable, key=lambda place: old[place] != segments[place]):
        places = list(run)
        if not changed or len(places) > LINES or len(places) == len(comparable):
            continue
        for place in places:
            value, values = segments[place][0], client.values.setdefault(place, [old[place][0]])
            if value in values:
                continue
            values.append(value)
            del values[:-VALUES]
            streaks[place] = client.streaks.get(place, 0) + 1
            if streaks[place] == REQUESTS - 1 and place not in client.reported:
                client.reported.add(place)
                noticed.append((place, old[place][1], segments[place][1]))
    client.streaks = streaks
    client.values = {place: values for place, values in client.values.items() if place in segments}
    client.reported &= segments.keys()
    return noticed


def segments_of(request: CountTokensRequest) -> Iterator[tuple[Place, str]]:
    """The segments of a request, in order, with their places."""
    count: Counter[str] = Counter()

    def lines_of(section: str, text: str) -> Iterator[tuple[Place, str]]:
        for line in text.split("\n"):
            yield (section, count[section]), line
            count[section] += 1

    for section, text in system_parts(request):
        yield from lines_of(section, text)
    for i, tool in enumerate(request.tools or ()):
        if not tool.defer_loading:
            yield (f"tools[{i}] {tool.name:.{SHOWN_CHARS}}", 0), msgspec.json.encode(tool).decode()
    for section, block in message_parts(shown(request.messages)):
        if isinstance(block, TextBlock) and (section.endswith("system") or block.text.startswith("<system-reminder>")):
            yield from lines_of(section, block.text)
