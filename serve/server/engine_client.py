"""What the server needs of an engine: the one in its own process, or replicas in others (`serve.cluster`)."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from cache.eviction import State
from serve.cost.model import CostModel
from serve.engine.request import Event, Forecast, GenerationRequest
from serve.engine.sessions import KnownAgents
from serve.engine.settings import EngineSettings


class EngineClient(Protocol):
    """Token ids in, token ids out; `serve.engine.engine.Engine` is one. Its properties return at once."""

    settings: EngineSettings
    fingerprint: bytes  # of the model, its weights and the dtype of its pages

    def start(self) -> None:
        """Serve requests from now on; called on the event loop."""

    def stop(self) -> None:
        """End within `settings.stop_seconds`; called on a thread."""

    def generate(self, request: GenerationRequest, waiting_s: float | None = None) -> AsyncGenerator[Event, None]:
        """Submit a request and yield its events; leaving the iterator early cancels it.

        Yields `Waiting` whenever `waiting_s` seconds pass without one. Raises Overloaded and ValueError as
        `Engine.submit` does.
        """

    async def forecast(self, request: GenerationRequest) -> Forecast | None:
        """What a request would find if it came now, which is not a use of what is cached; None if nobody can say.

        Raises ValueError as `Engine.submit` does.
        """

    def answered(self, id: str, state: State, ended_session: str = "") -> None:
        """Note how the answer to the request with this id ended, see `Engine.answered`; returns at once."""

    def expect(self, agent: str) -> None:
        """A request of this agent is on its way: what its latest one had may be brought back meanwhile."""

    async def sessions(self, owner: str | None) -> KnownAgents | None:
        """The latest sessions that clients of an `owner` name, or of all, see `serve.engine.sessions`.

        None if nobody can say.
        """

    @property
    def alive(self) -> bool:
        """Whether requests can be served."""

    @property
    def idle(self) -> bool:
        """Whether no request is waiting or running."""

    @property
    def steps(self) -> int:
        """Turns of the step loop since the start."""

    @property
    def compiled(self) -> tuple[int, int]:
        """Shapes of steps that are compiled, and shapes in all."""

    @property
    def cost(self) -> CostModel:
        """What prefills and reads take, by the latest measurements."""

    @property
    def device(self) -> str:
        """The kind of device that the model is on."""

    @property
    def vocab_size(self) -> int:
        """Logits of the model."""
