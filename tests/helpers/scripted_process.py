"""`python -m serve` with scripted answers, so that a model with random weights can hold a conversation with tools.

It takes the flags of `python -m serve`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import serve.__main__
import serve.server.context
from serve.api.messages import MessagesRequest, TextBlock
from serve.engine.engine import Engine
from serve.prompt.conversation import blocks, joined
from serve.prompt.tokenizer import Tokenizer
from serve.server.context import ServerContext
from tests.helpers.forced_answers import Script

# The answers to each prompt and then to the results of its calls, in Qwen3's format. Clients send calls back as parsed
# JSON: without the second space, the escapes and the `.0`.
SCRIPT = {
    "Write the answer into answer.txt.": (
        "<think>\nThe answer is known, the file is missing.\n</think>\n\nI write it.\n"
        '<tool_call>\n{"name": "Bash", "arguments": {"command":  "echo \\u0034\\u0032 > answer.txt", '
        '"timeout": 10000.0, "description": "Write the answer"}}\n</tool_call>',
        "<think>\nNo news is good news.\n</think>\n\nThe answer is in answer.txt.",
    ),
    "Read it back and count its lines.": (
        '<tool_call>\n{"name": "Read", "arguments": {"file_path": "answer.txt"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "Bash", "arguments": {"command": "wc -l answer.txt"}}\n</tool_call>',
        "It says «42», on a line of its own – naïve, but so it is.",
    ),
    "Thank you.": ("<think>\nShort and polite.\n</think>\n\nYou are welcome.",),
}
# The same for Codex.
CODEX_SCRIPT = {
    "Write the number into number.txt.": (
        "<think>\nThe number is known, the file is missing.\n</think>\n\nI write it.\n"
        '<tool_call>\n{"name": "exec_command", "arguments": {"cmd":  "echo \\u0034\\u0032 > number.txt", '
        '"tty": false}}\n</tool_call>',
        "<think>\nNo news is good news.\n</think>\n\nThe number is in number.txt.",
    ),
    "Read it back, and count its lines as well.": (
        '<tool_call>\n{"name": "exec_command", "arguments": {"cmd": "cat number.txt"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "exec_command", "arguments": {"cmd": "wc -l number.txt"}}\n</tool_call>',
        "It says «42», on a line of its own – naïve, but so it is.",
    ),
    "Thanks.": ("<think>\nShort and polite.\n</think>\n\nYou are welcome.",),
}
SCRIPTS = SCRIPT | CODEX_SCRIPT
# The answer to requests that clients make by themselves, such as for a title.
ASIDE = '{"title": "The answer"}'


def answer_to(request: MessagesRequest) -> str:
    """The answer, chosen by the last scripted prompt in the request and the number of answers after it."""
    answers = 0
    for message in reversed(joined(request.messages)):
        texts = [block.text for block in blocks(message) if isinstance(block, TextBlock)]
        if prompt := next((text for text in texts if text in SCRIPTS), None):
            return SCRIPTS[prompt][answers]
        answers += message.role == "assistant"
    return ASIDE


def spell(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of `text`, tags whole and the rest in more tokens than needed: only recorded ids match them again."""
    pieces = re.findall(r"</?\w+>|[^<]{1,3}|<", text)
    return [int(token) for piece in pieces for token in tokenizer.encode(piece)]


def scripted(
    make_context: Callable[..., ServerContext], engine: Engine, tokenizer: Tokenizer, *rest: Any
) -> ServerContext:
    """The context that the command line asks for, with every answer forced."""

    def constrain(request: MessagesRequest, thinking_opened: bool) -> Script:
        assert not thinking_opened, "the script opens its thinking itself"
        tokens = [*spell(answer_to(request), tokenizer), tokenizer.hf.eos_token_id]
        return Script(tokens, engine.config.vocab_size)

    return make_context(engine, tokenizer, *rest, constrain=constrain)


if __name__ == "__main__":
    serve.server.context.make_context = partial(scripted, serve.server.context.make_context)
    serve.__main__.main()
