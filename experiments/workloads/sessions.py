"""Seeded agent sessions: bodies for `POST /v1/messages` in the shape, size and order that coding agents send.

A session is a pure function of its fields and grows by appending; the words are synthetic, the files that it reads are
the standard library's. Run `python -m experiments.workloads.sessions --turn 3` to print one body, ready for curl.
"""

import argparse
import base64
import itertools
import json
import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from experiments.workloads.synthetic import TOOLS, Json, prose, text_block, thinking_block, tool, tool_call

HEADER = "x-anthropic-billing-header:"
MARKER = {"type": "ephemeral"}
CHARS_PER_TOKEN = 4.5  # of our own prose in a question, whose size need not be exact


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


@dataclass(frozen=True)
class Session:
    """One agent session. Equal fields give equal bytes, on every machine with the same Python release.

    Sessions of different seed or folder share no text from the first words on, so that arms of an experiment share no
    cache. Two with the same `group` share tools and the prompt up to the folder, as two real sessions of one client do.
    """

    seed: int = 0
    folder: str = "/home/dev/project"
    release: str = "2.1.179"
    group: str = ""
    model: str = "local-model"
    thinking: bool = True
    subagent: bool = False
    scale: float = 1.0  # of system text, tools and reminder, for prompts shorter than a client's own
    num_tools: int | None = None  # None: as many as the release's client sends

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown release."""
        if self.release not in RELEASES:
            raise ValueError(f"unknown client release {self.release!r}: take one of {', '.join(RELEASES)}")

    def rng(self, *place: object) -> random.Random:
        """Random numbers for one place in this session, seeded by text and so independent of the hash seed."""
        return random.Random(repr((self.seed, self.folder, *place)))

    def group_rng(self, *place: object) -> random.Random:
        """Random numbers that are the same in all sessions of one group."""
        return random.Random(repr((self.group, self.release, *place))) if self.group else self.rng(self.release, *place)


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
    rng = session.rng("header", request_number)
    return billing_header(rng, session.release, suffix=suffix, subagent=session.subagent)


def with_header(request: Json, line: str) -> Json:
    """The request with `line` as its first system block; an empty line adds nothing."""
    system = request.get("system") or []
    blocks = [text_block(system)] if isinstance(system, str) else system
    return request | {"system": [text_block(line), *blocks]} if line else request


def session_id(session: Session) -> str:
    """The UUID that the client gives this session."""
    return str(uuid.UUID(int=session.rng("id").getrandbits(128), version=4))


def http_headers(session: Session) -> dict[str, str]:
    """The HTTP headers that go with each of the session's requests."""
    return {"anthropic-version": "2023-06-01", "X-Claude-Code-Session-Id": session_id(session)}


def requests(session: Session, header: bool | str = True) -> Iterator[Json]:
    """The session's bodies, one turn after another, without end: each extends the one before.

    What moves is the header and the cache marker. `header` is a line to send, True for a fresh one of the session's
    release in each body, or False for none.
    """
    body = extend(_frame(session), *opening(session))
    for turn in itertools.count(1):
        yield with_header(body, session_header(session, turn - 1) if header is True else header or "")
        body = extend(body, *turn_messages(session, turn))


def request(session: Session, turn: int = 0, header: bool | str = True) -> Json:
    """The body after `turn` turns of history: see `requests`."""
    return next(itertools.islice(requests(session, header), turn, None))


def extend(request: Json, *messages: Json) -> Json:
    """The request with messages appended and the cache marker moved to the new last block, as clients move it."""
    old = request["messages"]
    grown = [*old[:-1], *map(_plain, old[-1:]), *messages]
    content = grown[-1]["content"]
    blocks = [text_block(content)] if isinstance(content, str) else content
    last = grown[-1] | {"content": [*blocks[:-1], blocks[-1] | {"cache_control": MARKER}]}
    return request | {"messages": [*grown[:-1], last]}


