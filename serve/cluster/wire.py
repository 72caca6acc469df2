"""Requests and events between ingress and replicas, as bytes.

Pickle, as Ray itself uses between its processes: the parts of a cluster trust each other. A grammar's compiled state
belongs to one process, so its text travels in its place:
https://docs.python.org/3/library/pickle.html#persistence-of-external-objects.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from serve.engine.inbox import Overloaded
from serve.engine.request import Constraint, Event, GenerationRequest
from serve.prompt import masks

VERSION = 4  # of these bytes and of `serve.cluster.report`; parts of different versions refuse each other


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
    def __init__(self, data: bytes, constraint: Callable[[str], Constraint]) -> None:
        super().__init__(io.BytesIO(data))
        self.constraint = constraint

    def persistent_load(self, text: Any) -> Constraint:
        """The constraint of a grammar's text, at its start."""
        return self.constraint(text)


def pack(request: GenerationRequest) -> bytes:
    """A request as bytes; its tokens are one buffer."""
    packed = io.BytesIO()
    _Packer(packed, pickle.HIGHEST_PROTOCOL).dump(request)
    return packed.getvalue()


def unpack(data: bytes, constraint: Callable[[str], Constraint]) -> GenerationRequest:
    """The request that `pack` packed; `constraint` compiles a grammar's text, and what it raises is raised."""
    request: GenerationRequest = _Unpacker(data, constraint).load()
    return request


def pack_events(events: Sequence[Event] | Refused) -> bytes:
    """Some events of an answer, in order, or the refusal of its request."""
    return pickle.dumps(events, pickle.HIGHEST_PROTOCOL)


def unpack_events(data: bytes) -> Sequence[Event] | Refused:
    """What `pack_events` packed."""
    found: Sequence[Event] | Refused = pickle.loads(data)
    return found
