"""Seeded agent sessions: bodies for `POST /v1/messages` in the shape, size and order that coding agents send.

A session is a pure function of its fields and grows by appending; the words are synthetic, the files that it reads are
the standard library's. Run `python -m experiments.sessions` to see the sizes of each client release.
"""

import base64
import hashlib
import json
import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from experiments.demo_model import source_files, source_text

Json = dict[str, Any]
HEADER = "x-anthropic-billing-header:"
MARKER = {"type": "ephemeral"}
CHARS_PER_TOKEN = 3.7  # a first guess only: every size is corrected by counting


@dataclass(frozen=True)
class Release:
    """What one client release sends: characters of its system text, tools and second message, and its header's hash."""

    system: int
    tool_chars: int
    tools: int
    reminder: int  # 0: the date travels in the first user message, and no message has the role system
    cch: str  # fresh, zero, base64, absent, or none for a release without a header
    git_in_system: bool = True


RELEASES = {
    "2.1.331": Release(6_900, 31_000, 12, 9_000, "absent", git_in_system=False),
    "2.1.179": Release(5_700, 71_000, 25, 5_700, "fresh"),
    "2.1.80": Release(16_000, 67_000, 22, 0, "zero"),
    "2.0.76": Release(16_000, 67_000, 22, 0, "none"),
    "0.2.93": Release(16_000, 67_000, 22, 0, "base64"),  # the example in NVIDIA's posts; sizes borrowed from 2.1.80
}

# Name: properties, with `!` where required and the type where it is not a string. Order is the order of sending.
TOOLS = {
    "Bash": "command! description timeout:number run_in_background:boolean",
    "Read": "file_path! offset:integer limit:integer",
    "Grep": "pattern! path glob output_mode -n:boolean -C:integer head_limit:integer multiline:boolean",
    "Glob": "pattern! path",
    "Edit": "file_path! old_string! new_string! replace_all:boolean",
    "Write": "file_path! content!",
    "TodoWrite": "todos!:array",
    "Task": "description! prompt! subagent_type! model run_in_background:boolean",
    "WebFetch": "url! prompt!",
    "WebSearch": "query! allowed_domains:array blocked_domains:array",
    "NotebookEdit": "notebook_path! new_source! cell_id cell_type edit_mode",
    "Skill": "skill! args",
    "TaskOutput": "task_id! block:boolean timeout:number",
    "TaskStop": "task_id!",
    "AskUserQuestion": "questions!:array answers:object",
    "EnterPlanMode": "",
    "ExitPlanMode": "plan! allowed_prompts:array",
    "ToolSearch": "query! max_results:integer",
    "EnterWorktree": "name",
    "ExitWorktree": "action! discard_changes:boolean",
    "CronCreate": "cron! prompt! recurring:boolean",
    "CronDelete": "id!",
    "CronList": "",
    "LSP": "operation! file_path! line!:integer character!:integer",
    "Monitor": "command! until timeout:number",
}

VERBS = "check keep rename split cache trace read quote measure avoid restore inline sort close replace explain".split()
NOUNS = (
    "the failing test|a public function|the import order|every open file|the type annotation|a shared helper|the call site|"
    "the error message|one small commit|the parser state|an unused branch|the return value|the lock file|a long docstring|"
    "the event loop|the default argument|a cached result|the working tree|each changed line|the module's own names"
).split("|")
REASONS = (
    "before anything is written|so that the reader can follow|unless the user asked otherwise|because callers rely on it|"
    "when two answers are possible|after the tests have run|even if the change looks small|as long as nothing else moves|"
    "where the file says so|instead of guessing|without touching its neighbours|once the cause is known"
).split("|")
SHAPES = (
    "Always {v} {n} {r}.|Do not {v} {n} {r}.|If you {v} {n}, also {w} {m} {r}.|{R}, {v} {n} and {w} {m}.|"
    "Prefer to {v} {n} {r}; otherwise {w} {m}.|It is better to {v} {n} than to {w} {m} {r}."
).split("|")


@dataclass(frozen=True)
class Session:
    """One agent session. Equal fields give equal bytes, on every machine with the same Python release.

    Sessions of different seed or folder share no text from the first words on, so that arms of an experiment share no
    cache. Two with the same `kin` share tools and prompt up to the folder, as two real sessions of one client do.
    """

    seed: int = 0
    folder: str = "/home/dev/project"
    release: str = "2.1.179"
    kin: str = ""
    model: str = "local-model"
    thinking: bool = True
    subagent: bool = False
    scale: float = 1.0  # of system text, tools and reminder, for prompts shorter than a client's own

    def __post_init__(self) -> None:
        if self.release not in RELEASES:
            raise ValueError(f"unknown client release {self.release!r}: take one of {', '.join(RELEASES)}")

    def rng(self, *place: object) -> random.Random:
        """Random numbers of one place in this session; seeded by text, so no hash seed has a part in it."""
        return random.Random(repr((self.seed, self.folder, *place)))

    def kin_rng(self, *place: object) -> random.Random:
        """Random numbers that all sessions of one kin draw alike."""
        return random.Random(repr((self.kin, self.release, *place))) if self.kin else self.rng(self.release, *place)


