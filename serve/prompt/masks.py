"""The tokens that may come next in an answer: compiled grammars, and a mask for each step, on the engine's thread.

llguidance compiles a grammar and computes the masks: https://github.com/guidance-ai/llguidance.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock, Semaphore
from typing import Any

import llguidance.hf
import numpy as np
import psutil
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from serve.api.messages import InvalidRequest, MessagesRequest
from serve.formats.format import Format
from serve.formats.schemas import Unenforceable
from serve.limits.bounds import DEFAULT_BOUNDS, GRAMMAR_CHARS
from serve.limits.exceeded import RETRY_SECONDS, LimitExceeded
from serve.limits.recent import Recent
from serve.prompt.enforce import Enforcer, Report, demanded_schemas
from serve.prompt.grammar import Grammar, grammar_of

TEXT_BYTES = 100  # of memory that a character of a grammar takes, at least
TRIAL_STEPS = 4  # after which a grammar that has no finite text, or too many choices, has shown it
REASON_CHARS = 300
FUEL = 1_000_000  # llguidance's own default: one or two seconds
RELAXED_SHARE = 16  # a part of the memory for grammars holds relaxed schemas
FAILED_SHARE = 64  # and one holds those that failed
COMPILE_SECONDS = 5.0  # of processor time, for all grammars of a request
MOST_WAITING = 8  # requests that wait for their turn to compile


class ConstraintError(Exception):
    """A constraint that cannot go on: its parser hit a limit, or was fed a token that it had not allowed."""


def constraint_of(
    request: MessagesRequest, constrainer: Constrainer, format: Format, thinking_opened: bool
) -> Constraint | None:
    """The constraint of a request's answer, None if it demands nothing: see `grammar_of`, `Constrainer.start`.

    A schema that cannot be enforced is enforced without the keywords that it fails for: see `Enforcer`.
    """

    def start(schemas: Mapping[str, dict[str, Any]]) -> Constraint | None:
        grammar = grammar_of(request, format, thinking_opened, constrainer.added_tokens, schemas)
        return constrainer.start(grammar) if grammar else None

    demanded = demanded_schemas(request, format)
    try:
        constraint = start(constrainer.enforcer.known(demanded))
    except Unenforceable:
        return start(constrainer.enforcer.enforced(demanded))
    if constraint:
        constrainer.enforcer.compiled(demanded)
    return constraint


@dataclass(frozen=True, eq=False)
class Compiled:
    """A grammar at its start."""

    matcher: LLMatcher
    bytes: int  # of memory, about, as llguidance does not report it


@dataclass(frozen=True)
class Constrainer:
    """Grammars compiled for one tokenizer; made once, as it reads the whole vocabulary."""

    added_tokens: Mapping[str, int]  # ids by text
    words: int  # of a mask: ceil(vocab / 32)
    compile: Callable[[str], LLMatcher]  # Lark text -> a new state, kept; raises ConstraintError; any thread
    compiled: Recent[str, Compiled]
    failed: Recent[str, str]  # why a grammar cannot be used, by its text
    enforcer: Enforcer
    most_seconds: float = COMPILE_SECONDS
    most_chars: int = GRAMMAR_CHARS

    def start(self, grammar: Grammar) -> Constraint:
        """The constraint of a new answer. Raises Unenforceable, naming the field, for what does not compile.

        May take some seconds for the largest schemas: not to be called on the engine's thread.
        """
        if len(grammar.text) > self.most_chars:
            raise InvalidRequest(
                f"tools: expected at most {self.most_chars} characters of schemas, got {len(grammar.text)}: demand "
                "fewer or shorter ones, or raise --max-grammar-chars",
                "max_grammar_chars",
            )
        slow = f"its schemas take more than {self.most_seconds:g} s to compile"
        advice = "demand fewer or simpler ones, or raise --grammar-seconds"
        if self.failed.get(grammar.text) == slow:
            raise InvalidRequest(f"tools: {slow}: {advice}", "grammar_seconds")
        until = time.thread_time() + self.most_seconds
        # Each schema by itself first, so that the error names it.
        for field, text in (
            *((field, f"start: %json {schema}\n") for field, schema in grammar.schemas),
            ("tools", grammar.text),
        ):
            try:
                matcher = self.compile(text)
            except ConstraintError as error:
                raise Unenforceable(f"{field}: {error}") from None
            if time.thread_time() > until:
                self.failed.put(grammar.text, slow)
                raise InvalidRequest(f"{field}: {slow}: {advice}", "grammar_seconds")
        return self.started(matcher, grammar.text)

    def started(self, matcher: LLMatcher, text: str) -> Constraint:
        """The constraint of a new answer; if its grammar turns out to be too complex, it is not used again."""
        return Constraint(matcher, self.words, text, lambda reason: self.failed.put(text, reason))

    def constraint(self, text: str) -> Constraint:
        """The constraint of a new answer by a grammar that another process with this tokenizer has compiled, too.

        Raises ConstraintError for a grammar that does not compile.
        """
        return self.started(self.compile(text), text)


def make_constrainer(
    hf: Any,
    stop_ids: Collection[int],
    vocab: int,
    most_bytes: int = DEFAULT_BOUNDS.grammars,
    report: Report = lambda demanded, dropped: None,
    most_seconds: float = COMPILE_SECONDS,
    most_chars: int = GRAMMAR_CHARS,
) -> Constrainer:
    """The Constrainer of a fast Hugging Face tokenizer and a model with `vocab` logits; it remembers grammars.

    `report` is called once for each schema that is not enforced as a whole, with the pointers of what was left out.
    Raises ValueError if there is no stop id or llguidance cannot read the tokenizer.
    """
    tokens = max(len(hf), vocab)
    stops = sorted(id for id in stop_ids if 0 <= id < tokens)
    if not stops:
        raise ValueError(f"stop ids: expected one below {tokens}, got {sorted(stop_ids)}")
    tokenizer = llguidance.hf.from_tokenizer(hf, n_vocab=tokens, eos_token=stops)
    relaxed_bytes, failed_bytes = most_bytes // RELAXED_SHARE, most_bytes // FAILED_SHARE
    compiled: Recent[str, Compiled] = Recent(
        most_bytes - relaxed_bytes - failed_bytes, lambda kept: kept.bytes, scoped=True
    )
    failed: Recent[str, str] = Recent(failed_bytes, len, scoped=True)
    turns = Turns()

    def compiles(text: str, whole: bool) -> bool:
        try:
            with turns.turn():
                compile_grammar(text, tokenizer, FUEL if whole else FUEL // 4)
        except ConstraintError:
            return False
        return True

    def compile(text: str) -> LLMatcher:
        if (reason := failed.get(text)) is not None:
            raise ConstraintError(reason)
        if (kept := compiled.get(text)) is None:
            try:
                with turns.turn():
                    kept = sized(text, tokenizer)
            except ConstraintError as error:
                failed.put(text, str(error))
                raise
            compiled.put(text, kept)
        return kept.matcher.deep_copy()

    added_tokens = {str(token): id for id, token in hf.added_tokens_decoder.items()}
    enforcer = Enforcer(compiles, report, relaxed_bytes, most_seconds)
    return Constrainer(added_tokens, -(-vocab // 32), compile, compiled, failed, enforcer, most_seconds, most_chars)


class Turns:
    """Grammars are compiled one at a time, so that they take one core at most from steps."""

    def __init__(self) -> None:
        self.lock, self.places = Lock(), Semaphore(MOST_WAITING + 1)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn, and take it. Raises LimitExceeded if too many wait: they hold threads that others need."""
        if not self.places.acquire(blocking=False):
            text = f"grammars: {MOST_WAITING} requests wait for theirs to be compiled, no more may: try again"
            raise LimitExceeded(text, "waiting_grammars", 529, RETRY_SECONDS)
        try:
            with self.lock:
                yield
        finally:
            self.places.release()


