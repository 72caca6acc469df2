"""OpenAI's two APIs, translated: their requests to requests of the Messages API, its answers to their answers.

Nothing here knows tokens, templates or HTTP. Unknown fields are ignored. Known fields that cannot be obeyed and would
change the meaning of an answer are refused by name.
"""

from __future__ import annotations

import secrets
import time

from serve.api.messages import MessagesRequest, decode
from serve.api.openai import chat_request, responses_request
from serve.api.openai.chat_answer import ChatWriter
from serve.api.openai.responses_answer import ResponseWriter


def read_chat(body: bytes | bytearray) -> tuple[MessagesRequest, ChatWriter]:
    """The request in a body of `POST /v1/chat/completions`, and the writer of its answer.

    Raises InvalidRequest, which names the field, for another body, or one that asks for something unsupported.
    """
    chat = decode(chat_request.DECODER, body, chat_request.CHOICES)
    with_usage = chat.stream_options is not None and chat.stream_options.include_usage is True
    return chat_request.to_messages(chat), ChatWriter(int(time.time()), with_usage)


def read_responses(body: bytes | bytearray) -> tuple[MessagesRequest, ResponseWriter]:
    """The request in a body of `POST /v1/responses`, and the writer of its answer. Raises InvalidRequest likewise."""
    request = decode(responses_request.DECODER, body, responses_request.CHOICES)
    return responses_request.to_messages(request), ResponseWriter(request, secrets.token_hex(12), int(time.time()))
