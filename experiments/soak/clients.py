"""The soak's clients: conversations with branches and edits, abandoned streams, requests that must be refused.

History is sent back as the API returned it. Anything that a sound server never sends is a problem, reported in one
line.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import httpx

from experiments.harness.client import prompt_counts
from experiments.soak.stage import Broken, Stage
from experiments.soak.talk import BAD, Topics, branched, demand, disobeys, edited, following, opening, who
from experiments.workloads.synthetic import Json, prose

REST_EVERY, REST_SECONDS = 10.0, 1.0  # all sessions rest together
REMEMBERED = 64  # openings, and paused conversations
LONGEST = 1200  # tokens of a prompt, after which a conversation ends: what follows must fit the server's context
PROBLEMS = 1000  # that are kept


@dataclass(frozen=True)
class Kept:
    """A greedy answer, and all that is needed to ask for it again."""

    headers: dict[str, str]
    body: Json
    turn: int  # answers in its history, 0 for a first turn
    message: Json  # as the API returned it

    @property
    def prompt_tokens(self) -> int:
        """Tokens of its prompt."""
        return prompt_counts(self.message["usage"])[0]

    @property
    def free(self) -> bool:
        """Whether the answer was unconstrained and is complete in the message."""
        demanded = "tool_choice" in self.body or "output_config" in self.body
        return not demanded and self.message["stop_reason"] != "stop_sequence"

    @property
    def said(self) -> tuple[Any, ...]:
        """The parts that do not depend on chance: content without random ids, stop reason, token counts."""
        blocks = [
            {key: value for key, value in b.items() if key not in ("id", "signature")} for b in self.message["content"]
        ]
        ended = self.message["stop_reason"], self.message["stop_sequence"]
        return blocks, *ended, self.prompt_tokens, self.message["usage"]["output_tokens"]


@dataclass(eq=False)
class Seen:
    """What all clients have seen; they share one event loop."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)

    def problem(self, text: str) -> None:
        """Record something that a sound server never sends."""
        self.counts["problems"] += 1
        if len(self.problems) < PROBLEMS:
            self.problems.append(" ".join(text.split())[:400])


@dataclass(frozen=True)
class Conversation:
    """A client's next request, and its headers."""

    headers: dict[str, str]
    body: Json  # without what `demand` adds


@dataclass(eq=False)
class Backlog:
    """What clients share: openings that others repeat, paused conversations that any client may resume."""

    topics: Topics
    openings: deque[Json] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    paused: deque[Conversation] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def next(self, rng: random.Random) -> Conversation:
        """A paused conversation, one that begins like another, or a new one."""
        place = rng.random()
        if place < 0.4 and self.paused:
            at = rng.randrange(len(self.paused))
            self.paused.rotate(-at)
            return self.paused.popleft()
        if place < 0.6 and self.openings:
            return Conversation(who(rng), rng.choice(self.openings))
        self.openings.append(opening(rng, self.topics))
        return Conversation(who(rng), self.openings[-1])


def rest_s(passed: float) -> float:
    """Seconds left of the pause that all sessions make so that the server can audit; 0 outside it."""
    return max(0.0, REST_SECONDS - passed % REST_EVERY)


async def client(stage: Stage, seen: Seen, seed: str, backlog: Backlog, until_s: float) -> None:
    """Run one conversation after another."""
    rng = random.Random(seed)
    while stage.passed() < until_s:
        conversation: Conversation | None = backlog.next(rng)
        for _ in range(rng.randint(1, 4)):
            await asyncio.sleep(rest_s(stage.passed()))
            if conversation is not None and stage.passed() < until_s:
                conversation = await exchange(stage, seen, rng, backlog.topics, conversation)
        if conversation is not None:
            backlog.paused.append(conversation)


async def exchange(
    stage: Stage, seen: Seen, rng: random.Random, topics: Topics, conversation: Conversation
) -> Conversation | None:
    """Ask, and return what comes next, on this branch or another; None at the conversation's end."""
    headers, asked = conversation.headers, conversation.body | demand(rng, conversation.body)
    turn = sum(message["role"] == "assistant" for message in asked["messages"])
    try:
        if rng.random() < 0.15:
            await refused(stage, seen, rng, asked, headers)
        if rng.random() < 0.05:
            await elsewhere(stage, seen, rng, asked, headers)
        if rng.random() < 0.12:
            await left(stage, seen, rng, asked, headers)
        streamed = rng.random() < 0.3
        message = await stage.on(partial(answer, body=asked, headers=headers, streamed=streamed))
    except (Broken, httpx.HTTPError, TimeoutError, ValueError, LookupError) as error:
        seen.problem(f"turn {turn}: {type(error).__name__}: {error}")
        return None
    seen.counts["streamed" if streamed else "whole"] += 1
    seen.counts[message["stop_reason"]] += 1
    if problem := disobeys(asked, message):
        seen.problem(f"turn {turn}: {problem}")
    one = Kept(headers, asked, turn, message)
    if asked["temperature"] == 0:
        seen.kept.append(one)
    if one.prompt_tokens > LONGEST:
        return None
    messages = [*asked["messages"], {"role": "assistant", "content": message["content"]}]
    messages += following(rng, topics, message["content"])
    place = rng.random()
    if place < 0.1:
        messages = branched(rng, topics, messages)
    elif place < 0.2:
        messages = edited(rng, messages)
    return Conversation(headers, conversation.body | {"messages": messages})


