"""Whether the time to a first token tells one key what another has sent: `python -m experiments.bench.isolation`.

In each pair one prompt is new to the server and the other has just been sent by another key, the victim. The attacker's
key sends both, in random order, and nothing else runs. The AUC is the probability that a known prompt is answered
sooner than a new one, ties halved
(https://en.wikipedia.org/wiki/Receiver_operating_characteristic#Area_under_the_curve): 0.5
tells nothing. `shared` is the same with `--share-prefix all`, where a difference is expected.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import httpx
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.harness.client import NoText, measure
from experiments.harness.provenance import provenance
from experiments.harness.report import write_json
from experiments.harness.server import running_server
from experiments.workloads.demo_model import TINY, write_demo_model
from experiments.workloads.synthetic import Json

RESULTS = Path("experiments/results/bench/isolation.json")
VICTIM, ATTACKER = "victim", "attacker"
FLAGS = ("--max-model-len", "8192", "--kv-pool-bytes", "256MiB", "--audit-share", "0")
WARM_UP = 10  # pairs that are not counted


def body_of(rng: random.Random, tokens: int) -> Json:
    """A streamed request of one token, whose user message of about so many tokens nobody has sent before."""
    text = " ".join(str(rng.randrange(10**6)) for _ in range(tokens // 4))
    message = {"role": "user", "content": text}
    return {"model": "any", "max_tokens": 1, "temperature": 0, "stream": True, "messages": [message]}


def pair(clients: dict[str, httpx.Client], rng: random.Random, tokens: int) -> tuple[float, float]:
    """The attacker's milliseconds to a first token of a prompt that the victim has sent, and of one that nobody has."""
    while True:
        known, new = (body_of(rng, tokens) for _ in range(2))
        taken: dict[str, float] = {}
        try:
            measure(clients[VICTIM], "", known)
            for name, body in rng.sample([("known", known), ("new", new)], 2):
                taken[name] = measure(clients[ATTACKER], "", body).ttft_ms
        except NoText:  # the model ended its turn at once
            continue
        return taken["known"], taken["new"]


def auc(known: Sequence[float], new: Sequence[float]) -> float:
    """The probability that a known prompt is faster than a new one, ties halved; over all pairs of the two."""
    order = np.sort(np.asarray(new))
    below = np.searchsorted(order, known, "left") + np.searchsorted(order, known, "right")
    return float(1 - below.mean() / (2 * len(order)))


def arm(model: Path, share: str, pairs: int, tokens: int, seed: int) -> dict[str, float | int]:
    """The AUC and the medians of a server with `--share-prefix share`."""
    keys = {name: secrets.token_hex(16) for name in (VICTIM, ATTACKER)}
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "keys")
        lines = (f"{name} sha256:{hashlib.sha256(key.encode()).hexdigest()}\n" for name, key in keys.items())
        file.write_text("".join(lines))
        flags = (*FLAGS, "--api-key-file", str(file), "--share-prefix", share)
        with running_server(model, *flags, compiled=True) as server:
            clients = {
                name: httpx.Client(base_url=server.url, headers={"x-api-key": key}, timeout=600)
                for name, key in keys.items()
            }
            both = [pair(clients, rng, tokens) for _ in track(range(WARM_UP + pairs), f"share {share}")][WARM_UP:]
            for client in clients.values():
                client.close()
    known, new = zip(*both, strict=True)
    return {"pairs": pairs, "auc": auc(known, new), "known_ms": median(known), "new_ms": median(new)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both arms, print and write them."""
    cli = argparse.ArgumentParser(prog="python -m experiments.bench.isolation", description=__doc__)
    cli.add_argument("--model", type=Path, help="a checkpoint (default: a tiny one)")
    cli.add_argument("--pairs", type=int, default=2000)
    cli.add_argument("--shared-pairs", type=int, default=200, help="of the arm that shares")
    cli.add_argument("--tokens", type=int, default=1000, help="of a prompt, about")
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--output", type=Path, default=RESULTS)
    args = cli.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            write_demo_model(Path(folder, "model"), config=TINY)
        model = args.model or Path(folder, "model")
        arms = {
            "private": arm(model, "none", args.pairs, args.tokens, args.seed),
            "shared": arm(model, "all", args.shared_pairs, args.tokens, args.seed),
        }
    table = Table("arm", "pairs", "AUC", "known, ms", "new, ms")
    for name, found in arms.items():
        table.add_row(name, f"{found['pairs']:,}", *(f"{found[each]:.3f}" for each in ("auc", "known_ms", "new_ms")))
    Console().print(table)
    write_json(args.output, {"tokens": args.tokens, "arms": arms} | provenance())


if __name__ == "__main__":
    main()
