"""What a server needs besides its engine: everything that a request uses on its way from the body to the answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from serve.api import pdf
from serve.api.messages import MessagesRequest
from serve.api.retention import Wishes
from serve.audit.auditor import auditor_of
from serve.diagnosis.divergence import REPORT_BYTES, Divergences
from serve.diagnosis.savings import LINK_BYTES, Savings
from serve.diagnosis.sections import vocabulary_of
from serve.diagnosis.volatility import FOUND_BYTES, REPORTED, Volatility
from serve.engine.engine import Engine
from serve.engine.request import Constraint
from serve.prompt.enforce import DemandedSchema
from serve.prompt.masks import constraint_of, make_constrainer
from serve.prompt.relax import keyword_label
from serve.prompt.replay import ReplayLog
from serve.prompt.signing import signing_key
from serve.prompt.tokenizer import Tokenizer, remember_no_words
from serve.rules.log import SHAPE_BYTES, SHAPES
from serve.server.config import EVERYTHING, HEADS, ServerConfig
from serve.server.engine_client import EngineClient
from serve.server.metrics import EngineCollector, Memory, MemoryCollector, ServerMetrics
from serve.server.shared_heads import FILE, SharedHeads, open_heads
from serve.web.agents import Sender
from serve.web.keys import Admission
from serve.web.request_status import RequestStatuses
from serve.web.timing import Overhead

log = logging.getLogger("tokenzero.server")

INTERACTIVE, BACKGROUND = "interactive", "background"
NOBODY, NO_WISHES = Sender("", ""), Wishes()
SHOWN_KEYWORDS = 8  # in the log, of a schema
# The constraint of a request's answer; the flag says whether the prompt ends inside thinking.
Constrain = Callable[[MessagesRequest, bool], Constraint | None]


@dataclass(frozen=True)
class ServerContext:
    """Everything that a request needs on its way."""

    engine: EngineClient
    tokenizer: Tokenizer
    config: ServerConfig
    stop_ids: frozenset[int]
    rules: frozenset[str]  # of the normaliser, for requests that name none
    replay: ReplayLog
    signing_key: bytes
    constrain: Constrain
    metrics: ServerMetrics
    divergences: Divergences
    volatility: Volatility
    statuses: RequestStatuses
    savings: Savings
    overhead: Overhead  # of requests, for what is foreseen of later ones
    heads: SharedHeads | None = None  # None where keys share none
    reported: set[str] = field(default_factory=set)  # preambles, types of blocks and of tools that were logged already


@dataclass(frozen=True)
class RequestContext:
    """What a request's headers say: who asks, and which rules apply to its prompt."""

    rules: frozenset[str]  # of the normaliser
    salt: bytes = b""  # requests with different salts share no page and no recorded answer
    key: bytes = b""  # clients with different keys share no recorded answer
    agent: str = ""  # the client's name, from its user-agent header
    sender: Sender = NOBODY
    parent: str = ""  # the agent that waits for the sender's end
    final: bool = False  # the last request of the sender's session
    admission: Admission | None = None  # of the request, where keys are checked
    shares_head: bool = False  # with other keys, where that of its prompt is shared
    request_id: str | None = None  # that the client has given it
    share: float = 1.0  # of what may be kept in the cache for clients that ask for it
    priority: str = ""  # `interactive` or `background`; "" where nothing names one, which is as interactive
    wishes: Wishes = NO_WISHES  # of its body

    @property
    def owner(self) -> str:
        """The name of the key that sent it; "" where keys have no names."""
        return self.admission.key.name if self.admission else ""


def make_context(
    engine: EngineClient,
    tokenizer: Tokenizer,
    stop_ids: Collection[int],
    config: ServerConfig,
    constrain: Constrain | None = None,
) -> ServerContext:
    """Open what a server needs besides its engine: the log of recorded answers, the signing key, grammars, reports.

    `constrain` replaces the grammars that requests demand of their answers. Raises StoreError and OSError for a store
    that cannot be used, ValueError for a tokenizer that constrained decoding cannot read, for a rule that its chat
    template does not allow, and for a file of `--share-heads` that holds no request with a head.
    """
    rules, bounds, show_text = config.rules, config.bounds, not config.no_prompt_text_in_reports
    if problem := unrendered(tokenizer, rules):
        raise ValueError(f"--normalize {problem}")
    pdf.remembered.most_bytes = bounds.documents
    if config.api_key_file and config.share_prefix != EVERYTHING:
        remember_no_words(tokenizer.hf)
    grammars: dict[str, Memory] = {}
    metrics = ServerMetrics()
    if constrain is None:
        constrain, grammars["grammars"] = grammar_constraints(engine, tokenizer, stop_ids, config, metrics)
    context = ServerContext(
        engine=engine,
        tokenizer=tokenizer,
        config=config,
        stop_ids=frozenset(stop_ids),
        rules=rules,
        replay=ReplayLog(
            config.state_dir,
            memory_bytes=bounds.answers,
            queue_bytes=bounds.unwritten_answers,
            on_lost=metrics.dropped_answers.inc,
        ),
        signing_key=signing_key(config.state_dir),
        constrain=constrain,
        metrics=metrics,
        divergences=Divergences(
            vocabulary_of(tokenizer.hf),
            engine.settings.page_size,
            lambda start, stop: engine.cost.prefill_s(start, stop),  # the cost model changes as the engine measures
            show_text,
            most_bytes=bounds.reports,
        ),
        volatility=Volatility(show_text, bounds.volatility),
        statuses=RequestStatuses(bounds.statuses),
        savings=Savings(bounds.savings),
        overhead=Overhead(),
        heads=shared_heads(engine, tokenizer, config) if config.share_prefix == HEADS else None,
    )
    if isinstance(engine, Engine):  # another has figures of its own
        metrics.registry.register(EngineCollector(engine))
    metrics.registry.register(MemoryCollector(memories(context) | grammars))
    return context


