"""Random lives of a few conversations over stores that lose things; every cached page is compared with the truth.

A case is a list of operations, each a name and a seed of its own, so that leaving some out does not change the others:
`reduced` makes a failing case short. Look-ups, reads and writes happen when the case says so and on its own thread, and
the clock that stamps are taken from is the case's, so a case runs the same way each time. `python
-m tests.helpers.reuse_model FIRST [END]` runs the cases of these seeds, and prints the first that fails, reduced.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from cache.disk import DiskTier
from cache.remote import RemoteTier
from serve.engine import restore
from serve.engine.engine import Engine
from serve.engine.request import Failed, Finished, GenerationRequest, Started, TokenEvent
from tests.helpers.cold_reference import (
    CONFIG,
    DEVICES,
    FINGERPRINT,
    LIMIT,
    PAGE,
    PAGE_BYTES,
    SETTINGS,
    TOLERANCE,
    VOCAB,
    Truth,
    begins,
    parameters,
    records,
    wrong_logits,
    wrong_pages,
    wrong_preloaded,
    wrong_records,
)
from tests.helpers.stepped_engine import Clock, by_hand, tiers_over
from tests.helpers.tiny_engine import Always, tick

# At a time: few, so that each has many turns.
CONVERSATIONS = 4
LARGE = 1 << 30
# Pages that all salts share of two of the three openings, by the first token.
HEAD_PAGES = {109: 1, 107: 2}
# Turns of the loop after which a case that has not ended never will.
PATIENCE_TURNS = 5000


@dataclass(eq=False)
class Conversation:
    """What was said so far, and under which salt."""

    tokens: np.ndarray  # [tokens] int32
    salt: bytes


def head_of(prompt: np.ndarray) -> int:
    """The tokens of a prompt ([tokens] int32) that all salts share."""
    return min(HEAD_PAGES.get(int(prompt[0]), 0), (len(prompt) - 1) // PAGE) * PAGE


@dataclass(eq=False)
class Asked:
    """A request that was submitted."""

    conversation: Conversation
    engine: int
    number: int
    prompt: np.ndarray  # [tokens] int32
    stop_ids: frozenset[int]
    head: int  # tokens that conversations of all salts share
    events: list = field(default_factory=list)

    @property
    def said(self) -> np.ndarray:
        """Prompt and answer so far, [tokens] int32."""
        answer = [event.token for event in self.events if isinstance(event, TokenEvent)]
        return np.append(self.prompt, np.asarray(answer, np.int32))

    @property
    def ended(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], Finished | Failed)


@dataclass(frozen=True)
class Case:
    """Where pages are kept, and what happens."""

    seed: int
    lower: str  # the tier below host memory: disk, remote or none
    host_bytes: int
    store_bytes: int
    queue_bytes: int
    engines: int
    speculative_tokens: int
    patient: bool  # whether a sequence waits for a look-up, however long it takes
    preload_bytes: int
    preloads_at_start: bool  # all that it will, before it is asked anything
    operations: tuple[tuple[str, int], ...]  # each with a seed


WEIGHTS = {
    "say": 20,
    "crowd": 2,
    "branch": 3,
    "edit": 1,
    "turn": 5,
    "finish": 3,
    "cancel": 1,
    "lose": 4,
    "holes": 5,
    "forget": 3,
    "evict": 1,
    "prune": 1,
    "jump": 1,
    "write": 3,
    "restart": 2,
    "die": 1,
    "reopen": 1,
}


def case_of(seed: int, lower: str | None = None) -> Case:
    """A random case."""
    rng = random.Random(seed)
    lower = lower or rng.choice(["disk", "disk", "disk", "remote", "none"])
    return Case(
        seed,
        lower,
        host_bytes=rng.choice([6 * PAGE_BYTES, 64 << 20] + [0] * (lower != "none")),
        store_bytes=rng.choice([150_000, LARGE, LARGE]),
        queue_bytes=rng.choice([5 * PAGE_BYTES, LARGE, LARGE]),
        engines=rng.choice([1, 1, 2]),
        speculative_tokens=rng.choice([0, SETTINGS.speculative_tokens]),
        patient=rng.random() < 0.7,
        preload_bytes=LARGE if seed % 4 else 0,
        preloads_at_start=seed % 4 > 1,
        operations=tuple(
            (name, rng.randrange(1 << 30))
            for name in rng.choices([*WEIGHTS], [*WEIGHTS.values()], k=rng.randrange(25, 70))
        ),
    )


class World:
    """A case under way."""

    def __init__(self, case: Case, folder: Path, clock: Clock, only_known: bool = False):
        self.case, self.folder, self.clock, self.only_known = case, folder, clock, only_known
        restore.PATIENCE_SECONDS = 1e9 if case.patient else 0.0
        self.truth, self.counts, self.flips = Truth(), Counter(), []
        self.conversations: list[Conversation] = []
        self.open: list[Asked] = []
        self.lower = self.opened()
        self.engines = [self.engine() for _ in range(case.engines)]

    # Parts.

    def opened(self):
        """The tier that all engines share, if there is one."""
        if self.case.lower == "none":
            return None
        if self.case.lower == "remote":
            return RemoteTier(f"file://{self.folder}/remote")
        return DiskTier(self.folder / "disk", self.case.store_bytes)

    def engine(self) -> Engine:
        """An engine on the store, which is not started."""
        tiers = tiers_over(self.lower, self.case.host_bytes, self.case.queue_bytes)
        settings = replace(
            SETTINGS, speculative_tokens=self.case.speculative_tokens, preload_bytes=self.case.preload_bytes
        )
        engine = Engine(parameters(DEVICES), CONFIG, settings, FINGERPRINT, tiers)
        engine.core.costs.model = Always(1.0, 1.0)
        while self.case.preloads_at_start and engine.core.preloader.step(quiet=True):
            _ = tiers.searcher.turn() or tiers.pages.reader.turn()
        return engine

    def tiers(self) -> list:
        """All tiers there are, each once."""
        hosts = [tier for e in self.engines for tier in e.core.tiers.pages.tiers if tier.name == "host"]
        return hosts + ([self.lower] if self.lower is not None else [])

    # What may happen.

    def say(self, rng: random.Random) -> None:
        """A turn of a conversation: what was said, the answers as they were sampled, and a few words more."""
        if len(self.conversations) < 2:
            opening = np.random.default_rng(rng.randrange(3)).integers(3, VOCAB, 20).astype(np.int32)
            self.begin(rng, Conversation(opening[: rng.randrange(1, 20)], rng.choice([b"", b"", b"salt"])))
        conversation = rng.choice(self.conversations)
        if any(asked.conversation is conversation for asked in self.open):
            self.finish(rng)
        self.ask(rng, conversation, conversation.tokens)

    def begin(self, rng: random.Random, conversation: Conversation) -> Conversation:
        """Keep one more conversation, and of the others no more than a few."""
        if len(self.conversations) >= CONVERSATIONS:
            self.conversations.pop(rng.randrange(len(self.conversations)))
        self.conversations.append(conversation)
        return conversation

    def branch(self, rng: random.Random) -> None:
        """Go on from the middle of a conversation, which may be going on itself."""
        if self.conversations:
            old = rng.choice(self.conversations)
            new = self.begin(rng, Conversation(old.tokens, old.salt))
            self.ask(rng, new, old.tokens[: rng.randrange(len(old.tokens) + 1)])

    def edit(self, rng: random.Random) -> None:
        """Change one token in the middle, and say all after it again."""
        if self.conversations:
            old = rng.choice(self.conversations)
            tokens = old.tokens.copy()
            tokens[rng.randrange(len(tokens))] = rng.randrange(3, VOCAB)
            self.ask(rng, self.begin(rng, Conversation(tokens, old.salt)), tokens)

    def crowd(self, rng: random.Random) -> None:
        """Several branches at once, whose answers are too long for all of them to stay in the pool."""
        if self.conversations:
            old = rng.choice(self.conversations)
            for _ in range(rng.randrange(2, 5)):
                cut = rng.randrange(len(old.tokens) // 2, len(old.tokens) + 1)
                self.ask(rng, self.begin(rng, Conversation(old.tokens, old.salt)), old.tokens[:cut], 30)

    def ask(self, rng: random.Random, conversation: Conversation, tokens: np.ndarray, longest: int = 6) -> None:
        """Submit a prompt of these tokens and a few more, for an answer of up to `longest` tokens."""
        if len(tokens) > LIMIT - 16:
            tokens = tokens[: rng.randrange(1, LIMIT // 2)]
        words = np.asarray([rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 6))], np.int32)
        prompt = np.append(tokens, words)
        stop_ids = frozenset(rng.sample(range(VOCAB), 12)) if rng.random() < 0.3 else frozenset[int]()
        index = rng.randrange(len(self.engines))
        head = head_of(prompt)
        asked = Asked(conversation, index, 0, prompt, stop_ids, head)
        salt = conversation.salt
        request = GenerationRequest(prompt, rng.randrange(1, longest + 1), stop_ids, salt=salt, head=head)
        asked.number = self.engines[index].submit(request, asked.events.append)
        self.engines[index].inbox.submissions[-1].used = self.clock.time_ns()
        conversation.tokens = prompt
        self.open.append(asked)
        self.counts["requests"] += 1

    def turn(self, rng: random.Random) -> None:
        """Turn the engines' loops a little."""
        for _ in range(rng.randrange(1, 8)):
            self.advance(rng, rng.choice(self.engines))
        self.collect()
        if rng.random() < 0.3:
            for engine in self.engines:
                self.check_device(engine, [])

    def finish(self, rng: random.Random) -> None:
        """Turn the engines' loops until there is nothing to do."""
        for _ in range(PATIENCE_TURNS):
            busy = [self.advance(rng, engine) for engine in self.engines]
            if not any(busy):
                break
        else:
            raise AssertionError("the engines never come to rest")
        self.collect()
        assert not self.open, "a request was forgotten"
        for engine in self.engines:
            assert not engine.core.memory.prefix_cache.live, "a lease is held"
            if rng.random() < 0.7:
                engine.core.tiers.writer.flush()

    def advance(self, rng: random.Random, engine: Engine) -> bool:
        """Some of what the tiers have to do, and one step; False if the engine has nothing to do."""
        tiers, chance = engine.core.tiers, rng.random
        ran = [pool.turn() for pool in (tiers.searcher, tiers.pages.reader) if chance() < 0.5]
        if engine.core.idle and not any(ran):
            _ = tiers.searcher.turn() or tiers.pages.reader.turn() or tiers.writer.flush()
        engine.core.idle = False
        went_on = tick(engine)
        if chance() < 0.5:
            engine.core.preloader.step(engine.core.quiet)
        return went_on

    def cancel(self, rng: random.Random) -> None:
        """End a request that is under way."""
        if self.open:
            asked = self.open.pop(rng.randrange(len(self.open)))
            self.engines[asked.engine].cancel(asked.number)
            tick(self.engines[asked.engine])
            self.settle(asked)
            self.counts["cancelled"] += 1

    def lose(self, rng: random.Random) -> None:
        """Lose records of some tiers: of a chain or of any, single ones or runs, tails or full pages or both."""
        if rng.random() < 0.7:
            self.finish(rng)
        self.check_records()
        tiers = self.tiers()
        chosen = tiers if rng.random() < 0.6 else [rng.choice(tiers)]
        keys = sorted({key for tier in chosen for key in records(tier)})
        names = {key: self.truth.names.get(key) for key in keys}
        keys.sort(key=lambda key: (0, key) if names[key] is None else (len(names[key]), key))  # type: ignore[arg-type]
        if rng.random() < 0.7 and self.conversations:
            line = rng.choice(self.conversations).tokens
            keys = [k for k in keys if names[k] is not None and begins(line, names[k])]
        kind = rng.choice(["full", "full", "tail", "any"])
        keys = [k for k in keys if kind == "any" or names[k] is None or (len(names[k]) % PAGE == 0) == (kind == "full")]
        if not keys:
            return
        if rng.random() < 0.6:
            start = rng.randrange(len(keys))
            lost = keys[start : start + rng.randrange(1, 4)]
        else:
            share = rng.choice([0.2, 0.5, 0.9])
            lost = [key for key in keys if rng.random() < share]
        for tier in chosen:
            tier.delete(lost)
        self.counts["lost"] += len(lost)
        if rng.random() < 0.6:  # or the next request finds them on the device, and they are written again
            for engine in self.engines:
                engine.core.memory.prefix_cache.tree.evict(SETTINGS.num_pages)

    def holes(self, rng: random.Random) -> None:
        """Go on with a conversation of which no device has anything, and every tier has lost the same pages."""
        self.finish(rng)
        self.check_records()
        if not self.conversations:
            return
        conversation = rng.choice(self.conversations)
        for engine in self.engines:
            engine.core.tiers.writer.flush()
            engine.core.memory.prefix_cache.tree.evict(SETTINGS.num_pages)
        chain = [(key, said) for key, said in self.truth.names.items() if begins(conversation.tokens, said)]
        lost = [key for key, said in chain if rng.random() < (0.1 if len(said) % PAGE else 0.25)]
        for tier in self.tiers():
            tier.delete(lost)
        self.ask(rng, conversation, conversation.tokens)

    def forget(self, rng: random.Random) -> None:
        """Evict pages of a device, as a larger prompt would."""
        index = rng.choice(self.engines).core.memory.prefix_cache.tree
        self.counts["evicted"] += index.evict(rng.choice([1, 5, SETTINGS.num_pages, SETTINGS.num_pages]))

    def evict(self, rng: random.Random) -> None:
        """Lower a host tier's budget for a moment."""
        for tier in self.tiers():
            if tier.name == "host" and rng.random() < 0.7:
                budget, tier.budget_bytes = tier.budget_bytes, rng.randrange(1 + tier.bytes) + PAGE_BYTES
                tier.put_many([(b"other" * 6 + b"..", bytes(PAGE_BYTES))])
                tier.delete([b"other" * 6 + b".."])
                tier.budget_bytes = budget

    def prune(self, rng: random.Random) -> None:
        """Evict from the disk what its stamps say was used longest ago."""
        self.check_records()
        if self.case.lower == "disk":
            self.counts["pruned"] += self.lower.prune(int(self.lower.stats().bytes * rng.random()))

    def jump(self, rng: random.Random) -> None:
        """Set the clock forward or back."""
        self.clock.now += int(rng.choice([-3600, -1, 61, 3600]) * 1e9)

    def write(self, rng: random.Random) -> None:
        """Let an engine's writer write what it has."""
        rng.choice(self.engines).core.tiers.writer.flush()

    def restart(self, rng: random.Random) -> None:
        """End an engine when it is at rest, having written everything, and start another."""
        self.finish(rng)
        index = rng.randrange(len(self.engines))
        self.end(self.engines[index])
        self.engines[index] = self.engine()
        self.counts["restarts"] += 1

    def die(self, rng: random.Random) -> None:
        """End an engine in the middle of everything; what waits to be written is lost."""
        index = rng.randrange(len(self.engines))
        self.collect()
        for asked in [asked for asked in self.open if asked.engine == index]:
            self.open.remove(asked)
            self.settle(asked)
        self.count_preloaded(self.engines[index])
        self.engines[index].core.tiers.writer.tiers = ()
        self.engines[index].core.tiers.close()
        self.engines[index] = self.engine()
        self.counts["deaths"] += 1

    def reopen(self, rng: random.Random) -> None:
        """End all engines, and open the store again."""
        self.finish(rng)
        self.close()
        self.lower = self.opened()
        self.engines = [self.engine() for _ in self.engines]

    def end(self, engine: Engine) -> None:
        """Write everything, and close what is the engine's own. Nothing may have raised: here no disk fails."""
        self.count_preloaded(engine)
        engine.core.saver.drain(60.0)
        tiers = engine.core.tiers
        tiers.close()
        swallowed = [owner for owner in (engine.core.saver, tiers.pages, tiers.writer) if owner.failures.count]
        assert not swallowed, f"an exception was kept from costing anything: {swallowed}"

    def count_preloaded(self, engine: Engine) -> None:
        """Note what became of the pages that an engine has preloaded."""
        pages = engine.core.memory.prefix_cache.preloaded
        self.counts += Counter(preloads_taken=pages.taken, preloads_evicted=pages.evicted)

    def close(self) -> None:
        """End all engines and close the store."""
        for engine in self.engines:
            self.end(engine)
        if self.lower is not None:
            self.lower.close()

    # What must hold.

    def collect(self) -> None:
        """Check the answers that are complete, and what the devices hold now."""
        ended = [asked for asked in self.open if asked.ended]
        self.open = [asked for asked in self.open if not asked.ended]
        for asked in ended:
            self.settle(asked)
            self.check_answer(asked)
        for index in {asked.engine for asked in ended}:
            self.check_device(self.engines[index], [a for a in ended if a.engine == index])

    def settle(self, asked: Asked) -> None:
        """Note what was said when a request has ended."""
        said = asked.said
        if asked.events and asked.events[-1] == Finished("stop"):
            # Nobody is told of the token that ended the answer, but it is part of what was computed.
            said = np.append(said, np.argmax(self.truth.of(said)[1][len(said) - 1]).astype(np.int32))
        asked.conversation.tokens = asked.said
        self.truth.learn(said, asked.conversation.salt, asked.head)

    def check_answer(self, asked: Asked) -> None:
        """Each token is the likeliest of a cold run, or within the tolerance as likely, which is counted."""
        assert isinstance(asked.events[-1], Finished), asked.events[-1]
        started = next(event for event in asked.events if isinstance(event, Started))
        self.counts["reused"] += started.reused_tokens
        self.counts["restored"] += sum(started.restored.values())
        self.counts["tails"] += bool(started.restored) and started.reused_tokens % PAGE > 0
        said = asked.said
        logits = self.truth.of(said)[1]
        for at in range(len(asked.prompt), len(said)):
            before = logits[at - 1]
            if before.argmax() != said[at]:
                gap = before.max() - before[said[at]]
                assert gap <= TOLERANCE * np.abs(before).max(), f"token {at} of an answer is wrong: {said.tolist()}"
                self.flips.append((self.case.seed, at))
        if asked.events[-1] == Finished("stop"):
            assert int(logits[len(said) - 1].argmax()) in asked.stop_ids, "an answer has stopped too early"

    def check_device(self, engine: Engine, asked: list[Asked]) -> None:
        """Every page in the tree, the tree itself, and the logits of a token after what is cached."""
        engine.core.memory.prefix_cache.check()
        wrong = wrong_pages(engine, self.truth) + wrong_preloaded(engine, self.truth)
        for one in asked:
            wrong += wrong_logits(engine, self.truth, one.said, one.conversation.salt, one.head)
        assert not wrong, "\n".join(wrong)

    def check_records(self) -> None:
        """Every record of every tier."""
        for asked in self.open:
            self.truth.learn(asked.said, asked.conversation.salt, asked.head)
        wrong = [line for tier in self.tiers() for line in wrong_records(tier, self.truth, self.only_known)]
        assert not wrong, "\n".join(wrong)

    def live(self) -> None:
        """Let everything happen, and check what is left."""
        for name, seed in self.case.operations:
            getattr(self, name)(random.Random(seed))
        self.finish(random.Random(self.case.seed))
        for engine in self.engines:
            engine.core.saver.drain(60.0)
            engine.core.tiers.writer.flush()
            self.check_device(engine, [])
            self.counts["preempted"] += engine.counters.preemptions
        self.check_records()


