"""Recorded sessions of coding agents, in the format of https://github.com/callanjfox/kv-cache-tester, one by one.

A file is one session as JSON. It has no text: a prompt is its length and an id for every full block of 64 tokens. Ids
are chained, so that equal ids of a file stand for equal text after equal text; they mean nothing in another file.
"""

from __future__ import annotations

import logging
import re
import tarfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from lzma import LZMAError
from pathlib import Path
from typing import Annotated
from zlib import error as ZlibError

import msgspec
import numpy as np

BLOCK = 64  # tokens, where a file does not say
SOURCE = "https://github.com/callanjfox/kv-cache-tester"
LOGGER = logging.getLogger("tokenzero.traces")
DAMAGE = (tarfile.TarError, EOFError, OSError, LZMAError, ZlibError)  # of a file or an archive that is read
UNSEEN = -2  # what an id follows that was not seen yet
NOTHING = np.array([-1], np.int32)  # [1] int32, what the first id of a prompt follows

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Seconds = Annotated[float, msgspec.Meta(ge=0, lt=1e9)]
Place = tuple[int, ...]  # of a request in a file: its number among the requests, and so on within a sub-agent


@dataclass(frozen=True, slots=True)
class Agent:
    """Who sends requests: a session's main agent, or one that another agent started."""

    id: str  # unique in its session; empty for the main agent
    parent: str | None  # the id of the agent that started it
    tool_tokens: int  # of tools and system text, which come first in its prompts; as recorded, so about
    system_tokens: int

    @property
    def head_tokens(self) -> int:
        """Tokens of tools and system text together."""
        return self.tool_tokens + self.system_tokens


@dataclass(frozen=True, eq=False, slots=True)
class TraceRequest:
    """One recorded request and how its answer ended."""

    agent: Agent
    model: str
    t_s: float  # when it was sent, since the session began
    input_tokens: int
    output_tokens: int
    hash_ids: np.ndarray  # [blocks] int32, the full blocks of its prompt
    stop: str  # why its answer ended: tool_use, end_turn; empty where that is not known
    api_time_s: float | None  # until its answer was complete
    ttft_s: float | None  # until its answer began, of some that were streamed
    think_time_s: float | None  # from the answer before it to this request


@dataclass(frozen=True, eq=False, slots=True)
class Trace:
    """One session: the requests of an agent, and of those that it started, each behind the request that it follows."""

    file: str  # its name in the folder or archive
    id: str
    block_size: int  # tokens that an id stands for
    tool_tokens: int  # of the main agent
    system_tokens: int
    requests: Sequence[TraceRequest]  # in the file's order, which is an agent's own; `t_s` of agents may overlap


class RequestEntry(msgspec.Struct, tag_field="type", tag="n", rename={"input_tokens": "in", "output_tokens": "out"}):
    """A request as the file has it."""

    t: Seconds
    input_tokens: Count
    output_tokens: Count
    hash_ids: list[Count]
    model: str = ""
    stop: str | None = None
    api_time: Seconds | None = None
    ttft: Seconds | None = None
    think_time: Seconds | None = None


class StreamedEntry(RequestEntry, tag="s", rename={"input_tokens": "in", "output_tokens": "out"}):
    """A request whose answer was streamed."""


class SubagentEntry(msgspec.Struct, tag_field="type", tag="subagent"):
    """An agent that the one around it started; its times count from its own `t`."""

    requests: list[Entry]
    t: Seconds = 0.0
    agent_id: str = ""
    tool_tokens: Count = 0
    system_tokens: Count = 0


Entry = RequestEntry | StreamedEntry | SubagentEntry


class TraceFile(msgspec.Struct):
    """A whole file."""

    id: str
    requests: list[Entry]
    block_size: Annotated[int, msgspec.Meta(ge=1, lt=2**20)] = BLOCK
    tool_tokens: Count = 0
    system_tokens: Count = 0


