"""`python -m serve` with scripted answers, so that a model with random weights can hold a conversation with tools.

It takes the flags of `python -m serve`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from functools import partial

import serve.__main__
import serve.server.context
from serve.api.messages import MessagesRequest, TextBlock
from serve.engine.request import Constraint
from serve.prompt.conversation import blocks, joined
from serve.prompt.tokenizer import Tokenizer
from serve.server.config import ServerConfig
from serve.server.context import ServerContext, grammar_constraints
from serve.server.engine_client import EngineClient
from serve.server.metrics import ServerMetrics
from tests.helpers import scripts
from tests.helpers.forced_answers import Script

# The answer to requests that clients make by themselves, such as for a title.
ASIDE = '{"title": "The answer"}'


def answer_to(request: MessagesRequest) -> str:
    """The answer, chosen by the last scripted prompt in the request and the number of answers after it."""
    if not request.tools:
        return ASIDE
    answers = 0
    for message in reversed(joined(request.messages)):
        texts = [block.text for block in blocks(message) if isinstance(block, TextBlock)]
        if message.role == "user" and (prompt := scripted_prompt(texts)):
            said = scripts.ALL[prompt]
            return said[answers] if answers < len(said) else ASIDE
        answers += message.role == "assistant"
    return ASIDE


def scripted_prompt(texts: Sequence[str]) -> str | None:
    """The scripted prompt that is one of the texts, or else in one: some clients put words around it."""
    whole = (text.strip() for text in texts if text.strip() in scripts.ALL)
    return next(whole, None) or next((p for p in scripts.ALL if any(p in text for text in texts)), None)


def spell(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of `text`, tags whole and the rest in more tokens than needed: only recorded ids match them again."""
    pieces = re.findall(r"</?\w+>|[^<]{1,3}|<", text)
    return [int(token) for piece in pieces for token in tokenizer.encode(piece)]


def scripted(
    make_context: Callable[..., ServerContext],
    engine: EngineClient,
    tokenizer: Tokenizer,
    stop_ids: Collection[int],
    config: ServerConfig,
) -> ServerContext:
    """The context that the command line asks for, with every answer forced, unless its request has a grammar for it."""
    metrics = ServerMetrics()  # which nothing reads
    grammars, _ = grammar_constraints(engine, tokenizer, stop_ids, config.bounds.grammars, metrics)

    def constrain(request: MessagesRequest, thinking_opened: bool) -> Constraint | None:
        assert not thinking_opened, "the script opens its thinking itself"
        forced = request.tool_choice is not None and request.tool_choice.type in ("any", "tool")
        if forced or (request.output_config and request.output_config.format):
            return grammars(request, thinking_opened)
        tokens = [*spell(answer_to(request), tokenizer), tokenizer.hf.eos_token_id]
        return Script(tokens, engine.vocab_size)

    return make_context(engine, tokenizer, stop_ids, config, constrain=constrain)


if __name__ == "__main__":
    serve.server.context.make_context = partial(scripted, serve.server.context.make_context)
    serve.__main__.main()
