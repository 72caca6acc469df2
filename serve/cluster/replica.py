"""A replica: an engine in a process of its own, which Ray Serve starts, watches and restarts."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Collection, Mapping
from typing import TYPE_CHECKING

from cache.lmdb_env import StoreError
from cache.private import write_for_this_user
from serve.cluster.config import ClusterConfig
from serve.cluster.publisher import Publisher
from serve.cluster.report import Costs, Identity, Report
from serve.cluster.wire import VERSION, Refused, pack_events, unpack
from serve.engine.inbox import Answered, Overloaded
from serve.engine.request import Event, Failed, Finished, Started
from serve.engine.runtime import leave_out_torch, set_up_jax
from serve.engine.sequence import Sequence
from serve.limits.exceeded import LimitExceeded
from serve.router.summary import Load
from serve.server.progress import StartProgress
from serve.server.threads import in_thread
from serve.web.logs import set_up_logging

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from serve.engine.engine import Engine
    from serve.engine.sessions import KnownAgents
    from serve.prompt.masks import Constrainer

log = logging.getLogger("tokenzero.replica")

TAKE_SECONDS = 0.5  # after which changed pages are an increment, even if no router asks


class EngineReplica:
    """One engine over the checkpoint that the flags name. Ray Serve calls its methods, all on one event loop."""

    def __init__(self, config: ClusterConfig) -> None:
        """Load, compile, and start the engine. Raises ValueError with a sentence for what a user can mend."""
        from ray import serve

        set_up_logging(config)
        self.name: str = serve.get_replica_context().replica_id.unique_id
        try:
            self.engine, self.constrainer, self.identity = load(config)
        except (OSError, StoreError, SystemExit) as error:
            raise ValueError(str(error)) from error
        self.publisher = Publisher(self.engine)
        self.calls: dict[int, str] = {}  # the routers' ids of requests, by their numbers
        self.token_bytes = token_bytes(self.engine)
        self.engine.start()
        gc.freeze()  # what is loaded stays
        self.taking = asyncio.get_running_loop().create_task(self.take_regularly())

    async def generate(self, packed: bytes, constrained: bool, id: str) -> AsyncIterator[bytes]:
        """The events of one request's answer, one or more in each message; leaving it early cancels the request.

        `id` is the request's in `report`.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()
        try:
            compile = self.constrainer.constraint  # which may take long
            request = await asyncio.to_thread(unpack, packed, compile) if constrained else unpack(packed, compile)
            number = self.engine.submit(request, lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        except (Overloaded, LimitExceeded, ValueError) as error:
            yield pack_events(Refused(str(error), not isinstance(error, ValueError)))
            return
        self.calls[number] = id
        try:
            ended = False
            while not ended:
                batch = [await events.get()]
                if isinstance(batch[0], Started):
                    batch.append(await events.get())  # the first token, which follows at once
                while not events.empty():
                    batch.append(events.get_nowait())
                ended = isinstance(batch[-1], Finished | Failed)
                yield pack_events(batch)
        finally:
            del self.calls[number]
            self.engine.cancel(number)

    async def report(self, after: dict[str, int], answers: Collection[Answered] = ()) -> Report:
        """The replica now; `after` has the number of the last increment of pages that the caller knows, by replica.

        `answers` say how some ended, of any replica.
        """
        engine = self.engine
        for answer in answers:
            engine.answered(answer.id, answer.state, answer.ended_session)
        self.publisher.take()
        return Report(
            name=self.name,
            identity=self.identity,
            device=engine.device,
            token_bytes=self.token_bytes,
            steps=engine.steps,
            waiting=len(engine.waiting),
            running=len(engine.running),
            compiled=engine.compiled,
            costs=Costs.of(engine.cost),
            tiers=tuple(tier.name for tier in engine.core.tiers.pages.tiers) if engine.core.tiers else (),
            pages=self.publisher.since(after.get(self.name, -1)),
            load=load_of([*engine.waiting, *engine.running], self.calls),
        )

    async def sessions(self, owner: str | None) -> KnownAgents | None:
        """The latest sessions of an owner that this replica knows, or of all."""
        return await self.engine.sessions(owner)

    async def metrics(self) -> list[Metric]:
        """The figures of engine, auditor and tiers."""
        from serve.server.metrics import EngineCollector

        return await asyncio.to_thread(lambda: list(EngineCollector(self.engine).collect()))

    def check_health(self) -> None:
        """Raise RuntimeError once the engine's thread has ended: Ray Serve starts the replica anew then."""
        if not self.engine.alive:
            raise RuntimeError("the engine's thread has ended")

    async def take_regularly(self) -> None:
        """Keep the journal of pages short while no router asks for it."""
        while True:
            await asyncio.sleep(TAKE_SECONDS)
            self.publisher.take()

    def __del__(self) -> None:
        """Write what the store lacks, and end; Ray Serve calls it when it stops a replica."""
        if engine := self.__dict__.pop("engine", None):
            self.taking.cancel()
            engine.stop()


def load_of(sequences: Collection[Sequence], ids: Mapping[int, str]) -> Load:
    """The work that sequences stand for; `ids` are those of their requests, by number."""
    prefills = [each for each in sequences if not each.sampled]
    named = tuple((ids.get(each.number, str(each.number)), each.computed, each.length) for each in prefills)
    return Load(named, sum(each.sampled > 0 for each in sequences))


def load(config: ClusterConfig) -> tuple[Engine, Constrainer, Identity]:
    """The engine, what compiles grammars for it, and what it is. Raises what loading a server's engine raises."""
    write_for_this_user()
    leave_out_torch()
    set_up_jax()
    from model import checkpoint
    from serve.prompt.masks import make_constrainer
    from serve.prompt.tokenizer import identity, load_hf
    from serve.server.loading import load_engine, stop_ids

    folder = checkpoint.resolve(config.model)
    tokenizer = in_thread(load_hf, folder)
    engine = load_engine(config, folder, StartProgress())
    hf, vocab = tokenizer.result(), engine.config.vocab_size
    stops = stop_ids(engine.config.eos_token_ids, hf)
    constrainer = make_constrainer(hf, stops, vocab, config.bounds.grammars)
    return (
        engine,
        constrainer,
        Identity(VERSION, config.version, engine.fingerprint, identity(hf), engine.settings, vocab),
    )


def token_bytes(engine: Engine) -> int:
    """Bytes of KV that a token has."""
    from model.kv import bytes_per_token
    from model.kv_rows import pool_dtype

    return bytes_per_token(engine.config, pool_dtype(engine.settings.page_dtype))