def run(case: Case, clock: Clock, folder: Path | None = None) -> World:
    """Live a case, in a folder of its own unless others live there, too. Raises AssertionError for what is wrong."""
    with tempfile.TemporaryDirectory() as own:
        world = World(case, folder or Path(own), clock, only_known=folder is not None)
        try:
            world.live()
        finally:
            for engine in world.engines:
                engine.core.tiers.writer.tiers = ()
            world.close()
        return world


def fault(case: Case, clock: Clock) -> str:
    """What goes wrong in a case; nothing if all is right."""
    try:
        run(case, clock)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def reduced(case: Case, clock: Clock) -> Case:
    """A failing case with no operation that it would fail without."""
    at, size = 0, len(case.operations) // 2
    while size:
        less = replace(case, operations=case.operations[:at] + case.operations[at + size :])
        if at >= len(case.operations):
            at, size = 0, size // 2
        elif fault(less, clock):
            case = less
        else:
            at += size
    return case


def failing(
    seeds: Iterable[int], clock: Clock, lower: str | None = None, seen: Callable[[World], object] = lambda world: None
) -> str:
    """The first of these cases that fails, reduced, with what goes wrong in it; nothing if none does."""
    for seed in seeds:
        case = case_of(seed, lower)
        try:
            seen(run(case, clock))
        except Exception:
            case = reduced(case, clock)
            return f"{case}\n{fault(case, clock)}"
    return ""


def many(first: int, last: int) -> None:
    """Run cases and print how many fail, and the first one that does."""
    with by_hand() as clock:
        failed = [seed for seed in range(first, last) if fault(case_of(seed), clock)]
        print(f"{len(failed)} of {last - first} cases fail: {failed}")
        if failed:
            sys.exit(failing(failed[:1], clock))


def beside(folder: str, first: int, last: int) -> None:
    """Run cases on a store that other processes use, and print what happened in them."""
    counts: Counter[str] = Counter()
    with by_hand() as clock:
        for seed in range(first, last):
            # One budget for all: whose stores differ in size is another test's business.
            counts.update(run(replace(case_of(seed, "disk"), store_bytes=1 << 20), clock, Path(folder)).counts)
    print(json.dumps(counts))


if __name__ == "__main__":
    if sys.argv[1] == "beside":
        beside(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        many(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else int(sys.argv[1]) + 1)
