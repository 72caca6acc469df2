"""Agent sessions at a given rate on a server process: `python -m experiments.bench.load --model DIR`, or `--url URL`.

Arrivals are open: sessions arrive by a seeded Poisson process that does not wait for the server. Turns within a session
are closed: each comes a seeded pause after the answer before it, as an agent reads an answer and runs its tools first.
History is generated, not what the model said, so all endpoints get the same requests. A session ends when a request of
it is refused, fails or times out. The requests sent in the `--seconds` after `--ramp` are measured.

TTFT runs to the first `content_block_delta`, ITL from each to the next. Our server sends such an event for each token,
or for several tokens if they form one character or could start a delimiter; other servers choose their own granularity.
A request is good if its TTFT and its mean ITL are within limits, by default those of MLPerf Inference for Llama 2 70B
in the server scenario. Goodput is the rate of good requests; in DistServe (https://arxiv.org/abs/2401.09670) it is the
highest rate of all requests at which 90% are good, which the line below the table reports. An answer without text,
whose model ended its turn at once, has no TTFT and is left out of that share.

Clients and server share a machine, which had two cores for the published figures. So the clients are one thread, their
requests are made before a rate begins, and each rate reports how late they ran and how many cores each side used.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from experiments.bench.open_loop import Asked, Plan, ask, offer
from experiments.harness.figures import COLOURS, HEIGHT, WIDTH, panels, plain, save, time_label
from experiments.harness.provenance import provenance
from experiments.harness.report import make_table, write_json
from experiments.harness.server import running_server
from experiments.workloads.sessions import RELEASES, Session, http_headers, requests

RESULTS = Path("experiments/results/bench/load.json")
PERCENTILES = (50, 95, 99)
KEEP_SECONDS = 3  # an idle connection: less than the 5 s after which uvicorn closes it
ATTAINED = 0.9  # the share of good requests at which DistServe reads off a goodput


class LoadError(Exception):
    """The endpoint does not answer, so nothing can be measured."""


@dataclass(frozen=True)
class Config:
    """The load, and the limits of a good request."""

    rates: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)  # sessions a second
    seconds: float = 60  # measured of each rate
    ramp: float = 15  # before that, while sessions pile up
    turns: float = 4  # requests of a session, on average; twice as many at most
    pause: float = 2  # seconds between an answer and the next request, on average
    release: str = "2.1.179"
    scale: float = 0.3  # of the client's own prompt: first requests of some 6K tokens
    max_tokens: int = 48
    timeout: float = 60  # seconds until a request times out
    ttft_slo: float = 2000  # ms
    itl_slo: float = 200  # ms
    seed: int = 0


def plans(config: Config, rate: float, model: str) -> list[Plan]:
    """The sessions of one rate, in the order of their arrivals.

    Two rates share turns, pauses and the arrival process, scaled, but no text: differences between rates are not
    chance.
    """
    rng, texts = random.Random(f"load {config.seed}"), random.Random(f"load {config.seed}, texts of {rate}")
    made, at = list[Plan](), 0.0
    while (at := at + rng.expovariate(1) / rate) < config.ramp + config.seconds:
        more = rng.expovariate(1 / (config.turns - 1)) if config.turns > 1 else 0
        count = min(1 + round(more), round(2 * config.turns))
        pauses = tuple(rng.expovariate(1 / config.pause) if config.pause else 0.0 for _ in range(count))
        session = make_session(config, f"rate {rate}", texts.getrandbits(32), model)
        made.append(Plan(at, http_headers(session), bodies(config, session, count), pauses))
    return made


def make_session(config: Config, group: str, seed: int, model: str) -> Session:
    """A session of one client release, in the same folder as the others of its group."""
    return Session(
        seed=seed,
        release=config.release,
        group=f"load {config.seed} {group}",
        model=model,
        thinking=False,
        scale=config.scale,
    )


def bodies(config: Config, session: Session, count: int) -> tuple[bytes, ...]:
    """The first requests of a session, ready to send."""
    asking = {"max_tokens": config.max_tokens, "temperature": 0, "stream": True}
    return tuple(json.dumps(body | asking).encode() for body in islice(requests(session), count))


def percentiles(values: Sequence[float], digits: int = 1) -> dict[str, float] | None:
    """The values' percentiles by name; None if there are no values."""
    if not len(values):
        return None
    found = np.percentile(values, PERCENTILES).round(digits).tolist()
    return dict(zip((f"p{p}" for p in PERCENTILES), found, strict=True))