def sized(text: str, tokenizer: LLTokenizer) -> Compiled:
    """A grammar at its start and its bytes: the growth of the process meanwhile, at least a share of its length."""
    process = psutil.Process()
    before = process.memory_info().rss
    matcher = compile_grammar(text, tokenizer)
    return Compiled(matcher, max(process.memory_info().rss - before, TEXT_BYTES * len(text)))


def compile_grammar(text: str, tokenizer: LLTokenizer, fuel: int = FUEL) -> LLMatcher:
    """A grammar at its start, after at most so much work of the lexer.

    Raises ConstraintError for text that is not one, or whose first tokens lead nowhere.
    """
    # Short errors, as they go to clients.
    limits = LLParserLimits(verbose_errors=False, initial_lexer_fuel=fuel)
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(text), log_level=0, limits=limits)
    trial = Constraint(matcher.deep_copy(), -(-tokenizer.vocab_size // 32), text)
    for _ in range(TRIAL_STEPS):
        allowed = np.flatnonzero(np.unpackbits(trial.mask().view(np.uint8), bitorder="little"))
        if trial.finished:
            break
        for token in trial.matcher.compute_ff_tokens() or [int(allowed[0])]:
            trial.accept(token)
    return matcher


class Constraint:
    """The state of one answer: which tokens may come next. It belongs to its sequence and outlives preemptions.

    `text` is its grammar's, from which another process makes the same constraint at its start.
    """

    def __init__(
        self, matcher: LLMatcher, words: int, text: str, on_error: Callable[[str], object] = lambda reason: None
    ) -> None:
        self.matcher = matcher
        self.words = words
        self.text = text
        self.on_error = on_error  # called with the reason if the grammar turns out to be too complex

    def mask(self) -> np.ndarray:
        """The tokens that may come next, [words] uint32 as `pack_masks` wants it; stop ids where the answer may end.

        Asking twice changes nothing. Raises ConstraintError when the grammar is too complex to go on.
        """
        mask = np.frombuffer(self.matcher.compute_bitmask(), np.uint32)[: self.words]
        # A matcher that failed allows the end of the turn, which would pass for a complete answer.
        if self.matcher.is_error():
            self.on_error(reason(self.matcher))
            raise ConstraintError(reason(self.matcher))
        return mask

    def accept(self, token: int) -> None:
        """Go on after the token that was sampled. Raises ConstraintError if it was not allowed."""
        if not self.matcher.consume_token(token):
            raise ConstraintError(reason(self.matcher))

    @property
    def finished(self) -> bool:
        """Whether the answer is complete: only a stop id may follow, or one has come."""
        return self.matcher.is_stopped()


def reason(matcher: LLMatcher) -> str:
    """Why llguidance refuses a grammar or a token, without the excerpt of the grammar that follows."""
    text = matcher.get_error().partition("\n   1 |")[0].removesuffix("<non-verbose/>")
    text = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", text)
    return " ".join(text.split())[:REASON_CHARS] or "no text obeys the schema"
