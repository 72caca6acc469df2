"""The checks at a soak's end: pure functions of its samples, lives and answers, each with its figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from signal import SIGKILL, SIGTERM
from statistics import median

from experiments.soak.cold import Difference
from experiments.soak.stage import Life, Sample, is_idle

GROWTH = 0.02  # of resident memory between the second and the last fifth of a life
SPREAD = 8  # descriptors or threads that come and go with clients
JUDGED_SECONDS = 120  # a shorter life is all warm-up
LOST = 0.1  # the largest share of later turns with unknown tokens, of those that were judged
SHOWN = 3  # examples in a failed check's line

STARTED = "Started server process"  # before it are progress and a greeting, wrapped at 80 columns
RECORD = re.compile(r"\d{4}-\d\d-\d\d |.*(Traceback|Error)")
# The records that a sound server logs in a soak. All others are reported.
EXPECTED = tuple(
    map(
        re.compile,
        (
            r"\s*$",
            r"\S+ \S+ uvicorn\.error (?!WARNING|ERROR|CRITICAL)",
            r"\S+ \S+ uvicorn\.error WARNING Invalid HTTP request received\.",
            r"\S+ \S+ tokenzero\.requests ",
            r"\S+ \S+ tokenzero\.server stopping: ",
            r"\S+ \S+ tokenzero\.kernels building the CPU kernels",
            r"\S+ \S+ tokenzero\.server ready after ",
            r"\S+ \S+ tokenzero \S+: \w+ on .+ pages of \d+ tokens, context \d+",
            r"\S+ \S+ tokenzero [\d,]+ pages are preloaded",
            r"\S+ \S+ tokenzero\.volatility ",
            r"\S+ \S+ tokenzero\.engine request \d+ is preempted ",
        ),
    )
)


@dataclass(frozen=True)
class Check:
    """A check, its result and its figures; `passed` is None if it could not be judged."""

    name: str
    passed: bool | None
    detail: str


def quiet(last: Sample | None) -> Check:
    """Without clients the server runs nothing, nothing waits, no page is held."""
    if last is None:
        return Check("idle at the end", False, "the server could not be asked")
    shown = {name: int(last.figures[name]) for name in ("running", "waiting", "pages_in_use")}
    return Check("idle at the end", is_idle(last), ", ".join(f"{name} {value}" for name, value in shown.items()))


def fifths(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]] | None:
    """The samples of the second and of the last fifth of the longest life; None if that was too short to be judged."""
    if not samples:
        return None
    lives = [[s for s in samples if s.life == life] for life in {s.life for s in samples}]
    longest = max(lives, key=lambda life: life[-1].at_s - life[0].at_s)
    begun, length = longest[0].at_s, longest[-1].at_s - longest[0].at_s
    if length < JUDGED_SECONDS:
        return None
    second, last = ([s for s in longest if n <= (s.at_s - begun) / length * 5 <= n + 1] for n in (1, 4))
    return (second, last) if second and last else None


def flat(
    name: str, samples: Sequence[Sample], value: Callable[[Sample], float], most: Callable[[float], float], unit: str
) -> Check:
    """Whether a value's median in the last fifth is at most `most` of its median in the second fifth."""
    if (found := fifths(samples)) is None:
        return Check(name, None, f"no life of {JUDGED_SECONDS} s to judge by")
    before, after = (median(map(value, part)) for part in found)
    return Check(name, after <= most(before), f"{before:,.1f} to {after:,.1f} {unit} ({after / before - 1:+.1%})")


def memory(samples: Sequence[Sample]) -> Check:
    """The server's own resident memory grows by less than GROWTH after warm-up.

    Mapped files do not count: their pages are the system's cache, and grow until the stores on disk are full.
    """
    return flat(
        "memory is flat", samples, lambda s: (s.rss - s.mapped) / 2**20, lambda before: before * (1 + GROWTH), "MiB"
    )


def descriptors(samples: Sequence[Sample]) -> Check:
    """File descriptors do not pile up."""
    return flat("descriptors are flat", samples, lambda s: s.descriptors, lambda before: before + SPREAD, "open")


def threads(samples: Sequence[Sample]) -> Check:
    """Threads do not pile up."""
    return flat("threads are flat", samples, lambda s: s.threads, lambda before: before + SPREAD, "running")


def clients(problems: Sequence[str], answers: int) -> Check:
    """Every request is answered correctly: no 5xx, no broken stream, refusals by their status, schemas obeyed."""
    detail = f"{answers:,} answers, {len(problems)} problems"
    return Check("every client is served", not problems and answers > 0, joined(detail, problems))