def shared_heads(engine: EngineClient, tokenizer: Tokenizer, config: ServerConfig) -> SharedHeads:
    """The heads that keys share; raises what `open_heads` raises."""
    file = config.state_dir and config.state_dir / FILE
    heads = SharedHeads(engine.fingerprint, engine.settings.page_size, config.share_after, file)
    return open_heads(heads, config.share_heads, tokenizer, config.rules)


def grammar_constraints(
    engine: EngineClient, tokenizer: Tokenizer, stop_ids: Collection[int], config: ServerConfig, metrics: ServerMetrics
) -> tuple[Constrain, Memory]:
    """What compiles the grammars that requests demand, and the memory of compiled ones."""

    def report(demanded: DemandedSchema, dropped: Sequence[str]) -> None:
        for pointer in dropped:
            metrics.unenforced_keywords.labels(keyword_label(pointer)).inc()
        shown = ", ".join(f"{pointer or 'the whole schema'!s:.120}" for pointer in dropped[:SHOWN_KEYWORDS])
        more = len(dropped) - SHOWN_KEYWORDS
        left = f" and {more} more" if more > 0 else ""
        log.warning("the schema of %.80r cannot be enforced as a whole: left out: %s%s", demanded.name, shown, left)

    constrainer = make_constrainer(
        tokenizer.hf,
        stop_ids,
        engine.vocab_size,
        config.bounds.grammars,
        report,
        config.grammar_seconds,
        config.max_grammar_chars,
    )
    kinds = (constrainer.compiled, constrainer.enforcer.found, constrainer.failed)

    def constrain(request: MessagesRequest, thinking_opened: bool) -> Constraint | None:
        return constraint_of(request, constrainer, tokenizer.template.format, thinking_opened)

    return constrain, Memory(lambda: sum(kind.bytes for kind in kinds), sum(kind.most_bytes for kind in kinds))


def memories(context: ServerContext) -> dict[str, Memory]:
    """Each kind of memory that grows with requests, by name; `serve/README.md` lists them."""
    segments, heads = context.tokenizer.segments, context.tokenizer.heads
    replay, reports = context.replay, context.divergences
    volatility, statuses, savings = context.volatility, context.statuses, context.savings
    auditor = auditor_of(context.engine) if isinstance(context.engine, Engine) else None
    audited = auditor.settings.sample_bytes if auditor else 0
    shared = {"heads": memory_of_heads(context.heads)} if context.heads else {}
    return shared | {
        "segments": Memory(lambda: segments.bytes + heads.bytes, segments.most_bytes + heads.most_bytes),
        "answers": Memory(lambda: replay.remembered_bytes, int(replay.memory.maxsize)),
        "unwritten_answers": Memory(lambda: replay.waiting_bytes, replay.queue_bytes),
        "reports": Memory(lambda: reports.bytes, reports.remembered.most_bytes + REPORT_BYTES),
        "statuses": Memory(lambda: statuses.bytes, statuses.known.most_bytes),
        "volatility": Memory(lambda: volatility.bytes, volatility.clients.most_bytes + REPORTED * FOUND_BYTES),
        "savings": Memory(lambda: savings.bytes, savings.max_links * LINK_BYTES),
        "audits": Memory(lambda: auditor.records.bytes if auditor else 0, audited),
        "documents": Memory(lambda: pdf.remembered.bytes, pdf.remembered.most_bytes),
        "preambles": Memory(lambda: SHAPE_BYTES * len(context.reported), SHAPE_BYTES * SHAPES),
    }


def memory_of_heads(heads: SharedHeads) -> Memory:
    """The memory for heads that keys share."""
    return Memory(lambda: heads.remembered_bytes, heads.most_bytes)


def unrendered(tokenizer: Tokenizer, rules: Collection[str]) -> str | None:
    """The rule that the chat template does not allow, and why; None if it allows all of them."""
    if "tools-first" in rules and not tokenizer.template.tools_can_lead:
        return "tools-first: the chat template does not write the tools right after the system text: leave it out"
    return None
