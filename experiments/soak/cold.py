"""A soak's answers, computed again without a cache.

A twin server is asked for first turns again, each under its own salt, so that nothing is reused. Later turns have
sampled tokens in their history, which their text does not determine: they are rebuilt from the log of recorded answers,
and every token of the answer is compared with logits computed in one pass, without cache or engine.

Exact means: equal, or first different at a token whose two best logits lie within NEAR of the logits' scale, since
float32 rounds differently in other chunks and batches.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import jax
import numpy as np

from experiments.soak.clients import Kept, answer
from experiments.soak.stage import KEEP_SECONDS, PATIENCE_SECONDS, Broken
from experiments.soak.talk import SALT_HEADER
from model import checkpoint
from model.batch import Batch
from model.decoder import forward
from model.kernels.dispatch import arranged
from model.kv import empty_pool
from serve.api.messages import MessagesRequest, decode_request
from serve.prompt.masks import constraint_of, make_constrainer
from serve.prompt.render import Prompt, prompt
from serve.prompt.replay import ReplayLog
from serve.prompt.signing import signing_key
from serve.prompt.tokenizer import load_tokenizer
from serve.rules.normalize import DEFAULT_RULES, normalize
from serve.server.context import RequestContext
from serve.server.prepare import scope_of, trusted

NEAR = 1e-4
PAGE = 64
ROWS = 64  # positions whose logits one pass returns: longer answers are judged up to there
ASKED_AT_ONCE = 4


@dataclass(frozen=True)
class Difference:
    """An answer that differs from its twin's, or a token that does not follow from the logits."""

    kept: Kept
    other: str  # what was expected in its place
    tied: bool = False  # the two best logits are within NEAR there


async def twins(url: str, groups: Sequence[Sequence[Kept]], tick: Callable[[], object]) -> tuple[list[Difference], int]:
    """Ask a server that may reuse nothing for the answers of each group, which have one body.

    Returns the differences, and how many tokens it reused nevertheless. Raises Broken if it does not answer.
    """
    found: list[Difference] = []
    reused, left = 0, list(groups)

    async def work(http: httpx.AsyncClient) -> None:
        nonlocal reused
        while left:
            group = left.pop()
            salt = {SALT_HEADER: f"twin {secrets.token_hex(8)}"}
            async with asyncio.timeout(PATIENCE_SECONDS):
                message = await answer(http, group[0].body, salt, streamed=False)
            twin = Kept(salt, group[0].body, 0, message)
            reused += message["usage"]["cache_read_input_tokens"]
            found.extend(Difference(one, repr(twin.said)) for one in group if one.said != twin.said)
            tick()

    limits = httpx.Limits(keepalive_expiry=KEEP_SECONDS)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=None) as http:
        try:
            await asyncio.gather(*(work(http) for _ in range(ASKED_AT_ONCE)))
        except (httpx.HTTPError, TimeoutError) as error:
            raise Broken(f"the twin does not answer: {type(error).__name__}: {error}") from error
    return found, reused


def by_body(kept: Sequence[Kept]) -> list[list[Kept]]:
    """The answers grouped by body; one body may have been answered in several states of the cache."""
    groups: dict[str, list[Kept]] = {}
    for one in kept:
        groups.setdefault(json.dumps(one.body), []).append(one)
    return list(groups.values())


