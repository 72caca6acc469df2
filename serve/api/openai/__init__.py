"""OpenAI's two APIs, translated: their requests to requests of the Messages API, its answers to their answers.

Nothing here knows tokens, templates or HTTP. Unknown fields are ignored. Known fields that cannot be obeyed and would
change the meaning of an answer are refused by name.
"""

from __future__ import annotations

import time

import msgspec
from msgspec import UNSET, Struct, UnsetType

from serve.api.answers import CacheForecast
from serve.api.messages import MessagesRequest, decode
from serve.api.openai import chat_request, responses_request
from serve.api.openai.chat_answer import ChatWriter
from serve.api.openai.responses_answer import ResponseWriter
from serve.api.pdf import reading_time


def read_chat(body: bytes | bytearray) -> tuple[MessagesRequest, ChatWriter]:
    """The request in a body of `POST /v1/chat/completions`, and the writer of its answer.

    Raises InvalidRequest, which names the field, for another body, or one that asks for something unsupported.
    """
    chat = decode(chat_request.DECODER, body, chat_request.CHOICES)
    with_usage = chat.stream_options is not None and chat.stream_options.include_usage is True
    writer = ChatWriter(int(time.time()), with_usage, chat.custom_names, chat.legacy)
    with reading_time():
        return chat_request.to_messages(chat), writer


def read_responses(body: bytes | bytearray) -> tuple[MessagesRequest, ResponseWriter]:
    """The request in a body of `POST /v1/responses`, and the writer of its answer. Raises InvalidRequest likewise."""
    request = decode(responses_request.DECODER, body, responses_request.CHOICES)
    with reading_time():
        return responses_request.to_messages(request), ResponseWriter(request, int(time.time()))


class InputTokens(Struct, frozen=True):
    """The answer of `POST /v1/responses/input_tokens`."""

    input_tokens: int
    object: str = "response.input_tokens"
    cache: CacheForecast | UnsetType = UNSET  # an extension, as of serve.api.answers.TokenCount


def input_tokens_body(tokens: int, cache: CacheForecast | None) -> bytes:
    """Body of the answer of `POST /v1/responses/input_tokens`, whose request `read_responses` reads."""
    return msgspec.json.encode(InputTokens(tokens, cache=UNSET if cache is None else cache))
