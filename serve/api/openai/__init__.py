"""OpenAI's APIs as faces of the Messages API: their requests become its requests, its answers become theirs.

Everything is a translation. Nothing here knows tokens, templates or HTTP, and what a face does not know it ignores, but
for what would change the meaning of an answer, which is refused by name.
"""

from __future__ import annotations

import secrets
import time

from serve.api.messages import MessagesRequest, decode
from serve.api.openai import chat_request, responses_request
from serve.api.openai.chat_answer import ChatWriter
from serve.api.openai.responses_answer import ResponseWriter


def read_chat(body: bytes | bytearray) -> tuple[MessagesRequest, ChatWriter]:
    """What a body of `POST /v1/chat/completions` asks for, and what writes the answer.

    Raises InvalidRequest, naming the field, if it is no such body or asks for what is not here.
    """
    chat = decode(chat_request.DECODER, body, chat_request.CHOICES)
    with_usage = chat.stream_options is not None and chat.stream_options.include_usage is True
    return chat_request.to_messages(chat), ChatWriter(int(time.time()), with_usage)


def read_responses(body: bytes | bytearray) -> tuple[MessagesRequest, ResponseWriter]:
    """What a body of `POST /v1/responses` asks for, and what writes the answer; raises InvalidRequest likewise."""
    request = decode(responses_request.DECODER, body, responses_request.CHOICES)
    return responses_request.to_messages(request), ResponseWriter(request, secrets.token_hex(12), int(time.time()))