def stable_request(session: Session, tokens: int, count: Callable[[Json], int], question_tokens: int = 300) -> Json:
    """The part that repeats, without a header: followed by one question, it counts `tokens`, within 0.5%.

    Whole turns are added and the last tool results cut, in at most six counts. A target below twice the client's own
    prompt scales system text and tools down. It ends with the assistant's words, so that `with_question` comes next.
    """
    own = request(session, header=False)
    counted = count(own)
    density = _size(own) / counted
    start = request(replace(session, scale=session.scale * min(1, tokens / (2 * counted))), header=False)
    chars = (tokens - question_tokens) * density - _size(start)
    slope = 1 / density
    best, error = start, tokens
    previous: tuple[float, int] | None = None
    for _ in range(5):
        made = extend(start, *history(session, round(chars)))
        counted = count(with_question(made, 0, question_tokens))
        if abs(counted - tokens) < error:
            best, error = made, abs(counted - tokens)
        if error <= max(1, tokens // 5000):
            break
        if previous and chars != previous[0]:
            # Text differs in density; the bounds keep a nearly vertical or level step from going astray.
            slope = min(max((counted - previous[1]) / (chars - previous[0]), 0.1), 1)
        previous = (chars, counted)
        chars += (tokens - counted) / slope
    if error > tokens * 0.005:
        raise ValueError(f"no prompt of {tokens} tokens: the nearest is {error} away; ask for more or lower the scale")
    return best


def with_question(request: Json, question_seed: int, tokens: int = 300) -> Json:
    """The request with a fresh user message of about `tokens` tokens; seeds differ from its first word on."""
    rng = random.Random(f"question {question_seed}")
    text = f"{rng.getrandbits(32):08x}: {prose(rng, round(tokens * CHARS_PER_TOKEN) - 10)}"
    return extend(request, {"role": "user", "content": text})


def sized_request(
    session: Session, tokens: int, count: Callable[[Json], int], question_tokens: int = 300, question_seed: int = 0
) -> Json:
    """A request that counts `tokens`; requests of other question seeds share all of it but the last message."""
    return with_question(stable_request(session, tokens, count, question_tokens), question_seed, question_tokens)


def history(session: Session, chars: int) -> list[Json]:
    """Turns that hold `chars` characters, the last tool results cut to fit, then the assistant's closing words."""
    messages: list[Json] = []
    excess = -chars
    for number in itertools.count(1):
        if excess >= 0:
            break
        turn = turn_messages(session, number)
        messages += turn
        excess += _size(turn)
    blocks = [block for message in messages if isinstance(message["content"], list) for block in message["content"]]
    for block in reversed([block for block in blocks if block["type"] == "tool_result"]):
        kept = max(0, len(block["content"]) - excess)
        excess -= len(block["content"]) - kept
        block["content"] = block["content"][:kept]
    return [*messages, {"role": "assistant", "content": prose(session.rng("closing"), 200)}]


def opening(session: Session) -> list[Json]:
    """The user's task and, from releases that send one, the second message: role system, environment and date."""
    release = RELEASES[session.release]
    context = [] if release.git_in_system else [_git(session)]
    if not release.reminder:
        context += [_environment(session), prose(session.group_rng("context"), round(1200 * session.scale))]
    task = f"In {session.folder}: {prose(session.rng('task'), 300)}"
    blocks = [text_block(f"<system-reminder>\n{text}\n</system-reminder>") for text in context]
    user = {"role": "user", "content": [*blocks, text_block(task)] if blocks else task}
    if not release.reminder:
        return [user]
    skills = prose(session.group_rng("skills"), round(release.reminder * session.scale))
    return [user, {"role": "system", "content": f"{_environment(session)}\n\nSkills at hand:\n{skills}"}]


def turn_messages(session: Session, number: int) -> list[Json]:
    """Turn `number`, counted from 1: tool calls and their results, or now and then an answer and the next task."""
    rng = session.rng("turn", number)
    thought = [thinking_block(rng)] if session.thinking and rng.random() < 0.6 else []
    said = [text_block(prose(rng, rng.randint(60, 300)))]
    if number % 8 == 0:
        return [{"role": "assistant", "content": thought + said}, {"role": "user", "content": prose(rng, 300)}]
    calls = [tool_call(rng, session.folder) for _ in range(rng.choice((1, 1, 1, 2)))]
    uses = [use for use, _ in calls]
    assistant = {"role": "assistant", "content": thought + (said if rng.random() < 0.7 else []) + uses}
    results = {"role": "user", "content": [result for _, result in calls]}
    if RELEASES[session.release].reminder and number % 6 == 0:
        return [assistant, results, {"role": "system", "content": f"Token usage: {number * 2500}/200000"}]
    return [assistant, results]


def _frame(session: Session) -> Json:
    """The body around the messages."""
    release = RELEASES[session.release]
    user = f"user_{session.rng('user').getrandbits(256):064x}_account__session_{session_id(session)}"
    thinking = {"type": "adaptive"} if release.reminder else {"type": "enabled", "budget_tokens": 31_999}
    return {
        "model": session.model,
        "messages": [],
        "system": [text_block(text) | {"cache_control": MARKER} for text in (_identity(session), _prompt(session))],
        "tools": tools(session),
        "metadata": {"user_id": user},
        "max_tokens": 32_000,
        "temperature": 1,
        "thinking": thinking if session.thinking else {"type": "disabled"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "medium"},
        "stream": True,
    }


def _identity(session: Session) -> str:
    name = f"{session.group_rng('identity').getrandbits(32):08x}"
    return f"{name} is your name: a coding agent that works from a terminal."


def _prompt(session: Session) -> str:
    """The long system block, its folder a third of the way in, where the clients have it."""
    release, rng = RELEASES[session.release], session.group_rng("prompt")
    # Sized without the session's own lines, so that sessions of one group have the folder at the same place.
    chars = round(release.system * session.scale) - 450
    folder = f"Notes that last are kept in {session.folder}/.agent/memory, and the working folder is {session.folder}."
    parts = ["# Manner", prose(rng, chars // 3), "# Memory", folder, "# Work", prose(rng, chars * 2 // 3)]
    parts += [] if release.reminder else [_environment(session)]
    parts += [_git(session)] if release.git_in_system else []
    return "\n\n".join(parts)


def tools(session: Session) -> list[Json]:
    """The release's tools: as many and as long as the client's, fewer where `scale` leaves no room for all."""
    release, rng = RELEASES[session.release], session.group_rng("tools")
    chars = round(release.tool_chars * session.scale)
    names = list(TOOLS)[: min(session.num_tools or release.tools, max(3, chars // 1200))]
    shares = [rng.uniform(0.3, 1.7) for _ in names]
    return [tool(rng, name, round(chars * share / sum(shares))) for name, share in zip(names, shares, strict=True)]


def _environment(session: Session) -> str:
    rng = session.rng("environment")
    date = f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    return f"Environment\n- Working folder: {session.folder}\n- Git repository: yes\n- Platform: linux\n- Date: {date}"


def _git(session: Session) -> str:
    rng = session.rng("git")
    commits = "\n".join(f"{rng.getrandbits(28):07x} {prose(rng, 40)}" for _ in range(3))
    return f"Git status when the session began\nBranch: main\nClean\nRecent commits:\n{commits}"


def _plain(message: Json) -> Json:
    """A message as it is sent once it is no longer the last: unmarked, a lone text block as a plain string."""
    if isinstance(message["content"], str):
        return message
    blocks = [{key: value for key, value in block.items() if key != "cache_control"} for block in message["content"]]
    lone = len(blocks) == 1 and blocks[0]["type"] == "text"
    return message | {"content": blocks[0]["text"] if lone else blocks}


def _size(value: Any) -> int:
    """The characters of all strings within a JSON value: near enough to what a template renders."""
    if isinstance(value, dict):
        return sum(len(key) + _size(inner) for key, inner in value.items())
    if isinstance(value, list):
        return sum(map(_size, value))
    return len(value) if isinstance(value, str) else 0


def main() -> None:
    """The command line: one body as JSON, ready for `curl -d @-`."""
    parser = argparse.ArgumentParser(prog="python -m experiments.workloads.sessions", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default=Session.folder)
    parser.add_argument("--release", default=Session.release, choices=list(RELEASES))
    parser.add_argument("--turn", type=int, default=0, help="turns of history")
    args = parser.parse_args()
    print(json.dumps(request(Session(args.seed, args.folder, args.release), args.turn), ensure_ascii=False))


if __name__ == "__main__":
    main()