def is_good(config: Config, asked: Asked) -> bool:
    """Whether a request met both limits."""
    return (
        asked.outcome == "completed"
        and asked.ttft_ms is not None
        and asked.ttft_ms <= config.ttft_slo
        and sum(asked.gaps_ms) <= config.itl_slo * len(asked.gaps_ms)
    )


def summarise(config: Config, rate: float, asked: Sequence[Asked], lags: Sequence[float]) -> dict[str, Any]:
    """One rate as JSON values."""
    measured = [a for a in asked if a.sent_s >= config.ramp]
    done = [a for a in measured if a.outcome == "completed"]
    outcomes = Counter(a.outcome for a in measured)
    prompts, events = sum(a.prompt_tokens for a in done), sum(len(a.gaps_ms) + 1 for a in done if a.ttft_ms is not None)
    empty = sum(a.ttft_ms is None for a in done)
    timed = len(measured) - empty
    good = sum(is_good(config, a) for a in measured)
    return {
        "sessions_per_s": rate,
        "offered": len(measured),
        "offered_per_s": round(len(measured) / config.seconds, 3),
        "completed": len(done),
        "refused": outcomes["refused"],
        "failed": outcomes["failed"],
        "timed_out": outcomes["timed out"],
        "empty": empty,
        "ttft_ms": percentiles([a.ttft_ms for a in done if a.ttft_ms is not None]),
        "itl_ms": percentiles([gap for a in done for gap in a.gaps_ms], 2),
        "prompt_tokens": percentiles([a.prompt_tokens for a in done], 0),
        "cached_share": round(sum(a.cached_tokens for a in done) / prompts, 4) if prompts else None,
        "tokens_per_event": round(sum(a.output_tokens for a in done) / events, 3) if events else None,
        "good": good,
        "attainment": round(good / timed, 4) if timed else None,
        "goodput_per_s": round(good / config.seconds, 3),
        "client_lag_ms": (percentiles([1e3 * lag for lag in lags], 2) or {}) | {"max": round(1e3 * max(lags), 1)},
        "errors": dict(Counter(a.error for a in measured if a.error).most_common(3)),
    }


async def sweep(
    config: Config, url: str, model: str, keys: dict[str, str], server: psutil.Process | None
) -> list[dict[str, Any]]:
    """Each rate in turn, with its own sessions. Raises LoadError if the first requests are not answered."""
    columns = (TextColumn("{task.description:<16}"), BarColumn(), TimeElapsedColumn())
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_SECONDS)
    rows = []
    # Drawn rarely, since drawing takes time from the thread that measures.
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2, transient=True) as progress:
        async with httpx.AsyncClient(base_url=url, headers=keys, limits=limits, timeout=None) as client:
            await warm_up(client, config, model)
            for rate in config.rates:
                planned = plans(config, rate, model)
                end = config.ramp + config.seconds
                bar = progress.add_task(f"{rate:g} sessions/s", total=end)
                before, begun = cpu_seconds(server), time.perf_counter()
                asked, lags = await offer(client, planned, end, config.timeout, partial(advance, progress, bar))
                took = time.perf_counter() - begun
                used = {who: round((now - before[who]) / took, 2) for who, now in cpu_seconds(server).items()}
                rows.append(summarise(config, rate, asked, lags) | {"sessions": len(planned), "cores_used": used})
    return rows


def advance(progress: Progress, bar: TaskID, seconds: float) -> None:
    """Move a progress bar to so many seconds."""
    progress.update(bar, completed=seconds)


async def warm_up(client: httpx.AsyncClient, config: Config, model: str) -> None:
    """Send two requests that are not counted. Raises LoadError if they are not answered."""
    session = make_session(config, "warm-up", 0, model)
    for body in bodies(config, session, 2):
        first = await ask(client, body, http_headers(session), config.timeout)
        if first.outcome != "completed":
            raise LoadError(
                f"{client.base_url}: expected a Messages endpoint that answers, found {first.error}: check --url"
            )


def cpu_seconds(server: psutil.Process | None) -> dict[str, float]:
    """Processor seconds of the clients' process so far, and of the server if it is ours and alive."""
    used = {"clients": time.process_time()}
    with suppress(psutil.Error):
        used |= {"server": sum(server.cpu_times()[:2])} if server else {}
    return used


def sustained(rows: Sequence[dict[str, Any]]) -> float | None:
    """DistServe's goodput: the highest offered requests/s at which enough requests were good, or None."""
    return max((r["offered_per_s"] for r in rows if (r["attainment"] or 0) >= ATTAINED), default=None)