class RawFile(msgspec.Struct):
    """A file, or a sub-agent in it, whose requests are not looked into: to find the line of one."""

    requests: list[msgspec.Raw]


class BrokenError(ValueError):
    """A file that cannot be used: why, and at which request or byte."""

    def __init__(self, reason: str, place: Place = (), byte: int | None = None) -> None:
        super().__init__(reason)
        self.place = place
        self.byte = byte


def read_traces(
    path: Path | str, skipped: Callable[[str], object] = LOGGER.warning, only: Collection[str] | None = None
) -> Iterator[Trace]:
    """The sessions of a folder, of an archive (`.tar`, also compressed) or of one `.json`; one is held at a time.

    A file that is cut, of another format, or whose ids or times are out of order costs the others nothing: a line that
    names it, with the line in it and the reason, goes to `skipped`, such as a list's `append`. `only` names the files
    to read. Raises OSError for a path that cannot be read, ValueError if not one file could be used.
    """
    good = bad = 0

    def skip(line: str) -> None:
        nonlocal bad
        bad += 1
        skipped(line)

    for name, read in trace_files(Path(path), skip):
        if only is not None and name not in only:
            continue
        try:
            trace = decode_trace(data := read(), name)
        except BrokenError as error:
            place = f"request {'.'.join(map(str, error.place))}: " if error.place else ""
            skip(f"{name}, line {line_of(data, error)}: {place}{error}; this trace is left out")
            continue
        except DAMAGE as error:
            skip(f"{name}: cannot be read from {path}: {error or type(error).__name__}; this trace is left out")
            continue
        good += 1
        yield trace
    if not good:
        raise ValueError(f"{path}: no trace could be read, {bad} were left out; expected .json files as in {SOURCE}")


def trace_names(path: Path | str) -> list[str]:
    """The names of the files that `read_traces` would try, sorted."""
    return sorted(name for name, _ in trace_files(Path(path), LOGGER.warning))


