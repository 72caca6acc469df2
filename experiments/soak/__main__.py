"""Random sessions on a real server for some minutes, then checks: `python -m experiments.soak --minutes N`.

The server has a small pool and small budgets, so every tier evicts all the time. Conversations branch and are edited,
streams are abandoned, bad requests must be refused, answers are forced to obey schemas; the server is killed or
terminated and restarted on its store, which loses pages meanwhile. At the end no page may be held, memory, descriptors
and threads must be flat, logs and counters clean, and answers equal to those without a cache.

Exit status 1, with one line for each check that failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from experiments.harness.provenance import provenance
from experiments.harness.report import write_json
from experiments.harness.server import running_server
from experiments.soak import checks
from experiments.soak.checks import Check, unexpected
from experiments.soak.clients import Backlog, Kept, Seen, client
from experiments.soak.cold import Cold, Difference, by_body, twins
from experiments.soak.picture import draw
from experiments.soak.stage import Broken, Life, Sample, Stage, ends, live, lose, sample, until_quiet
from experiments.soak.talk import BODY_BYTES, Topics
from experiments.workloads.demo_model import write_demo_model
from model.families import load_config
from model.kv import bytes_per_token
from serve.engine.runtime import set_up_jax

MODEL = ".cache/demo-model"
RESULTS = Path("experiments/results/soak")
CONTEXT, PAGE = 2048, 8  # tokens
MEMORY_BYTES = 12 << 20  # for what the server remembers of requests: full after warm-up
AUDIT_SHARE = 0.1  # of the device's time: the server is rarely idle
TWIN_LOG = "twin.log"
# Tokens whose pages the pool and each tier hold: all of them less than sessions touch in a minute.
POOL_TOKENS, HOST_TOKENS, DISK_TOKENS = 2560, 5120, 18432
EXPLAINED = 20  # differences that are explained


@dataclass(frozen=True)
class Config:
    """What a soak does."""

    minutes: float = 20
    sessions: int = 6  # at the same time
    seed: int = 0
    scale: float = 1.0  # of system texts and questions
    sample_s: float = 3  # between two samples of the process
    lose_s: float = 10  # between two losses of the store
    lose_share: float = 0.2  # of its pages, lost each time
    judged: int = 1000  # later turns whose tokens are compared with cold logits

    @property
    def seconds(self) -> float:
        """How long sessions talk."""
        return 60 * self.minutes


@dataclass(eq=False)
class Soaked:
    """The records of a soak. Each field is written by one task of `soak`."""

    seen: Seen = field(default_factory=Seen)
    samples: list[Sample] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)
    last: Sample | None = None  # of the server at rest
    lost_pages: int = 0
    interrupted: int = 0


def flags(model: str, store: Path | None) -> list[str]:
    """The soaked server's flags; without a store, those of its twin."""
    token = bytes_per_token(load_config(model), np.dtype(np.float32))
    sizes: dict[str, Any] = {
        "max-model-len": CONTEXT,
        "page-size": PAGE,
        "max-prefill-tokens": 128,
        "max-body-bytes": BODY_BYTES,
        "max-num-seqs": 4,
    }
    if store is None:
        small: dict[str, Any] = {"kv-pool-bytes": 8 * POOL_TOKENS * token}
    else:
        tiers = {"host-cache-bytes": HOST_TOKENS * token, "store": store, "store-bytes": store_bytes(model)}
        audits = {"audit-share": AUDIT_SHARE, "memory-bytes": MEMORY_BYTES}
        small = {"kv-pool-bytes": POOL_TOKENS * token, **tiers, "flush-seconds": 0.3, **audits}
    return [str(part) for name, value in {**sizes, **small}.items() for part in (f"--{name}", value)]


def store_bytes(model: str) -> int:
    """The disk's budget: LMDB's space for DISK_TOKENS of pages, each in whole blocks of 4 KiB with a header."""
    page = PAGE * bytes_per_token(load_config(model), np.dtype(np.float32))
    return DISK_TOKENS // PAGE * (page + 8192)


