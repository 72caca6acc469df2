"""Requests and events between ingress and replicas, as bytes.

Pickle, as Ray itself uses between its processes: the parts of a cluster trust each other. A grammar's compiled state
belongs to one process, so its text travels in its place:
https://docs.python.org/3/library/pickle.html#persistence-of-external-objects.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from serve.engine.inbox import Overloaded
from serve.engine.request import Constraint, Event, GenerationRequest
from serve.limits.recent import SCOPE
from serve.prompt import masks

VERSION = 6  # of these bytes and of `serve.cluster.report`; parts of different versions refuse each other


@dataclass(frozen=True)
class Refused:
    """The only message for a request that the engine did not take."""

    message: str
    overloaded: bool  # otherwise the request itself is wrong

    def error(self) -> Exception:
        """What `Engine.submit` raised."""
        return Overloaded(self.message) if self.overloaded else ValueError(self.message)


class _Packer(pickle.Pickler):
    def persistent_id(self, value: object) -> str | None:
        """The text of a grammar."""
        return value.text if isinstance(value, masks.Constraint) else None


class _Unpacker(pickle.Unpickler):
    def persistent_load(self, text: Any) -> Any:
        """The text of a grammar."""
        return text


def pack(request: GenerationRequest) -> bytes:
    """A request as bytes; its tokens are one buffer."""
    packed = io.BytesIO()
    _Packer(packed, pickle.HIGHEST_PROTOCOL).dump(request)
    return packed.getvalue()


def unpack(data: bytes, constraint: Callable[[str], Constraint]) -> GenerationRequest:
    """The request that `pack` packed; `constraint` compiles a grammar's text, and what it raises is raised.

    It compiles for the request's salt: a grammar that a request of another has compiled would be there sooner.
    """
    request: GenerationRequest = _Unpacker(io.BytesIO(data)).load()
    text: Any = request.constraint
    if not isinstance(text, str):
        return request
    scope = SCOPE.set(request.salt.decode("latin-1"))
    try:
        return replace(request, constraint=constraint(text))
    finally:
        SCOPE.reset(scope)


def pack_events(events: Sequence[Event] | Refused) -> bytes:
    """Some events of an answer, in order, or the refusal of its request."""
    return pickle.dumps(events, pickle.HIGHEST_PROTOCOL)


def unpack_events(data: bytes) -> Sequence[Event] | Refused:
    """What `pack_events` packed."""
    found: Sequence[Event] | Refused = pickle.loads(data)
    return found
