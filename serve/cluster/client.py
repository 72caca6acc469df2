"""The engine that the ingress sees: replicas elsewhere, called through a Ray Serve handle."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from cache.eviction import State
from cache.keys import PageChain
from serve.cluster.dispatch import Call, Dispatch
from serve.cluster.report import Report, difference
from serve.cluster.wire import Refused, pack, unpack_events
from serve.cost.model import CostModel
from serve.engine.inbox import Answered, Overloaded
from serve.engine.request import Event, Failed, Finished, Forecast, GenerationRequest, Started, Waiting
from serve.engine.sessions import KnownAgents, merged
from serve.engine.settings import EngineSettings
from serve.router.request import RoutedRequest, short_keys

log = logging.getLogger("tokenzero.cluster")

# Over gRPC, which takes half of the time of Ray's actor calls for a first message (2.5 ms against 4.9 ms for 208 KB).
TRANSPORT = {"_by_reference": False, "request_serialization": "pickle", "response_serialization": "pickle"}
REPORT_SECONDS = 0.5  # between two reports of the replicas
ANSWER_SECONDS = 2.0  # after which a replica that has not answered is left out: one that hangs keeps nobody waiting
STALE_SECONDS = 60.0  # without any report, after which the cluster counts as gone
ATTEMPTS = 3  # replicas that a request is sent to before it fails, until its first token
LOST = "the replica that computed this answer has ended: send the request again"
HANGS = "the replica does not answer any more"
GONE = "no replica answers, and Ray's head does not either: start it again, and this command"


class ClusterEngine:
    """Replicas as one engine (`serve.server.engine_client`), on the event loop that `start` is called on."""

    def __init__(
        self,
        handle: Any,
        reports: Sequence[Report],
        dispatch: Dispatch,
        begin: Callable[[], object] = lambda: None,
        end: Callable[[], object] = lambda: None,
        head_answers: Callable[[], bool] = lambda: True,
    ) -> None:
        """`handle`: a DeploymentHandle; `reports`: a first one of each replica, which agree in what they are.

        `begin` is called on the event loop when the server starts, `end` on a thread when it has stopped, and
        `head_answers` on a thread while no replica reports.
        """
        first = reports[0]
        self.settings: EngineSettings = first.identity.settings
        self.fingerprint, self.vocab_size = first.identity.fingerprint, first.identity.vocab_size
        self.device, self.identity = first.device, first.identity
        self.calls = handle.options(method_name="generate", stream=True, **TRANSPORT)
        self.handle, self.dispatch = handle.options(**TRANSPORT), dispatch
        self.begin, self.end, self.head_answers = begin, end, head_answers
        self.in_flight = 0
        self.answers: list[Answered] = []  # how answers ended, for the replicas to know
        self.messages: dict[asyncio.Task[bytes], Call] = {}  # that are on their way
        self.gone = False  # whether Ray's head does not answer
        self.others: set[str] = set()  # replicas of another model, format or version
        self.reports: Mapping[str, Report] = {}
        self.take(reports)

    # As EngineClient.

    def start(self) -> None:
        """Follow the replicas from now on."""
        self.begin()
        self.loop = asyncio.get_running_loop()
        self.following = self.loop.create_task(self.follow())

    def stop(self) -> None:
        """Follow them no longer."""
        self.loop.call_soon_threadsafe(self.following.cancel)
        self.end()

    async def generate(self, request: GenerationRequest, waiting_s: float | None = None) -> AsyncGenerator[Event, None]:
        """See EngineClient. A request is sent to another replica if its queue is full, or if it ends before a token."""
        if not self.alive:
            raise Overloaded(GONE)
        call = await asyncio.to_thread(self.call, request)
        self.in_flight += 1
        sent = ended = False
        try:
            while not ended:
                try:
                    async with aclosing(self.attempt(call, waiting_s)) as events:
                        async for event in events:
                            sent = True
                            if isinstance(event, Started):
                                self.dispatch.first_token(call, event.reused_tokens)
                            ended = isinstance(event, Finished | Failed)
                            yield event
                except Overloaded:
                    if len(call.tried) >= ATTEMPTS or self.reports.keys() <= set(call.tried):
                        raise
                except ValueError:
                    raise
                except Exception as error:  # Ray's, of many kinds
                    log.warning("replica %s: %s: %.300s", call.tried[-1:], type(error).__name__, error)
                    if not (self.alive or sent):
                        raise Overloaded(GONE) from error
                    if call.started or len(call.tried) >= ATTEMPTS or not self.alive:
                        ended = True
                        yield Failed(LOST if self.alive else GONE, temporary=True)
        finally:
            self.in_flight -= 1
            self.dispatch.ended(call, complete=ended)

    async def forecast(self, request: GenerationRequest) -> Forecast | None:
        """See EngineClient: what the router expects where it would send the request."""
        call = await asyncio.to_thread(self.call, request)
        return self.dispatch.forecast(call.request)

    def answered(self, id: str, state: State, ended_session: str = "") -> None:
        """See EngineClient: replicas are told when they report next."""
        self.answers.append(Answered(id, state, ended_session))

    def expect(self, agent: str) -> None:
        """See EngineClient. Nothing: the replica is chosen by the request's tokens."""

    async def sessions(self, owner: str | None) -> KnownAgents | None:
        """See EngineClient: what the replicas know that answer in time."""
        answers = [answer for answer in await self.ask("sessions", owner) if answer is not None]
        silent = len(self.reports) - len(answers)
        reason = f"{silent} of {len(self.reports)} replicas do not say" if silent > 0 else ""
        return merged(answers, reason) if answers else None

    @property
    def alive(self) -> bool:
        """Whether replicas report, or may do so soon."""
        return not self.gone and time.monotonic() - self.reported_at < STALE_SECONDS

    @property
    def idle(self) -> bool:
        """Whether no request of this ingress is under way."""
        return not self.in_flight

    @property
    def steps(self) -> int:
        """Turns of all replicas' loops."""
        return sum(report.steps for report in self.reports.values())

    @property
    def compiled(self) -> tuple[int, int]:
        """Compiled shapes, and shapes in all, of all replicas together."""
        done, all = zip(*(report.compiled for report in self.reports.values()), strict=True)
        return sum(done), sum(all)

    @property
    def cost(self) -> CostModel:
        """The cost model of one of the replicas."""
        return next(iter(self.reports.values())).costs.model

    # The parts of a request.

    def call(self, request: GenerationRequest) -> Call:
        """A request with what the router needs to know of it."""
        size = self.settings.page_size
        keys = PageChain(self.fingerprint, size, request.salt, request.head).keys(request.tokens)
        id = secrets.token_hex(8)
        routed = RoutedRequest(id, short_keys(keys), len(request.tokens), size, request.agent, request.session)
        return Call(pack(request), request.constraint is not None, routed, self.dispatch)

    async def attempt(self, call: Call, waiting_s: float | None) -> AsyncGenerator[Event, None]:
        """Send a call to a replica and yield its events; leaving the iterator early cancels it there.

        Raises Overloaded and ValueError if the replica refuses it, and what Ray raises if the replica is lost.
        """
        stream = self.calls.remote(call, call.constrained, call.request.id)
        message: asyncio.Task[bytes] | None = None
        ended = False
        try:
            while not ended:
                if not message:
                    message = asyncio.ensure_future(anext_of(stream))
                    self.messages[message] = call
                    message.add_done_callback(self.messages.pop)
                await asyncio.wait({message}, timeout=waiting_s)
                if message.cancelled():
                    raise ConnectionError(GONE if self.gone else HANGS)
                if not message.done():
                    yield Waiting(call.forecast)
                    continue
                events, message = unpack_events(message.result()), None
                if isinstance(events, Refused):
                    ended = True
                    raise events.error()
                ended = isinstance(events[-1], Finished | Failed)
                for event in events:
                    yield event
        finally:
            if not ended:
                stream.cancel()
            if message:
                message.add_done_callback(lambda last: last.cancelled() or last.exception())  # nobody waits for it
                message.cancel()

    # Following the replicas.

    async def follow(self) -> None:
        """Ask all replicas for a report, again and again."""
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            answers, self.answers = self.answers, []
            reports = await self.ask("report", dict(self.dispatch.known), answers)
            gone = not reports and not await asyncio.to_thread(self.head_answers)
            if gone and not self.gone:
                log.error(GONE)
            self.gone = gone
            try:
                self.take(reports)
            except Exception:  # those that come next may be understood
                log.exception("a report was not understood")
            silent = self.dispatch.silent
            for message, call in tuple(self.messages.items()):
                if gone or (not call.started and call.tried[-1] in silent):
                    message.cancel()

    def take(self, reports: Sequence[Report]) -> None:
        """Take note of some replicas' reports. One that computes something else is not known, so it gets no request."""
        alike = {report.name: report for report in reports if report.identity == self.identity}
        for report in reports:
            if report.name in alike:
                self.dispatch.published(report)
            elif report.name not in self.others:
                self.others.add(report.name)
                differs = difference(asdict(self.identity), asdict(report.identity))
                log.error("replica %s gets no requests: it differs from this ingress's in %s", report.name, differs)
        if alike:
            self.reports, self.reported_at = alike, time.monotonic()

    async def ask(self, method: str, *args: object) -> list[Any]:
        """The results of a method of every replica that answers in time."""
        try:
            # On a thread: on an event loop, Ray gives all results or none.
            results = await asyncio.to_thread(
                self.handle.broadcast(method, *args).results, timeout_s=ANSWER_SECONDS, return_exceptions=True
            )
        except Exception as error:  # Ray's, of many kinds: no replica runs now, or one does not answer
            log.debug("no answers to %s: %s: %s", method, type(error).__name__, error)
            return []
        return [result for result in results if not isinstance(result, BaseException)]

    def ask_from_thread(self, method: str) -> list[Any]:
        """The same, called on a thread."""
        return asyncio.run_coroutine_threadsafe(self.ask(method), self.loop).result()


async def anext_of(stream: Any) -> bytes:
    """The next message of a stream. Raises RuntimeError at its end, since an answer ends with an event."""
    try:
        message: bytes = await anext(stream)
    except StopAsyncIteration:
        raise RuntimeError("the stream ended before the answer") from None
    return message