async def soak(config: Config, model: str, folder: Path, progress: Progress) -> Soaked:
    """Run sessions on the server until the time is over and the server is idle."""
    stage, found, rng = Stage(), Soaked(), random.Random(f"soak {config.seed}")
    store, seen = folder / "store", found.seen
    bar = progress.add_task("soaking", total=config.seconds)
    backlog = Backlog(Topics.of(config.seed, config.scale))
    sessions = [
        asyncio.create_task(client(stage, seen, f"soak {config.seed} {n}", backlog, config.seconds))
        for n in range(config.sessions)
    ]

    async def watch() -> None:
        while True:
            await stage.ready.wait()
            assert stage.up is not None
            try:
                looked = await sample(stage, stage.up)
            except (Broken, httpx.HTTPError, TimeoutError, psutil.Error) as error:
                seen.problem(f"the server cannot be watched: {type(error).__name__}: {error}")
            else:
                found.samples += [looked] if looked else []
            if found.samples:
                now = found.samples[-1]
                text = f"life {now.life}, {len(seen.kept):,} answers, {now.rss >> 20:,} MiB, "
                text += f"{seen.counts['problems']} problems"
                progress.update(bar, completed=round(min(stage.passed(), config.seconds)), description=text)
            await asyncio.sleep(config.sample_s)

    async def forget() -> None:
        while True:
            await asyncio.sleep(config.lose_s)
            await stage.ready.wait()
            losing = asyncio.to_thread(lose, store, store_bytes(model), config.lose_share, rng)
            found.lost_pages += await losing

    async def last_words() -> None:
        forgetting.cancel()
        await asyncio.gather(*sessions)
        found.last = await until_quiet(stage)

    watching, forgetting = asyncio.create_task(watch()), asyncio.create_task(forget())
    try:
        plan = ends(config.seconds, rng)
        found.lives = await live(stage, model, flags(model, store), folder, plan, last_words)
    finally:
        for task in (watching, forgetting, *sessions):
            task.cancel()
        await asyncio.gather(watching, forgetting, *sessions, return_exceptions=True)
    found.interrupted = stage.interrupted
    return found


@dataclass(frozen=True)
class Verdict:
    """The comparison of the answers with those without a cache."""

    compared: int  # first turns
    differences: list[Difference]
    reused: int  # tokens, by the twin
    judged: int = 0  # later turns
    unknown: int = 0  # later turns whose tokens could not be rebuilt
    flips: int = 0  # tokens that were second best, by a near tie
    wrong: list[Difference] = field(default_factory=list)  # later turns


def verdict(config: Config, kept: Sequence[Kept], model: str, folder: Path, progress: Progress) -> Verdict:
    """Ask a server that reuses nothing for each first turn again, then judge differences and later turns."""
    groups = by_body([one for one in kept if one.turn == 0])
    bar = progress.add_task("first turns again", total=len(groups))
    with running_server(model, *flags(model, None), log=folder / TWIN_LOG) as server:
        found, reused = asyncio.run(twins(server.url, groups, lambda: progress.advance(bar)))
        exact = httpx.get(f"{server.url}/health").json()["dtype"] == "float32"
    made = Verdict(sum(map(len, groups)), found, reused)
    later = [one for one in kept if one.turn > 0 and one.free]
    chosen = random.Random(config.seed).sample(later, min(config.judged, len(later)))
    if not exact or not (found or chosen):
        return made  # near ties are defined for float32 only
    bar = progress.add_task("later turns, cold", total=len(chosen))
    with closing(Cold(model, folder / "store", CONTEXT)) as cold:
        explained = [cold.tied(d) if n < EXPLAINED else d for n, d in enumerate(found)]
        judged = [cold.judge(one) for one in progress.track(chosen, task_id=bar)]
    known = [found for found in judged if found is not None]
    return replace(
        made,
        differences=explained,
        judged=len(known),
        unknown=len(judged) - len(known),
        flips=sum(flips for _, flips in known),
        wrong=[difference for difference, _ in known if difference],
    )


def checked(found: Soaked, made: Verdict, folder: Path) -> list[Check]:
    """Every check of a soak."""
    paths = [*(life.log for life in found.lives), folder / TWIN_LOG]
    logs = {path.stem: unexpected(path.read_text(errors="replace").splitlines()) for path in paths}
    return [
        checks.clients(found.seen.problems, len(found.seen.kept)),
        checks.first_turns(made.compared, made.differences, made.reused),
        checks.later_turns(made.judged, made.unknown, made.flips, made.wrong),
        checks.quiet(found.last),
        checks.memory(found.samples),
        checks.descriptors(found.samples),
        checks.threads(found.samples),
        checks.counters(found.samples),
        checks.tiers(found.samples),
        checks.audits(found.samples),
        checks.ended(found.lives),
        checks.logs(logs),
    ]