async def answer(http: httpx.AsyncClient, body: Json, headers: dict[str, str], streamed: bool) -> Json:
    """The answer to a request, whole or put together from its stream. Raises Broken for any other answer."""
    if not streamed:
        response = await http.post("/v1/messages", json=body, headers=headers)
        if response.status_code != 200:
            raise Broken(f"expected an answer, got {response.status_code}: {response.text[:300]}")
        message: Json = response.json()
        return message
    async with http.stream("POST", "/v1/messages", json=body | {"stream": True}, headers=headers) as response:
        if response.status_code != 200:
            raise Broken(f"expected a stream, got {response.status_code}: {(await response.aread())[:300]!r}")
        lines = [line async for line in response.aiter_lines()]
    return joined(json.loads(line[6:]) for line in lines if line.startswith("data: "))


def joined(events: Iterable[Json]) -> Json:
    """The message that a stream's events make. Raises Broken if it does not end as streams do."""
    message: Json = {}
    parts: list[str] = []
    ended = False
    for event in events:
        match event["type"]:
            case "message_start":
                message = event["message"] | {"content": []}
            case "content_block_start":
                message["content"].append(dict(event["content_block"]))
                parts = []
            case "content_block_delta":
                delta = event["delta"]
                parts.append(delta.get("text") or delta.get("partial_json") or "")
            case "content_block_stop":
                block = message["content"][-1]
                filled = (
                    {"input": json.loads("".join(parts))} if block["type"] == "tool_use" else {"text": "".join(parts)}
                )
                block.update(filled)
            case "message_delta":
                message |= event["delta"] | {"usage": message["usage"] | event["usage"]}
            case "message_stop":
                ended = True
            case "error":
                raise Broken(f"the stream ends with {event['error']}")
    if not ended:
        raise Broken("the stream ended before its message_stop")
    return message


async def elsewhere(stage: Stage, seen: Seen, rng: random.Random, body: Json, headers: dict[str, str]) -> None:
    """Ask another route something, which must be answered."""
    text = prose(rng, 80)
    path, asked = rng.choice(
        (
            ("/v1/messages/count_tokens", body),
            ("/v1/chat/completions", {"model": "m", "max_tokens": 6, "messages": [{"role": "user", "content": text}]}),
            ("/v1/responses", {"model": "m", "max_output_tokens": 16, "input": text}),
        )
    )

    async def send(http: httpx.AsyncClient) -> None:
        response = await http.post(path, json=asked, headers=headers)
        if response.status_code != 200:
            raise Broken(f"{path}: expected an answer, got {response.status_code}: {response.text[:300]}")

    await stage.on(send)
    seen.counts[path] += 1


async def refused(stage: Stage, seen: Seen, rng: random.Random, body: Json, headers: dict[str, str]) -> None:
    """Send a request that must be refused, and see that it is, by its own status and in the API's form."""
    name = rng.choice(list(BAD))
    bad = BAD[name](body)

    async def send(http: httpx.AsyncClient) -> httpx.Response:
        response = await http.request(bad.method, bad.path, content=bad.content, headers=headers | bad.headers)
        if response.status_code >= 500:
            raise Broken(f"{name}: expected {bad.status}, got {response.status_code}: {response.text[:300]}")
        return response

    response = await stage.on(send)
    seen.counts["refused"] += 1
    if response.status_code != bad.status:
        seen.problem(f"{name}: expected {bad.status}, got {response.status_code}: {response.text}")
    elif not response.json()["error"]["message"]:
        seen.problem(f"{name}: the error says nothing")


async def left(stage: Stage, seen: Seen, rng: random.Random, body: Json, headers: dict[str, str]) -> None:
    """Send a request and disconnect: during its body, before its answer, or during its stream."""
    body = body | {"max_tokens": 400}
    lines, way = rng.randint(0, 60), rng.choice(("body", "answer", "stream", "stream"))

    async def go(http: httpx.AsyncClient) -> None:
        match way:
            case "body":
                await half_sent(http, body)
            case "answer":
                try:
                    await http.post("/v1/messages", json=body, headers=headers, timeout=rng.uniform(0.01, 0.3))
                except httpx.TimeoutException:
                    return
            case _:
                async with http.stream(
                    "POST", "/v1/messages", json=body | {"stream": True}, headers=headers
                ) as response:
                    if response.status_code != 200:
                        raise Broken(f"expected a stream, got {response.status_code}: {await response.aread()!r:.300}")
                    count = 0
                    async for _ in response.aiter_lines():
                        count += 1
                        if count > lines:
                            return

    await stage.on(go)
    seen.counts[f"left: {way}"] += 1


async def half_sent(http: httpx.AsyncClient, body: Json) -> None:
    """Send half of a request and close the connection."""
    payload, at = json.dumps(body).encode(), urlsplit(str(http.base_url))
    try:
        _, writer = await asyncio.open_connection(at.hostname, at.port)
        writer.write(b"POST /v1/messages HTTP/1.1\r\nhost: soak\r\ncontent-length: %d\r\n\r\n" % len(payload))
        writer.write(payload[: len(payload) // 2])
        await writer.drain()
        writer.close()
    except OSError as error:
        raise Broken(f"half a request: {error}") from error
