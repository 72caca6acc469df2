"""What a server keeps beside its engine: all that a request needs on its way from the body to the answer."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from serve.api.messages import MessagesRequest
from serve.audit.auditor import auditor_of
from serve.diagnosis.divergence import REPORT_BYTES, Divergences
from serve.diagnosis.savings import LINK_BYTES, Savings
from serve.diagnosis.sections import vocabulary_of
from serve.diagnosis.volatility import FOUND_BYTES, REPORTED, Volatility
from serve.engine.engine import Engine
from serve.engine.request import Constraint
from serve.limits.bounds import DEFAULT_BOUNDS, Bounds
from serve.prompt.masks import constraint_of, make_constrainer
from serve.prompt.replay import ReplayLog
from serve.prompt.signing import signing_key
from serve.prompt.tokenizer import Tokenizer
from serve.rules.log import SHAPE_BYTES, SHAPES
from serve.rules.normalize import DEFAULT_RULES
from serve.server.metrics import Memory, MemoryCollector, ServerMetrics
from serve.web.request_status import RequestStatuses

# The constraint of a request's answer; the flag says that the prompt ends inside thinking.
Constrain = Callable[[MessagesRequest, bool], Constraint | None]


@dataclass(frozen=True)
class ServerContext:
    """Everything that a request needs on its way."""

    engine: Engine
    tokenizer: Tokenizer
    model_name: str
    stop_ids: frozenset[int]
    rules: frozenset[str]  # of the normaliser, for requests that name none
    replay: ReplayLog
    signing_key: bytes
    constrain: Constrain
    metrics: ServerMetrics
    divergences: Divergences
    volatility: Volatility
    outcomes: RequestStatuses = field(default_factory=RequestStatuses)
    savings: Savings = field(default_factory=Savings)
    render_history_with_template: bool = (
        False  # answers in the history are the chat template's business, nothing is replayed
    )
    dispatch: bool = False  # tell each tool call as an event of its own
    reported: set[str] = field(default_factory=set)  # shapes of unparsed preambles that were logged already


@dataclass(frozen=True)
class RequestContext:
    """What a request says outside of its body: who asks, and how the prompt is to be made."""

    rules: frozenset[str]  # of the normaliser
    salt: bytes = b""  # requests with different salts share no page and no sampled turn
    key: bytes = b""  # callers with different keys share no sampled turn
    agent: str = ""  # the client's name, as its user agent has it


def make_context(
    engine: Engine,
    tokenizer: Tokenizer,
    model_name: str,
    stop_ids: Collection[int],
    *,
    rules: Collection[str] = DEFAULT_RULES,
    store: Path | None = None,
    constrain: Constrain | None = None,
    render_history_with_template: bool = False,
    dispatch: bool = False,
    trace_text: bool = True,
    bounds: Bounds = DEFAULT_BOUNDS,
) -> ServerContext:
    """Open what a server needs beside its engine: the log of sampled turns below `store`, the key that signs, masks.

    `bounds` are of what it remembers in memory, the tokenizer's segments excepted, which come with it. `constrain`
    takes the place of what requests demand of their answers; without `trace_text` no report on a prompt
    shows its words. Raises StoreError and OSError for a store that cannot be used, ValueError for a tokenizer that
    constrained decoding cannot read and for a rule that its template does not allow.
    """
    if problem := unrendered(tokenizer, rules):
        raise ValueError(f"--normalize {problem}")
    grammars: dict[str, Memory] = {}
    if constrain is None:
        constrainer = make_constrainer(tokenizer.hf, stop_ids, engine.config.vocab_size, bounds.grammars)
        compiled = constrainer.compiled
        grammars["grammars"] = Memory(lambda: compiled.bytes, compiled.most_bytes)

        def constrain(request: MessagesRequest, thinking_opened: bool) -> Constraint | None:
            return constraint_of(request, constrainer, tokenizer.template.format, thinking_opened)

    metrics = ServerMetrics(engine)
    serving = ServerContext(
        engine=engine,
        tokenizer=tokenizer,
        model_name=model_name,
        stop_ids=frozenset(stop_ids),
        rules=frozenset(rules),
        replay=ReplayLog(
            store,
            memory_bytes=bounds.turns,
            queue_bytes=bounds.unwritten_turns,
            on_lost=metrics.lost_turns.inc,
        ),
        signing_key=signing_key(store),
        constrain=constrain,
        metrics=metrics,
        divergences=Divergences(
            vocabulary_of(tokenizer.hf),
            engine.settings.page_size,
            lambda start, stop: engine.cost.prefill_s(start, stop),  # the engine's cost model grows as it measures
            trace_text,
            most_bytes=bounds.reports,
        ),
        volatility=Volatility(trace_text, bounds.volatility),
        outcomes=RequestStatuses(bounds.outcomes),
        savings=Savings(bounds.savings),
        render_history_with_template=render_history_with_template,
        dispatch=dispatch,
    )
    serving.metrics.registry.register(MemoryCollector(memories(serving) | grammars))
    return serving


def memories(serving: ServerContext) -> dict[str, Memory]:
    """What a server remembers of requests, by name; `serve/README.md` has the table of it."""
    segments, replay, reports = serving.tokenizer.segments, serving.replay, serving.divergences
    volatility, outcomes, savings = serving.volatility, serving.outcomes, serving.savings
    auditor = auditor_of(serving.engine)
    audited = auditor.settings.sample_bytes if auditor else 0
    return {
        "segments": Memory(lambda: segments.bytes, segments.most_bytes),
        "turns": Memory(lambda: replay.remembered_bytes, int(replay.memory.maxsize)),
        "unwritten turns": Memory(lambda: replay.waiting_bytes, replay.queue_bytes),
        "reports": Memory(lambda: reports.bytes, reports.kept.most_bytes + REPORT_BYTES),
        "outcomes": Memory(lambda: outcomes.bytes, outcomes.known.most_bytes),
        "volatility": Memory(lambda: volatility.bytes, volatility.clients.most_bytes + REPORTED * FOUND_BYTES),
        "savings": Memory(lambda: savings.bytes, savings.most * LINK_BYTES),
        "audits": Memory(lambda: auditor.records.bytes if auditor else 0, audited),
        "preambles": Memory(lambda: SHAPE_BYTES * len(serving.reported), SHAPE_BYTES * SHAPES),
    }


def unrendered(tokenizer: Tokenizer, rules: Collection[str]) -> str | None:
    """Which of the rules the chat template does not allow, and why; None for none."""
    if "tools-first" in rules and not tokenizer.template.tools_can_lead:
        return "tools-first: the chat template does not write the tools right behind the system text: leave it out"
    return None
