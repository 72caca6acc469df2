"""The list of models, in OpenAI's form: https://platform.openai.com/docs/api-reference/models."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct


class Model(Struct, frozen=True, kw_only=True):
    """A model. Its limits, in tokens, are not in OpenAI's API."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "tokenzero"
    context_window: int
    max_output_tokens: int


class ModelList(Struct, frozen=True):
    """All models."""

    data: tuple[Model, ...]
    object: Literal["list"] = "list"


def model_body(name: str, context: int) -> bytes:
    """Body of `GET /v1/models/{id}`. Prompt and answer together have at most `context` tokens."""
    return msgspec.json.encode(model_entry(name, context))


def models_body(name: str, context: int) -> bytes:
    """Body of `GET /v1/models`."""
    return msgspec.json.encode(ModelList((model_entry(name, context),)))


def model_entry(name: str, context: int) -> Model:
    """The entry of the only model."""
    return Model(id=name, context_window=context, max_output_tokens=context - 1)