def trace_files(path: Path, skipped: Callable[[str], object]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Name and contents of each `.json` file; contents must be taken before the next name.

    An archive is read once from its start to its end, and what comes behind a place where it is damaged is lost.
    """
    path.stat()  # raises FileNotFoundError, where reading would only say that nothing was found
    if path.is_dir():
        for file in sorted(path.rglob("*.json")):
            yield file.relative_to(path).as_posix(), file.read_bytes
        return
    if path.suffix == ".json":
        yield path.name, path.read_bytes
        return
    last = "its start"
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                last = member.name
                if member.isfile() and member.name.endswith(".json"):
                    yield member.name, partial(data_of, archive, member)
    except DAMAGE as error:
        skipped(f"{path}: damaged behind {last}: {error}; traces that come later are left out")


def data_of(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """A regular file of an archive. Raises one of DAMAGE."""
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def decode_trace(data: bytes, name: str) -> Trace:
    """The session in a file's bytes. Raises BrokenError."""
    try:
        file = msgspec.json.decode(data, type=TraceFile)
    except msgspec.ValidationError as error:
        raise BrokenError(f"{error}; expected a trace as in {SOURCE}", wrong_place(data)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        byte = re.search(r"\(byte (\d+)\)", str(error))
        raise BrokenError(f"{error}; it is cut, or no JSON", byte=int(byte[1]) if byte else len(data)) from None
    except RecursionError:
        raise BrokenError("agents are nested too deeply") from None
    main = Agent("", None, file.tool_tokens, file.system_tokens)
    placed = list(flatten(file.requests, main, 0.0, (), {""}))
    check_lengths(placed, file.block_size)
    check_chains(placed)
    requests = [request for _, request in placed]
    return Trace(name, file.id, file.block_size, file.tool_tokens, file.system_tokens, requests)


def flatten(
    entries: Sequence[Entry], agent: Agent, began_s: float, above: Place, taken: set[str]
) -> Iterator[tuple[Place, TraceRequest]]:
    """An agent's requests, and those of its sub-agents where they stand, each with its place.

    Raises BrokenError for a request that was sent before the one above it.
    """
    before = 0.0
    for number, entry in enumerate(entries):
        place = (*above, number)
        if isinstance(entry, SubagentEntry):
            name = entry.agent_id if entry.agent_id not in taken else f"{entry.agent_id}#{len(taken)}"
            taken.add(name)
            own = Agent(name, agent.id, entry.tool_tokens, entry.system_tokens)
            yield from flatten(entry.requests, own, began_s + entry.t, place, taken)
            continue
        if entry.t < before:
            raise BrokenError(f"t is {entry.t}, expected at least {before}, that of the request before it", place)
        before = entry.t
        yield (
            place,
            TraceRequest(
                agent=agent,
                model=entry.model,
                t_s=began_s + entry.t,
                input_tokens=entry.input_tokens,
                output_tokens=entry.output_tokens,
                hash_ids=np.array(entry.hash_ids, np.int32),
                stop=entry.stop or "",
                api_time_s=entry.api_time,
                ttft_s=entry.ttft,
                think_time_s=entry.think_time,
            ),
        )


def check_lengths(placed: Sequence[tuple[Place, TraceRequest]], block_size: int) -> None:
    """Raise BrokenError unless every prompt has an id for each of its full blocks; one for the rest may follow."""
    for place, request in placed:
        full = request.input_tokens // block_size
        if not full <= len(request.hash_ids) <= -(-request.input_tokens // block_size):
            raise BrokenError(
                f"{len(request.hash_ids)} hash_ids, expected {full} for {request.input_tokens} tokens in blocks of "
                f"{block_size}",
                place,
            )


def check_chains(placed: Sequence[tuple[Place, TraceRequest]]) -> None:
    """Raise BrokenError for an id that follows another id than it did before, which chained ids never do."""
    highest = max((int(request.hash_ids.max(initial=0)) for _, request in placed), default=0)
    blocks = sum(len(request.hash_ids) for _, request in placed)
    if highest > 16 * blocks + 1000:  # the table below would be far larger than the file
        raise BrokenError(f"an id of {highest} among {blocks}, expected ids that count up from 1")
    before = np.full(highest + 1, UNSEEN, np.int32)  # [ids] the id that each one follows
    for place, request in placed:
        ids = request.hash_ids
        follows = np.concatenate([NOTHING, ids[:-1]])[: len(ids)]  # [blocks] int32
        known = before[ids]
        before[ids] = follows
        # Beside ids that were seen elsewhere, one that comes twice in this prompt.
        wrong = ((known != UNSEEN) & (known != follows)) | (before[ids] != follows)
        if wrong.any():
            at = int(wrong.argmax())
            raise BrokenError(
                f"the hash_ids are out of order: {ids[at]} comes behind {follows[at]}, and elsewhere it does not", place
            )


def wrong_place(data: bytes) -> Place:
    """The first request of a file or a sub-agent that cannot be decoded; empty if what is around them cannot."""
    with suppress(msgspec.MsgspecError):
        for number, raw in enumerate(msgspec.json.decode(data, type=RawFile).requests):
            try:
                msgspec.json.decode(raw, type=Entry)
            except msgspec.ValidationError:
                return (number, *wrong_place(bytes(raw)))
    return ()


def line_of(data: bytes, error: BrokenError) -> int:
    """The line of a file, from 1, on which the wrong byte stands or the wrong request begins."""
    if error.byte is not None:
        return data.count(b"\n", 0, error.byte) + 1
    begin, part = 0, data
    for number in error.place:
        at = part.index(b'"requests"')
        for raw in map(bytes, msgspec.json.decode(part, type=RawFile).requests[: number + 1]):
            at, found = part.index(raw, at), raw  # one request lies behind the other
            at += len(raw)
        begin, part = begin + at - len(found), found
    return data.count(b"\n", 0, begin) + 1