def summary(config: Config, model: str, found: Soaked, made: Verdict, judged: Sequence[Check]) -> dict[str, Any]:
    """The soak as JSON values."""
    totals: Counter[str] = Counter()
    for latest in checks.last_of_lives(found.samples):
        totals.update({name: round(value) for name, value in latest.figures.items()})
    return {
        "config": asdict(config),
        "model": model,
        "server_flags": flags(model, Path("STORE")),
        "passed": all(check.passed is not False for check in judged),
        "checks": [asdict(check) for check in judged],
        "requests": dict(sorted(found.seen.counts.items())),
        "sent_again": found.interrupted,
        "lost_pages": found.lost_pages,
        "counted_by_server": dict(totals),
        "lives": [asdict(life) | {"log": life.log.name} for life in found.lives],
        "problems": found.seen.problems[:EXPLAINED],
    }


def table(judged: Sequence[Check]) -> Table:
    """The checks for a terminal."""
    grid = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for name in ("", "check", "figures"):
        grid.add_column(name)
    for check in judged:
        mark = {True: "[green]passed", False: "[red]failed", None: "[yellow]not judged"}[check.passed]
        grid.add_row(mark, check.name, escape(check.detail.partition("; ")[0]))
    return grid


def run(config: Config, model: str, out: Path, console: Console) -> list[Check]:
    """Soak, check, and write what was found to `out`; the checks.

    soak.json has the figures, samples.jsonl and differences.jsonl one line each, soak.png the picture.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch, Progress(*columns, console=console) as progress:
        folder = Path(scratch)
        found = asyncio.run(soak(config, model, folder, progress))
        made = verdict(config, found.seen.kept, model, folder, progress)
        judged = checked(found, made, folder)
    report = summary(config, model, found, made, judged) | provenance()
    write_json(out / "soak.json", report)
    (out / "samples.jsonl").write_text("".join(json.dumps(asdict(s)) + "\n" for s in found.samples))
    different = [{"other": d.other, "tied": d.tied, **asdict(d.kept)} for d in [*made.differences, *made.wrong]]
    (out / "differences.jsonl").write_text("".join(json.dumps(d) + "\n" for d in different))
    draw(found.samples, found.lives, out / "soak.png")
    return judged


def parser() -> argparse.ArgumentParser:
    """The command line."""
    default = Config()
    cli = argparse.ArgumentParser(
        prog="python -m experiments.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_argument("--minutes", type=float, default=default.minutes, help="of sessions (default: %(default)s)")
    cli.add_argument("--model", default=MODEL, help="checkpoint folder (default: the demo model, written if missing)")
    cli.add_argument(
        "--sessions", type=int, default=default.sessions, help="conversations at the same time (default: %(default)s)"
    )
    cli.add_argument("--seed", type=int, default=default.seed)
    cli.add_argument("--scale", type=float, default=default.scale, help="of the texts that conversations share")
    cli.add_argument(
        "--sample-s", type=float, default=default.sample_s, help="seconds between two samples of the server"
    )
    cli.add_argument("--lose-s", type=float, default=default.lose_s, help="seconds between two losses of the store")
    cli.add_argument("--lose-share", type=float, default=default.lose_share, help="of its pages, lost each time")
    cli.add_argument(
        "--judged", type=int, default=default.judged, help="later turns that are compared with cold logits"
    )
    cli.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    return cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak, print the checks, and say which failed."""
    cli = parser()
    args, console = cli.parse_args(arguments), Console(stderr=True)
    config = Config(**{field.name: getattr(args, field.name) for field in fields(Config)})
    for name in ("minutes", "sessions", "scale", "sample_s", "lose_s"):
        if not getattr(config, name) > 0:
            cli.error(f"--{name.replace('_', '-')} {getattr(config, name)}: expected more than 0")
    if not 0 <= config.lose_share <= 1 or config.judged < 0:
        cli.error("--lose-share, --judged: expected 0 to 1, and at least 0")
    set_up_jax()
    try:
        if args.model == MODEL:
            write_demo_model(MODEL, console=console)
        judged = run(config, args.model, args.out, console)
    except (Broken, RuntimeError, OSError, ValueError) as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    Console().print(table(judged))
    print(f"figures in {args.out}, with a picture")
    failed = [check for check in judged if check.passed is False]
    for check in failed:
        print(f"soak: {check.name}: failed: {check.detail}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