def table(config: Config, rows: Sequence[dict[str, Any]]) -> Table:
    """The rates for a terminal."""
    title = f"Agent sessions that arrive at a rate (1/s), {config.seconds:g} s each; times are p50 p95 p99"
    columns = ("rate", "sent/s", "sent", "done", "529", "lost", "cached", "TTFT, s", "ITL, ms", "good", "good/s")
    grid = make_table(columns, no_wrap=True, title=title, padding=0)
    for r in rows:
        ttft = " ".join(f"{ms / 1e3:.1f}" for ms in (r["ttft_ms"] or {}).values())
        itl = " ".join(f"{ms:.0f}" for ms in (r["itl_ms"] or {}).values())
        counts = (r["offered"], r["completed"], r["refused"], r["failed"] + r["timed_out"])
        cached, good = ("-" if r[key] is None else f"{r[key]:.0%}" for key in ("cached_share", "attainment"))
        rates = (f"{r['sessions_per_s']:g}", f"{r['offered_per_s']:.2f}")
        grid.add_row(*rates, *map(str, counts), cached, ttft or "-", itl or "-", good, f"{r['goodput_per_s']:.2f}")
    at = sustained(rows)
    up_to = "at no rate here" if at is None else f"up to {at:.2f} requests/s"
    grid.caption = (
        f"good: TTFT up to {config.ttft_slo:g} ms, mean ITL up to {config.itl_slo:g} ms; {ATTAINED:.0%} are, {up_to}. "
        f"lost: failed, or timed out after {config.timeout:g} s. The clients: "
        f"{max(r['client_lag_ms']['p99'] for r in rows):.1f} ms late (p99), "
        f"on {max(r['cores_used']['clients'] for r in rows):.2f} cores."
    )
    return grid


