"""Eviction of whole requests' pages: LRU, FIFO and the optimum over a trace of sessions."""

from __future__ import annotations

import heapq
import json
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from cache.host import HostTier
from cache.keys import page_keys, root_key
from experiments.harness.figures import COLOURS, save, subplots
from experiments.harness.provenance import provenance
from experiments.harness.report import make_table, write_json
from experiments.replay.capacity import PAGE_TOKENS
from experiments.workloads.sessions import RELEASES, Session, requests
from experiments.workloads.synthetic import Json
from serve.api.messages import decode_request
from serve.prompt.render import render
from serve.prompt.tokenizer import load_tokenizer
from serve.rules.normalize import normalize

# Budgets, as shares of all distinct pages of the trace.
SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
Request = Sequence[bytes]  # keys of its full pages, in order


@dataclass(frozen=True)
class Workload:
    """A day of agents: how many sessions, on which projects, and their pace."""

    seed: int = 0
    sessions: int = 40
    projects: int = 6  # sessions of one project share tools and prompt up to the folder, and the folder
    at_once: int = 8  # open sessions; when one ends, the next begins
    turns: int = 20  # of a session, on average
    burst: int = 4  # requests in a row of one agent, on average
    bytes_per_token: int = 147_456  # Qwen3-8B in bfloat16


def sessions(work: Workload) -> list[Session]:
    """The sessions in the order in which they begin; some projects see more of them than others."""
    rng, releases = random.Random(f"sessions {work.seed}"), [name for name in RELEASES if not name.startswith("0.")]
    projects = rng.choices(range(work.projects), [1 / (1 + p) for p in range(work.projects)], k=work.sessions)
    return [
        Session(
            seed=work.seed * 10_000 + number,
            folder=f"/home/dev/project-{project}",
            release=releases[project % len(releases)],
            group=f"project {project}",
        )
        for number, project in enumerate(projects)
    ]


def order(work: Workload) -> Iterator[int]:
    """The session number of each request in order. Some open sessions are busy, others pause for long."""
    rng = random.Random(f"order {work.seed}")
    left = [1 + round(rng.expovariate(1 / work.turns)) for _ in range(work.sessions)]
    pace = [rng.paretovariate(1) for _ in range(work.sessions)]
    coming = list(range(work.sessions))
    while coming:
        opened = coming[: work.at_once]
        (chosen,) = rng.choices(opened, [pace[number] for number in opened])
        for _ in range(min(left[chosen], 1 + round(rng.expovariate(1 / work.burst)))):
            left[chosen] -= 1
            yield chosen
        if not left[chosen]:
            coming.remove(chosen)


def trace(work: Workload, pages_of: Callable[[Json], Request]) -> Iterator[Request]:
    """The requests of all sessions in their order, as pages."""
    bodies = [requests(session) for session in sessions(work)]
    for number in order(work):
        yield pages_of(next(bodies[number]))


def pages_by(tokenizer_folder: str) -> Callable[[Json], Request]:
    """A function from a body to its pages, as a server with this tokenizer makes them: preamble stripped, rendered."""
    tokenizer, root = load_tokenizer(tokenizer_folder), root_key(b"", PAGE_TOKENS, b"")

    def pages_of(body: Json) -> Request:
        request = normalize(decode_request(json.dumps(body).encode()), frozenset({"strip-preamble"})).request
        return page_keys(root, render(request, tokenizer), PAGE_TOKENS)

    return pages_of


def lru(requests: Sequence[Request], capacity: int) -> int:
    """Hits of the host tier with room for `capacity` pages; of one request, the last pages are evicted first."""
    tier, hits = HostTier(capacity), 0
    for keys in requests:
        hits += sum(tier.touch_many(keys))
        tier.put_many([(key, b"1") for key in keys])
    return hits


def fifo(requests: Sequence[Request], capacity: int) -> int:
    """Hits if the oldest page is evicted first."""
    held, hits = OrderedDict[bytes, None](), 0
    for keys in requests:
        hits += sum(key in held for key in keys)
        for key in reversed(keys):
            held.setdefault(key)
            if len(held) > capacity:
                held.popitem(last=False)
    return hits


