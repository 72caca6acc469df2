"""What a cache of some size finds in a trace of calls: hit rates, reads per write, tokens and time saved.

No model runs. `python -m experiments.replay` sends the calls of agents at work through a PrefixStore, with
`--trace FILE` those of a trace in Mooncake's format; `--live URL` asks a Messages endpoint the same.

`--policies --model DIR` asks which pages a tier should let go: the requests of agent sessions, rendered and tokenised
as the server does it, become keys of pages; LRU is the host tier itself, FIFO and Belady's optimum stand beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import math
import random
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cache.keys import page_keys, root_key
from cache.pool import slots_for
from cache.store import PrefixStore
from cache.tiers import HostTier
from experiments.provenance import provenance
from experiments.server import prompt_counts
from experiments.sessions import RELEASES, Json, Session, requests
from experiments.traces import Agents, Call, generate, read_mooncake
from serve.cost import Constants, CostFile
from serve.messages import decode_request
from serve.normalize import normalize
from serve.render import load_tokenizer, render

RESULTS = Path("experiments/results/replay")
COST_MODEL = Path("experiments/results/sweeps/position/cost_model.json")
PAGE_TOKENS = 64
CAPACITIES = (250_000, 500_000, 1_000_000, 2_000_000, 4_000_000)  # tokens
ALL_PAGES = 2**22  # 268M tokens: more than 10^5 calls of agents write
# Budgets are shares of all pages that the trace ever needs.
SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)

Request = Sequence[bytes]  # keys of its full pages, in order


def replay(prompts: Iterable[np.ndarray], store: PrefixStore) -> np.ndarray:
    """Tokens of each prompt ([tokens] int32), and how many of them the store had: [calls, 2] int64.

    One prompt after another is matched, as the engine does it, and kept. An answer is not: the next prompt brings it.
    Raises PoolExhausted for a prompt that is longer than the store.
    """
    found = []
    for tokens in prompts:
        lease = store.match(tokens[:-1])
        found.append((len(tokens), lease.reused))
        lease, _ = store.extend(lease, len(tokens))
        store.insert(lease, tokens)
        store.release(lease)
    return np.array(found, np.int64).reshape(-1, 2)


def ask(url: str, calls: Sequence[Call], speed: float, console: Console) -> np.ndarray:
    """Send the calls as text to a Messages endpoint: tokens and cached tokens by its usage, [calls, 2] int64.

    Each is sent at its time, `speed` times as fast, but not before the one ahead of it is answered. Raises
    httpx.HTTPError where the endpoint does not answer, or with an error.
    """
    found, start = [], time.monotonic()
    with httpx.Client(base_url=url, timeout=600, headers={"anthropic-version": "2023-06-01"}) as client:
        model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        for call in track(calls, "asking", console=console, transient=True):
            time.sleep(max(0.0, call.time_s / speed - (time.monotonic() - start)))
            messages = [{"role": "user", "content": call.text()}]
            answer = client.post("/v1/messages", json={"model": model, "max_tokens": 1, "messages": messages})
            found.append(prompt_counts(answer.raise_for_status().json()["usage"]))
    return np.array(found, np.int64).reshape(-1, 2)


def outcome(calls: Sequence[Call], found: np.ndarray, costs: Constants) -> dict[str, Any]:
    """What `found` ([calls, 2] int64, see `replay`) amounts to, as JSON values.

    Hit rates by call, in their 5th, 50th and 95th percentile, are those from a session's second call on.
    """
    tokens, reused = found.T
    _, firsts = np.unique([call.session for call in calls], return_index=True)
    rates = np.delete(reused / tokens, firsts)
    seconds = costs.ttft_s(tokens, 0) - costs.ttft_s(tokens, reused)  # [calls] float64
    return {
        "hit_rate_by_call": np.percentile(rates, [5, 50, 95]).round(4).tolist() if len(rates) else None,
        "hit_rate": round(float(reused.sum() / tokens.sum()), 4),
        "reads_per_write": round(float(reused.sum() / (tokens - reused).sum()), 2),
        "tokens_saved": int(reused.sum()),
        "ms_saved_per_call": round(float(1000 * seconds.mean()), 1),
    }


def compare_capacities(
    calls: Sequence[Call], capacities: Sequence[int], costs: Constants, console: Console
) -> dict[str, Any]:
    """The calls' outcome for each capacity in tokens that they outgrow and for one that holds everything, as JSON.

    Headers stripped, and then kept where calls have one. Capacities below the longest prompt are left out.
    """

    def run(header: bool, store: PrefixStore) -> dict[str, Any]:
        name = f"{'kept' if header else 'stripped'}, {store.pool.num_pages * PAGE_TOKENS:,} tokens"
        prompts = (call.tokens(header) for call in track(calls, name, console=console, transient=True))
        return outcome(calls, replay(prompts, store), costs)

    store = PrefixStore(ALL_PAGES, PAGE_TOKENS)
    unlimited = run(False, store)
    # One page more: a page that is filled further is copied first.
    needed = (ALL_PAGES - store.pool.free_pages + 1) * PAGE_TOKENS
    del store
    sizes = [size for size in sorted(capacities) if least_capacity(calls) <= size < needed]
    rows = [{"header": "stripped", "capacity": s, **run(False, sized_store(s))} for s in sizes]
    rows.append({"header": "stripped", "capacity": needed, **unlimited})
    if any(len(call.header) for call in calls):
        rows += [{"header": "kept", "capacity": s, **run(True, sized_store(s))} for s in (*sizes, needed)]
    return {
        "page_tokens": PAGE_TOKENS,
        "calls": len(calls),
        "tokens": sum(int(call.blocks[:, 1].sum()) for call in calls),
        "rows": rows,
    }


def sized_store(capacity: int) -> PrefixStore:
    """An empty store with room for `capacity` tokens, in whole pages."""
    return PrefixStore(capacity // PAGE_TOKENS, PAGE_TOKENS)


def least_capacity(calls: Iterable[Call]) -> int:
    """Tokens that the longest prompt with its header needs, in whole pages, and the one that a copy may take."""
    longest = max(int(call.header[:, 1].sum() + call.blocks[:, 1].sum()) for call in calls)
    return (slots_for(longest, PAGE_TOKENS) + 1) * PAGE_TOKENS


def capacity_table(summary: dict[str, Any]) -> Table:
    """The outcomes for a terminal."""
    title = f"{summary['calls']:,} calls, {summary['tokens'] / 1e6:,.0f}M tokens: the share that was cached"
    grid = Table(title=title, box=SIMPLE_HEAD)
    for name in ("header", "capacity", "5%", "50%", "95%", "all", "reads/write", "saved"):
        grid.add_column(name, justify="right", no_wrap=True)
    for row in summary["rows"]:
        by_call = [f"{rate:.1%}" for rate in row["hit_rate_by_call"] or ()] or ["-"] * 3
        ends = (f"{row['hit_rate']:.1%}", f"{row['reads_per_write']:,.1f}", f"{row['ms_saved_per_call'] / 1000:,.2f} s")
        capacity = f"{row['capacity'] / 1e6:,.2f}M" if row["capacity"] else ""
        grid.add_row(row["header"], capacity, *by_call, *ends)
    grid.add_section()
    grid.add_row("published", "", "85%", "", "97%", "97.2%", "11.7", "")
    grid.caption = (
        "5, 50, 95%: percentiles by call, from a session's second on; saved: a call. Published: NVIDIA, coding agents; "
        "the 97.2% of four."
    )
    return grid


@dataclass(frozen=True)
class Workload:
    """A day of agents: who works, on what, and how much at a time."""

    seed: int = 0
    sessions: int = 40
    projects: int = 6  # sessions of one project share tools and prompt up to the folder, and the folder
    at_once: int = 8  # open sessions; when one ends, the next begins
    turns: int = 20  # of a session, in the mean
    burst: int = 4  # requests that an agent sends before another's turn comes, in the mean
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
            kin=f"project {project}",
        )
        for number, project in enumerate(projects)
    ]


def order(work: Workload) -> Iterator[int]:
    """Whose request comes next, by number of the session. Some open sessions are busy, others are left for long."""
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
    """What makes pages of a body, as a server with this tokenizer does: preamble stripped, rendered, tokenised."""
    tokenizer, root = load_tokenizer(tokenizer_folder), root_key(b"", PAGE_TOKENS, b"")

    def pages_of(body: Json) -> Request:
        request = normalize(decode_request(json.dumps(body).encode()), frozenset({"strip-preamble"})).request
        return page_keys(root, render(request, tokenizer), PAGE_TOKENS)

    return pages_of


def lru(requests: Sequence[Request], capacity: int) -> int:
    """Pages found by the host tier with room for `capacity` pages; of one request the tail goes first."""
    tier, hits = HostTier(capacity), 0
    for keys in requests:
        hits += sum(tier.touch_many(keys))
        tier.put_many([(key, b"1") for key in keys])
    return hits


def fifo(requests: Sequence[Request], capacity: int) -> int:
    """Pages found where the page goes first that came first."""
    held, hits = OrderedDict[bytes, None](), 0
    for keys in requests:
        hits += sum(key in held for key in keys)
        for key in reversed(keys):
            held.setdefault(key)
            if len(held) > capacity:
                held.popitem(last=False)
    return hits


def belady(requests: Sequence[Request], capacity: int) -> int:
    """Pages found with the future known: those stay that are needed soonest (Belady, 1966). No policy finds more."""
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
    """For each page of each request, the number of the next request with that page; a number beyond all if none."""
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
    grid = Table(title=title, box=SIMPLE_HEAD)
    for name in ("budget", "of all pages", *POLICIES):
        grid.add_column(name, justify="right")
    for row in summary["budgets"]:
        rates = (f"{row['hit_rate'][name]:.1%}" for name in POLICIES)
        grid.add_row(f"{row['bytes'] / 1e9:,.1f} GB", f"{row['share']:.0%}", *rates)
    grid.caption = f"without a limit: {summary['unlimited_hit_rate']:.1%}"
    return grid


def draw(summary: dict[str, Any], path: Path) -> None:
    """Hit rate over budget, one line a policy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"LRU": "#0072B2", "FIFO": "#D55E00", "optimum": "#666666"}
    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
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
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def compare_policies(work: Workload, model: str, out: Path, console: Console) -> None:
    """Make the sessions' requests, replay them under every policy, print the table, write picture and summary."""
    total = sum(1 for _ in order(work))
    requested = trace(work, pages_by(model))
    replayed = list(track(requested, "rendering", total=total, console=console, transient=True))
    summary = summarise(work, replayed, console) | provenance(("tokenzero", "transformers", "tokenizers"))
    out.mkdir(parents=True, exist_ok=True)
    (out / "policies.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw(summary, out / "policies.png")
    console.print(table(summary))
    console.print(f"results in {out}")


def file_identity(path: Path) -> dict[str, str]:
    """What tells a trace file from others, wherever it lies."""
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def main(argv: list[str] | None = None) -> None:
    """Replay agents' calls, a trace file or, for the policies, agent sessions; print a table, write it as JSON."""
    cli = argparse.ArgumentParser(prog="python -m experiments.replay", description=__doc__.split("\n")[0])
    cli.add_argument("--trace", type=Path, help="JSONL in Mooncake's format (default: agents at work)")
    cli.add_argument("--agents", type=int, default=Agents.agents, help="(default: %(default)s)")
    cli.add_argument("--calls", type=int, default=Agents.calls, help="of each agent (default: %(default)s)")
    cli.add_argument("--release", choices=list(RELEASES), default=Agents.release, help="of the agents' client")
    cli.add_argument("--capacity", type=int, nargs="+", help="of the store, in tokens; as many as you like")
    cli.add_argument("--live", metavar="URL", help="ask a Messages endpoint as well, without headers")
    cli.add_argument("--speed", type=float, default=math.inf, help="of --live, times the trace's (default: no pauses)")
    cli.add_argument("--cost-model", type=Path, default=COST_MODEL, help="prices tokens (default: %(default)s)")
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--policies", action="store_true", help="compare eviction policies; needs --model")
    cli.add_argument("--model", help="checkpoint folder whose tokenizer and template the policies' trace uses")
    cli.add_argument("--sessions", type=int, default=Workload.sessions, help="of the policies' trace")
    cli.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (default: %(default)s)")
    args, console = cli.parse_args(argv), Console()
    if args.policies and not args.model:
        cli.error("--policies needs --model: a checkpoint's folder")
    for name in ("agents", "calls", "sessions", "speed"):
        if not getattr(args, name) > 0:
            cli.error(f"--{name} {getattr(args, name)}: expected more than 0")
    if args.policies:
        compare_policies(Workload(seed=args.seed, sessions=args.sessions), args.model, args.out, console)
        return
    work = Agents(seed=args.seed, agents=args.agents, calls=args.calls, release=args.release)
    try:
        costs = msgspec.json.decode(args.cost_model.read_bytes(), type=CostFile).constants
        calls = read_mooncake(args.trace) if args.trace else generate(work)
    except msgspec.MsgspecError as error:
        cli.error(f"{args.cost_model} is no cost model: {error}; write one with `python -m experiments.fit`")
    except (OSError, ValueError) as error:
        cli.error(str(error))
    least = least_capacity(calls)
    if args.capacity and min(args.capacity) < least:
        cli.error(f"--capacity {min(args.capacity)}: the longest prompt needs {least} tokens")
    try:
        live = ask(args.live, calls, args.speed, console) if args.live else None
    except (httpx.HTTPError, LookupError, ValueError) as error:
        cli.error(f"--live {args.live}: expected a Messages endpoint, found {type(error).__name__}: {error}")
    compared = compare_capacities(calls, args.capacity or CAPACITIES, costs, console)
    if live is not None:
        compared["rows"].append({"header": "live", "capacity": None, **outcome(calls, live, costs)})
    summary = {
        "trace": file_identity(args.trace) if args.trace else asdict(work),
        "cost_model": {"file": str(args.cost_model), "constants": asdict(costs)},
        **compared,
        **provenance(("tokenzero", "numpy")),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.trace.stem if args.trace else 'agents'}.json"
    path.write_text(json.dumps(summary, indent=2) + "\n")
    console.print(capacity_table(summary))
    console.print(f"results in {path}")


if __name__ == "__main__":
    sys.exit(main())
