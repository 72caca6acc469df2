"""The list of models in OpenAI's form."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct


class Model(Struct, frozen=True, kw_only=True):
    """A model that can be asked for, with its limits in tokens, which are not OpenAI's."""

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
    """Body of `GET /v1/models/{id}`; prompt and answer share `context` tokens."""
    return msgspec.json.encode(model_of(name, context))


def models_body(name: str, context: int) -> bytes:
    """Body of `GET /v1/models`."""
    return msgspec.json.encode(ModelList((model_of(name, context),)))


def model_of(name: str, context: int) -> Model:
    """The one model, under the name it is called by."""
    return Model(id=name, context_window=context, max_output_tokens=context - 1)