def belady(requests: Sequence[Request], capacity: int) -> int:
    """Hits if the future is known: the pages needed soonest stay. No policy has more (Belady, 1966).

    https://doi.org/10.1147/sj.52.0078
    """
    upcoming = next_uses(requests)
    held, farthest, hits = dict[bytes, int](), list[tuple[int, bytes]](), 0
    for keys, uses in zip(requests, upcoming, strict=True):
        hits += sum(key in held for key in keys)
        for key, use in zip(keys, uses, strict=True):
            held[key] = use
            heapq.heappush(farthest, (-use, key))
        while len(held) > capacity:
            use, key = heapq.heappop(farthest)
            if held.get(key) == -use:  # else it was used since, or is gone
                del held[key]
    return hits


def next_uses(requests: Sequence[Request]) -> list[list[int]]:
    """For each page of each request, the number of the next request with that page, or the number of requests."""
    following: dict[bytes, int] = {}
    uses = []
    for number in reversed(range(len(requests))):
        uses.append([following.get(key, len(requests)) for key in requests[number]])
        following.update(dict.fromkeys(requests[number], number))
    return uses[::-1]


POLICIES: dict[str, Callable[[Sequence[Request], int], int]] = {"LRU": lru, "FIFO": fifo, "optimum": belady}


def summarise(work: Workload, replayed: Sequence[Request], console: Console) -> dict[str, Any]:
    """Hit rates by budget and policy as JSON values; a rate is the share of all pages asked for that were found."""
    asked, distinct = sum(map(len, replayed)), len({key for keys in replayed for key in keys})
    page_bytes = PAGE_TOKENS * work.bytes_per_token
    budgets = []
    for share in track(SHARES, "replaying", console=console, transient=True):
        capacity = max(1, round(share * distinct))
        rates = {name: round(policy(replayed, capacity) / asked, 4) for name, policy in POLICIES.items()}
        budgets.append({"share": share, "pages": capacity, "bytes": capacity * page_bytes, "hit_rate": rates})
    return {
        "workload": asdict(work),
        "page_tokens": PAGE_TOKENS,
        "requests": len(replayed),
        "pages_asked": asked,
        "pages_distinct": distinct,
        "unlimited_hit_rate": round(1 - distinct / asked, 4),
        "budgets": budgets,
    }


def table(summary: dict[str, Any]) -> Table:
    """The summary for a terminal."""
    title = f"Share of {summary['pages_asked']:,} pages found, {summary['requests']} requests"
    grid = make_table(("budget", "of all pages", *POLICIES), title=title)
    for row in summary["budgets"]:
        rates = (f"{row['hit_rate'][name]:.1%}" for name in POLICIES)
        grid.add_row(f"{row['bytes'] / 1e9:,.1f} GB", f"{row['share']:.0%}", *rates)
    grid.caption = f"without a limit: {summary['unlimited_hit_rate']:.1%}"
    return grid


def draw(summary: dict[str, Any], path: Path) -> None:
    """Hit rate over budget, one line a policy."""
    colours = {"LRU": COLOURS[0], "FIFO": COLOURS[1], "optimum": "#666666"}
    figure, axes = subplots(3.8, 7)
    budgets = [row["bytes"] / 1e9 for row in summary["budgets"]]
    for name, colour in colours.items():
        rates = [100 * row["hit_rate"][name] for row in summary["budgets"]]
        axes.plot(budgets, rates, marker="o", markersize=4, color=colour, label=name)
    axes.axhline(100 * summary["unlimited_hit_rate"], color="#666666", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda size, _: f"{size:g} GB")
    axes.set_ylim(0, 100)
    axes.set_xlabel("budget of the tier (log scale)")
    axes.set_ylabel("pages found, %")
    axes.set_title("What each eviction policy finds in a trace of agent sessions", fontsize=10, loc="left")
    axes.legend(frameon=False)
    save(figure, path)


def compare_policies(work: Workload, model: str, out: Path, console: Console) -> None:
    """Make the sessions' requests, replay them under every policy, print the table, write picture and summary."""
    total = sum(1 for _ in order(work))
    requested = trace(work, pages_by(model))
    replayed = list(track(requested, "rendering", total=total, console=console, transient=True))
    summary = summarise(work, replayed, console) | provenance(("tokenzero", "transformers", "tokenizers"))
    write_json(out / "policies.json", summary)
    draw(summary, out / "policies.png")
    console.print(table(summary))
    console.print(f"results in {out}")