def billing_header(
    rng: random.Random,
    release: str = "2.1.179",
    suffix: str = "471",
    entrypoint: str = "sdk-cli",
    subagent: bool = False,
) -> str:
    """A preamble line as the release writes it; empty for a release that sends none."""
    cch = RELEASES[release].cch
    if cch == "none":
        return ""
    if cch == "base64":
        return f"{HEADER} cc_version={release}; cch={base64.b64encode(rng.randbytes(10)).decode()};"
    values = {"fresh": f" cch={rng.randrange(16**5):05x};", "zero": " cch=00000;", "absent": ""}
    role = " cc_is_subagent=true;" if subagent else ""
    return f"{HEADER} cc_version={release}.{suffix}; cc_entrypoint={entrypoint};{values[cch]}{role}"


def session_header(session: Session, request_number: int) -> str:
    """The header of one request of a session: its version suffix is the session's, its hash the request's."""
    suffix = f"{session.rng('suffix').randrange(16**3):03x}"
    return billing_header(
        session.rng("header", request_number), session.release, suffix=suffix, subagent=session.subagent
    )


def with_header(request: Json, line: str) -> Json:
    """The request with `line` as a system block of its own in front; an empty line adds nothing."""
    system = request.get("system") or []
    blocks = [_text(system)] if isinstance(system, str) else system
    return request | {"system": [_text(line), *blocks]} if line else request


def session_id(session: Session) -> str:
    """The UUID that the client gives this session."""
    return str(uuid.UUID(int=session.rng("id").getrandbits(128), version=4))


def http_headers(session: Session) -> dict[str, str]:
    """The HTTP headers that go with each of the session's requests."""
    return {"anthropic-version": "2023-06-01", "X-Claude-Code-Session-Id": session_id(session)}


def request(session: Session, turn: int = 0, header: bool | str = True) -> Json:
    """The body after `turn` turns of history. Each extends the one before, but for its header and the moving marker.

    `header` is a line to send, True for a fresh one of the session's release, or False for none.
    """
    messages = opening(session) + [message for number in range(1, turn + 1) for message in turn_messages(session, number)]
    line = session_header(session, turn) if header is True else header or ""
    return with_header(extend(_frame(session), *messages), line)


def extend(request: Json, *messages: Json) -> Json:
    """The request with messages appended and the cache marker moved to the new last block, as clients move it."""
    old = [_plain(message) for message in request["messages"]]
    *rest, last = [*old, *messages]
    blocks = [_text(last["content"])] if isinstance(last["content"], str) else last["content"]
    marked = last | {"content": [*blocks[:-1], blocks[-1] | {"cache_control": MARKER}]}
    return request | {"messages": [*rest, marked]}


def stable_request(
    session: Session, tokens: int, count: Callable[[Json], int], question_tokens: int = 300, header: bool | str = False
) -> Json:
    """The part that repeats: a history such that it and one question count `tokens`, as near as six counts bring it.

    A target below twice the client's own prompt scales tools and system text down. It ends with the assistant's words.
    """
    own = len(json.dumps(request(session), ensure_ascii=False)) / CHARS_PER_TOKEN
    session = replace(session, scale=session.scale * min(1, tokens / (2 * own)))
    start = request(session, header=header)
    low, high = (0, -1.0), None
    best, error = start, tokens
    chars = max(0.0, (tokens - question_tokens) * CHARS_PER_TOKEN - len(json.dumps(start, ensure_ascii=False)))
    for _ in range(6):
        made = extend(start, *history(session, round(chars)))
        counted = count(with_question(made, 0, question_tokens))
        if abs(counted - tokens) < error:
            best, error = made, abs(counted - tokens)
        if error <= max(1, tokens // 5000):
            break
        # The next guess follows the line through the last two counts.
        point = (chars, float(counted))
        slope = (point[1] - low[1]) / (point[0] - low[0]) if high is not None else 1 / CHARS_PER_TOKEN
        low, high = point, point
        chars = max(0.0, chars + (tokens - counted) / slope)
    if error > tokens * 0.005:
        raise ValueError(f"{error} tokens away from {tokens}: the shortest prompt is larger, ask for more tokens")
    return best