class Cold:
    """The model without engine or cache, and the tokens of a soaked server's prompts.

    `store` is the directory of a server that has ended.
    """

    def __init__(self, model: str, store: Path, context: int) -> None:
        folder = checkpoint.resolve(model)
        self.config, params = checkpoint.load(folder, np.float32)
        self.fingerprint = checkpoint.fingerprint(self.config, params)
        self.params = arranged(params, PAGE)
        self.tokenizer = load_tokenizer(str(folder))
        self.replay, self.key = ReplayLog(store), signing_key(store)
        self.stop_ids = (*self.config.eos_token_ids, self.tokenizer.hf.eos_token_id)
        self.constrainer = make_constrainer(self.tokenizer.hf, self.stop_ids, self.config.vocab_size)
        self.pages = -(-context // PAGE)
        self.forward = jax.jit(forward, static_argnames="config")

    def close(self) -> None:
        """Close the log."""
        self.replay.close()

    def prompt(self, kept: Kept) -> tuple[MessagesRequest, bytes, Prompt]:
        """An answer's request as its server saw it: the normalised request, its scope, and its prompt."""
        headers = kept.headers
        caller = RequestContext(
            DEFAULT_RULES, headers.get(SALT_HEADER, "").encode(), headers.get("x-api-key", "").encode()
        )
        request = normalize(decode_request(json.dumps(kept.body).encode()), DEFAULT_RULES).request
        scope = scope_of(self.fingerprint, caller)
        recalled = trusted(self.replay.recall(scope, request.messages), request, self.key)
        return request, scope, prompt(request, self.tokenizer, recalled)

    def logits(self, tokens: np.ndarray, count: int) -> np.ndarray:
        """Logits [count, vocab] float32 after the last `count` prefixes of `tokens` ([tokens] int32)."""
        size, length = self.pages * PAGE, len(tokens)
        rows = np.arange(length - count, length, dtype=np.int32)
        batch = Batch(
            tokens=np.pad(tokens.astype(np.int32), (0, size - length)),
            starts=np.asarray([0, length], np.int32),
            prefix=np.zeros(1, np.int32),
            block_table=np.arange(self.pages, dtype=np.int32)[None],
            logit_indices=np.pad(rows, (0, ROWS - count), mode="edge"),
            max_chunk=size,
        )
        pool = empty_pool(self.config, self.pages, PAGE, np.dtype(np.float32))
        return np.asarray(self.forward(self.params, batch, pool, self.config)[0])[:count]

    def judge(self, kept: Kept) -> tuple[Difference | None, int] | None:
        """Compare each token of an answer that is `free` with the logits: the first wrong one, and the number of flips.

        None if the tokens are unknown because the log has lost the answer or some of its history.
        """
        _, scope, made = self.prompt(kept)
        said = {"role": "assistant", "content": kept.message["content"]}
        whole = json.dumps(kept.body | {"messages": [*kept.body["messages"], said]}).encode()
        sampled = self.replay.recall(scope, decode_request(whole).messages)[-1]
        if sampled is None or len(made.tokens) != kept.prompt_tokens:
            return None
        ids = sampled.tokens[: ROWS - 1]
        if len(made.tokens) + len(ids) > self.pages * PAGE:
            return None
        logits = self.logits(np.concatenate([made.tokens, ids]), len(ids) + 1)
        ended = kept.message["stop_reason"] == "end_turn" and len(ids) == len(sampled.tokens)
        gaps = shortfall(logits[: len(ids)], [(token,) for token in ids.tolist()])
        gaps = np.append(gaps, shortfall(logits[len(ids) :], [self.stop_ids])) if ended else gaps
        wrong = np.flatnonzero(gaps > NEAR)
        if not len(wrong):
            return None, int((gaps > 0).sum())
        at = int(wrong[0])
        best = self.tokenizer.hf.decode([int(logits[at].argmax())])
        return Difference(kept, f"token {at} is {gaps[at]:.1e} of the scale below {best!r}"), int((gaps > 0).sum())

    def tied(self, difference: Difference) -> Difference:
        """The difference of a first turn, marked as tied if a near tie in cold sampling explains it.

        The text up to that tie must equal the answer, as far as the answer is text.
        """
        request, _, made = self.prompt(difference.kept)
        constraint = constraint_of(request, self.constrainer, self.tokenizer.template.format, made.thinking)
        ids: list[int] = []
        for _ in range(min(request.max_tokens, self.pages * PAGE - len(made.tokens))):
            (row,) = self.logits(np.concatenate([made.tokens, np.asarray(ids, np.int32)]), 1)
            allowed = row
            if constraint:
                bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")[: len(row)]
                allowed = np.where(bits, row, -np.inf)
            second, best = np.argsort(allowed)[-2:]
            if allowed[best] - allowed[second] <= NEAR * np.abs(row).max():
                text = self.tokenizer.hf.decode(ids).rstrip("\ufffd")
                said = "".join(block.get("text", "") for block in difference.kept.message["content"])
                return Difference(difference.kept, difference.other, bool(constraint) or said.startswith(text))
            if int(best) in self.stop_ids:
                break
            ids.append(int(best))
            if constraint:
                constraint.accept(ids[-1])
        return difference


def shortfall(logits: np.ndarray, chosen: Sequence[Sequence[int]]) -> np.ndarray:
    """The gap from each row's best logit to the best of its chosen tokens, as a share of the row's scale: [rows]."""
    chosen_best = np.asarray([max(row[list(ids)]) for row, ids in zip(logits, chosen, strict=True)])
    gaps: np.ndarray = (logits.max(1) - chosen_best) / np.abs(logits).max(1)
    return gaps