def draw(config: Config, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw TTFT, ITL and goodput over the rate of sessions, a panel each."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, places = panels(3, 1, WIDTH, 1.6 * HEIGHT, sharex=True)
    rates = [r["sessions_per_s"] for r in rows]
    times = (
        ("ttft_ms", config.ttft_slo, "Time to first token (log scale)"),
        ("itl_ms", config.itl_slo, "Time between two events with text (log scale)"),
    )
    for axes, (key, limit, title) in zip(places, times, strict=False):
        for percent, colour in zip(PERCENTILES, COLOURS, strict=False):
            at = [r[key][f"p{percent}"] if r[key] else np.nan for r in rows]
            axes.plot(rates, at, marker="o", markersize=4.5, color=colour, label=f"p{percent}")
        axes.axhline(limit, color="0.5", linewidth=1, linestyle=":", label="limit")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(time_label)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(title, fontsize=10, loc="left")
    for key, colour, label in (("offered_per_s", "0.5", "sent"), ("goodput_per_s", COLOURS[4], "good")):
        places[2].plot(rates, [r[key] for r in rows], marker="o", markersize=4.5, color=colour, label=label)
    places[2].set_ylim(0)
    places[2].set_title("Requests a second: all, and those within both limits (goodput)", fontsize=10, loc="left")
    places[2].set_xlabel("sessions that arrive a second")
    for axes in places:
        plain(axes)
        axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


@contextmanager
def endpoint(args: argparse.Namespace, keys: dict[str, str]) -> Iterator[tuple[str, str, psutil.Process | None]]:
    """The endpoint's URL, its model's name, and the server's process if it was started here. Raises LoadError."""
    if args.url:
        url = args.url.rstrip("/")
        yield url, args.model or first_model(url, keys), None
        return
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        try:
            log = Path(folder, "server.log")
            server = stack.enter_context(running_server(args.model, *args.flags, log=log, compiled=True))
        except RuntimeError as error:
            raise LoadError(str(error)) from error
        yield server.url, Session.model, psutil.Process(server.process.pid)


def first_model(url: str, keys: dict[str, str]) -> str:
    """The name of the endpoint's first model. Raises LoadError if it lists none."""
    try:
        answer = httpx.get(f"{url}/v1/models", headers=keys | {"anthropic-version": "2023-06-01"}, timeout=10)
        return str(answer.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, LookupError, ValueError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise LoadError(
            f"{url}/v1/models: expected a list of models, found {problem}; name a model with --model"
        ) from error


def about(url: str) -> dict[str, Any]:
    """Dtype and device, which our own server reports at `/health`."""
    with suppress(httpx.HTTPError, ValueError, AttributeError):
        health = httpx.get(f"{url}/health", timeout=10).json()
        return {key: health.get(key) for key in ("dtype", "device")}
    return {"dtype": None, "device": None}


def config_of(args: argparse.Namespace) -> Config:
    """The config that the flags ask for. Raises ValueError for sizes that mean nothing."""
    config = Config(**{field.name: getattr(args, field.name) for field in fields(Config)})
    config = replace(config, rates=tuple(config.rates))
    for name in ("seconds", "scale", "max_tokens", "timeout", "ttft_slo", "itl_slo"):
        if not getattr(config, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: expected more than 0")
    if min(config.rates) <= 0 or len(set(config.rates)) < len(config.rates):
        raise ValueError(f"--rates {' '.join(map(str, config.rates))}: expected different numbers above 0")
    if config.turns < 1 or config.ramp < 0 or config.pause < 0:
        raise ValueError("--turns, --ramp, --pause: expected at least 1, 0 and 0")
    return config


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cli = argparse.ArgumentParser(
        prog="python -m experiments.bench.load",
        description=__doc__,
        epilog="What follows -- goes to the server: -- --max-num-seqs 8 --max-queue 16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Config()
    cli.add_argument("--model", help="checkpoint folder to serve; with --url the model's name (default: its first one)")
    cli.add_argument("--url", help="a Messages endpoint, up to and without /v1, instead of a server of our own")
    cli.add_argument("--key-variable", default="", help="environment variable that holds the endpoint's API key")
    cli.add_argument("--release", choices=list(RELEASES), default=default.release, help="of the agents' client")
    cli.add_argument("--rates", type=float, nargs="+", default=default.rates, help="sessions a second")
    cli.add_argument("--seconds", type=float, default=default.seconds, help="measured of each rate")
    cli.add_argument("--ramp", type=float, default=default.ramp, help="seconds before that")
    cli.add_argument("--turns", type=float, default=default.turns, help="requests of a session, on average")
    cli.add_argument("--pause", type=float, default=default.pause, help="seconds after an answer, on average")
    cli.add_argument("--scale", type=float, default=default.scale, help="of the client's system text and tools")
    cli.add_argument("--max-tokens", type=int, default=default.max_tokens, help="of an answer")
    cli.add_argument("--timeout", type=float, default=default.timeout, help="seconds until a request times out")
    cli.add_argument("--ttft-slo", type=float, default=default.ttft_slo, help="ms to the first token of a good request")
    cli.add_argument("--itl-slo", type=float, default=default.itl_slo, help="ms between its tokens, on average")
    cli.add_argument(
        "--seed", type=int, default=default.seed, help="take another one for an endpoint that has cached the last run"
    )
    cli.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        help=f"where the numbers go; the picture goes next to them (default: {RESULTS})",
    )
    cli.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    return cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Load, print a table, write numbers and picture."""
    cli = parser()
    args, console = cli.parse_args(arguments), Console()
    if not args.url and not args.model:
        cli.error("expected --model DIR to serve, or --url of a running server")
    if args.url and args.flags:
        cli.error(
            f"{' '.join(args.flags)}: flags are for a server started here, but --url names another: leave them out"
        )
    key = os.environ.get(args.key_variable, "") if args.key_variable else ""
    keys = {"x-api-key": key, "authorization": f"Bearer {key}"} if key else {}
    try:
        config = config_of(args)
    except ValueError as error:
        cli.error(str(error))
    try:
        with endpoint(args, keys) as (url, model, server):
            health = about(url)
            rows = asyncio.run(sweep(config, url, model, keys, server))
        if not any(r["completed"] for r in rows):
            raise LoadError(f"{url}: expected answers, found {rows[0]['errors'] or 'no request sent: raise --seconds'}")
    except LoadError as error:
        print(f"load: {error}", file=sys.stderr)
        return 2
    summary = {"config": asdict(config), "server_flags": args.flags, **health, "sustained_per_s": sustained(rows)}
    write_json(args.out, summary | {"rows": rows} | provenance())
    draw(config, rows, args.out.with_suffix(".png"))
    console.print(table(config, rows))
    for row in rows:
        for problem, count in row["errors"].items():
            console.print(f"{row['sessions_per_s']:g} sessions/s, {count} times: {problem}", style="yellow")
    console.print(f"numbers in {args.out}, with a picture")
    return 0


if __name__ == "__main__":
    sys.exit(main())