def counters(samples: Sequence[Sample]) -> Check:
    """No life counts a failed request, a 5xx, a failed or dropped write, a corrupt page, an audit's mismatch."""
    bad: dict[str, float] = {}
    for latest in last_of_lives(samples):
        for name, value in latest.figures.items():
            if value and re.match(r"(server_errors|failed_requests|(errors|corrupt|dropped)_|audit_mismatches)", name):
                bad[name] = bad.get(name, 0) + value
    detail = ", ".join(f"{name} {value:,.0f}" for name, value in bad.items())
    return Check("no error is counted", not bad, detail or "none in any life")


def audits(samples: Sequence[Sample]) -> Check:
    """The server has audited what it reused, and found nothing wrong."""
    totals = dict.fromkeys(("audited_requests_total", "audited_tokens_total", "audit_mismatches_total"), 0.0)
    for latest in last_of_lives(samples):
        for name in totals:
            totals[name] += latest.figures.get(name, 0.0)
    requests, tokens, wrong = totals.values()
    detail = f"{requests:,.0f} requests and {tokens:,.0f} tokens audited, {wrong:,.0f} wrong"
    unjudged = not requests and fifths(samples) is None
    return Check("audits find nothing wrong", None if unjudged else requests > 0 and not wrong, detail)


def tiers(samples: Sequence[Sample]) -> Check:
    """Every tier has hits and evictions, as a long enough soak must have."""
    totals: dict[str, float] = {}
    for latest in last_of_lives(samples):
        for name, value in latest.figures.items():
            if name.startswith(("hits_", "evicted_")):
                totals[name] = totals.get(name, 0) + value
    detail = ", ".join(f"{name.replace('_', ' ')} {value:,.0f}" for name, value in totals.items())
    missed = not totals or not all(totals.values())
    return Check("every tier is hit and evicts", None if missed and fifths(samples) is None else not missed, detail)


def last_of_lives(samples: Sequence[Sample]) -> list[Sample]:
    """The latest sample of each life: its counters since it began."""
    return list({s.life: s for s in samples}.values())


def ended(lives: Sequence[Life]) -> Check:
    """Each server ended with the expected status, after SIGTERM within the time that `running_server` allows."""
    statuses = {"kill -9": (-SIGKILL,), "SIGTERM": (0, -SIGTERM), "by itself": ()}
    odd = [f"life {x.number}, {x.end}: status {x.status}" for x in lives if x.status not in statuses[x.end]]
    detail = f"{len(lives)} lives, {sum(x.end == 'kill -9' for x in lives)} of them killed"
    return Check("servers end as expected", not odd and bool(lives), joined(detail, odd))


def unexpected(lines: Sequence[str]) -> list[str]:
    """The lines of a log that a sound server does not write."""
    started = next((n for n, line in enumerate(lines) if STARTED in line), len(lines))
    records = [line for n, line in enumerate(lines) if n >= started or RECORD.match(line)]
    return [line.rstrip() for line in records if not any(known.match(line) for known in EXPECTED)]


def logs(lines: Mapping[str, Sequence[str]]) -> Check:
    """No log holds a traceback or a warning; `lines` are the unexpected ones by log."""
    found = [f"{name}: {line}" for name, of_life in lines.items() for line in of_life]
    return Check("logs are clean", not found, joined(f"{len(found)} unexpected lines", found))


def first_turns(compared: int, differences: Sequence[Difference], reused: int) -> Check:
    """Every first turn is answered as by the server that reuses nothing, except for near ties, which are counted."""
    wrong = [d for d in differences if not d.tied]
    detail = f"{compared:,} compared, {len(wrong)} differ, {len(differences) - len(wrong)} flipped at a near tie"
    detail += f", the twin reused {reused} tokens" if reused else ""
    return Check(
        "first turns equal their twins", compared > 0 and not wrong and not reused, joined(detail, map(shown, wrong))
    )


def later_turns(judged: int, unknown: int, flips: int, differences: Sequence[Difference]) -> Check:
    """Every token of the judged later turns follows from the logits without a cache.

    A few may be unknown, since a killed server has not written their latest answers.
    """
    detail = f"{judged:,} judged, {len(differences)} wrong, {flips} tokens flipped at a near tie, {unknown:,} not known"
    passed = not differences and unknown <= LOST * judged if judged + unknown else None
    return Check("later turns follow their logits", passed, joined(detail, map(shown, differences)))


def shown(difference: Difference) -> str:
    """A difference on one line."""
    kept = difference.kept
    reused, words = kept.message["usage"].get("cache_read_by_tier"), str(kept.said[0])
    return f"turn {kept.turn}, {reused} of {kept.prompt_tokens}: {words:.150} for {difference.other:.150}"


def joined(detail: str, examples: Iterable[str]) -> str:
    """A sentence and the first few examples."""
    return "; ".join([detail, *list(examples)[:SHOWN]])
