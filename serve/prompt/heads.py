"""The head of a prompt: tools and system text, with what the template writes around them, up to the first user turn."""

from __future__ import annotations

import secrets

import numpy as np
from msgspec.structs import replace

from serve.api.messages import CountTokensRequest, InputMessage
from serve.prompt.render import prompt
from serve.prompt.tokenizer import Tokenizer


def head_tokens(request: CountTokensRequest, tokenizer: Tokenizer, tools_first: bool = False) -> np.ndarray:
    """The tokens of a request's head, [tokens] int32, which depend on nothing that a user or the model wrote.

    The last one is left out, since it may be another one where text follows it. Empty where the template writes no
    user's text by itself. Raises InvalidRequest as `prompt` does.
    """
    question = secrets.token_hex(16)  # in no system text
    asked = replace(request, messages=(InputMessage("user", question),))
    rendered = prompt(asked, tokenizer, tools_first=tools_first)
    before = 0
    for n, segment in enumerate(rendered.segments):
        if isinstance(segment, str) and question in segment:
            text = segment.partition(question)[0]
            ids = tokenizer.encode_after(text) if n else tokenizer.encode(text)
            return np.concatenate([rendered.tokens[:before], ids])[:-1]
        before += rendered.counts[n]
    return np.zeros(0, np.int32)
