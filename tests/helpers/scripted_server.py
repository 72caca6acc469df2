"""Answers forced on a random model: a constraint that allows one token at a time, in a server of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette

from model.config import ModelConfig
from model.params import Params
from serve.api.messages import MessagesRequest
from serve.engine.engine import Engine
from serve.engine.request import GenerationRequest
from serve.engine.settings import EngineSettings
from serve.prompt.tokenizer import Tokenizer
from serve.server.app import create_app
from serve.server.config import ServerConfig
from serve.server.context import Constrain, ServerContext, make_context
from tests.helpers.forced_answers import Script
from tests.helpers.http import eventually

SIZES = EngineSettings(
    num_pages=1200,
    max_model_len=18_000,
    page_size=16,
    max_num_seqs=2,
    max_prefill_tokens=64,
    max_mixed_prefill_tokens=64,
)


class Recording(Engine):
    """An engine that records its requests."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.asked: list[GenerationRequest] = []

    def submit(self, request: GenerationRequest, emit: Callable) -> int:
        """Record the request, and submit it."""
        self.asked.append(request)
        return super().submit(request, emit)


def saying(tokenizer: Tokenizer, vocab: int, answer: Callable[[MessagesRequest, bool], list[int]]) -> Constrain:
    """The constraint that makes any model sample `answer`'s tokens and end its turn."""
    end = tokenizer.hf.eos_token_id
    return lambda request, thinking_opened: Script([*answer(request, thinking_opened), end], vocab)


def listening(context: ServerContext) -> AbstractContextManager[str]:
    """A server's application, run by `answering`."""
    return answering(create_app(context))


@contextmanager
def answering(app: Starlette, **options: Any) -> Iterator[str]:
    """Run an application in a thread of this process, on a free port; yields its URL. `options` are uvicorn's."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: server.started, "the server listens")
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive(), "the server ended when it was asked to"


def context_over(
    model: tuple[ModelConfig, Params], tokenizer: Tokenizer, constrain: Constrain | None = None, **flags: Any
) -> tuple[Recording, ServerContext]:
    """An engine over a model, and the context of a server with these flags."""
    config, params = model
    engine = Recording(params, config, SIZES, b"tiny")
    stops = {tokenizer.hf.eos_token_id}
    return engine, make_context(engine, tokenizer, stops, ServerConfig(model="tiny", **flags), constrain)
