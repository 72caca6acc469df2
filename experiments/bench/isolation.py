"""What one key can find out about another's prompts: `python -m experiments.bench.isolation`.

A server runs with each `--share-prefix`, and three arms attack it with the key of another client:

- *extraction*: a secret of four digits in the victim's prompt is guessed digit by digit. A channel gives a digit away
  if its value is the highest for this guess alone: tokens read from the cache by `usage`, tokens reused and lost by the
  report, the characters of an error, and what `diagnostics` and `/v1/requests/{id}` say of the victim's message.
- *timing*: of two prompts with the same head one is new and the other has just been sent by the victim. The AUC is the
  probability that the known one has its first token sooner, ties halved
  (https://en.wikipedia.org/wiki/Receiver_operating_characteristic#Area_under_the_curve): 0.5 tells nothing. With
  2,000 pairs its standard error is 0.009.
- *head*: how much of tools and system text a key reads that three others have sent.

With `all`, the same attack finds everything: so it is one that works.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import secrets
import string
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

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
OTHERS = ("first", "second")  # who send the same head as the victim
FLAGS = ("--max-model-len", "4096", "--kv-pool-bytes", "256MiB", "--audit-share", "0")
SHARES = ("none", "tools-system", "all")
WARM_UP = 10  # pairs that are not counted
REPORT_SECONDS = 10.0
VAULT = "These are the instructions of the vault, and they are longer than a page of the cache. " * 4
TOOL = {"name": "open_door", "description": "Open a door of the house.", "input_schema": {"type": "object"}}
Clients = dict[str, httpx.Client]


@dataclass(frozen=True)
class Arm:
    """What the attacker has found with one `--share-prefix`."""

    digits: int  # that were to be found
    found: dict[str, int]  # of these, by channel
    pairs: int
    auc: float
    known_ms: float  # medians
    new_ms: float
    head_tokens: int  # of a prompt whose tools and system text three others have sent
    head_read: int  # of these, read from the cache
    own_read: int  # the same when the attacker has sent it, too


def ask(text: str, **more: Any) -> Json:
    """A request of one token."""
    message = {"role": "user", "content": text}
    return {"model": "any", "max_tokens": 1, "temperature": 0, "messages": [message]} | more


def with_head(text: str, place: str = "house") -> Json:
    """The same with tools and a system text, which no other place has."""
    return ask(text, system=f"You keep the doors of a {place}. {VAULT}", tools=[TOOL])


def post(client: httpx.Client, body: Json) -> Json:
    """The answer to a request that succeeds. Raises RuntimeError."""
    response = client.post("/v1/messages", json=body)
    if response.status_code != 200:
        raise RuntimeError(f"{response.status_code}: {response.text[:500]}")
    answer: Json = response.json()
    return answer


@contextmanager
def serving(model: Path, share: str) -> Iterator[Clients]:
    """A client with each key of a server that shares so much between them."""
    keys = {name: secrets.token_hex(16) for name in (VICTIM, ATTACKER, *OTHERS)}
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory()), "keys")
        lines = (f"{name} sha256:{hashlib.sha256(key.encode()).hexdigest()}\n" for name, key in keys.items())
        file.write_text("".join(lines))
        flags = (*FLAGS, "--api-key-file", str(file), "--share-prefix", share)
        server = stack.enter_context(running_server(model, *flags, compiled=True))
        yield {
            name: stack.enter_context(httpx.Client(base_url=server.url, headers={"x-api-key": key}, timeout=600))
            for name, key in keys.items()
        }


# Extraction.


def told(client: httpx.Client, text: str, victims: str) -> dict[str, float]:
    """All that an answer, its report and refusals tell of a guess, as numbers by channel."""
    answer = post(client, with_head(text) | {"diagnostics": {"previous_message_id": victims}})
    report = report_on(client, answer["id"])
    refused = client.post("/v1/messages", json=with_head(text) | {"max_tokens": 0, "top_k": -1})
    counted = client.post("/v1/messages/count_tokens", json={"messages": ask(text)["messages"], "model": "any"})
    reason = ((answer.get("diagnostics") or {}).get("cache_miss_reason") or {}).get("type", "")
    return {
        "usage": answer["usage"]["cache_read_input_tokens"],
        "report: reused": report["reused_tokens"],
        "report: lost": report.get("lost_tokens", 0),
        "diagnostics": float(reason != "previous_message_not_found"),
        "error": len(refused.text),
        "count_tokens": counted.json()["input_tokens"],
        "/v1/requests/{id}": float(client.get(f"/v1/requests/{victims}").status_code == 200),
    }


def report_on(client: httpx.Client, id: str) -> Json:
    """The report on a request, which is made after its first token. Raises TimeoutError."""
    end = time.monotonic() + REPORT_SECONDS
    while (found := client.get(f"/v1/requests/{id}")).status_code != 200:
        if time.monotonic() > end:
            raise TimeoutError(f"{id} has no report after {REPORT_SECONDS:g} s")
        time.sleep(0.005)
    report: Json = found.json()
    return report


def extracted(clients: Clients, rng: random.Random, number: int) -> Counter[str]:
    """The digits of a new secret that each channel gives away, when all before them are known."""
    pin, found = f"{rng.randrange(10**4):04}", Counter[str]()
    prompt = f"{VAULT}Note {number} of the house: the PIN of the safe is "
    victims = post(clients[VICTIM], with_head(f"{prompt}{pin} and stays secret"))["id"]
    told(clients[ATTACKER], f"{prompt}x", victims)  # what all guesses share is the attacker's own from here on
    for at, digit in enumerate(pin):
        guesses = rng.sample(string.digits, 10)
        seen = {guess: told(clients[ATTACKER], f"{prompt}{pin[:at]}{guess} is it", victims) for guess in guesses}
        for channel in seen[digit]:
            highest = max(seen.values(), key=lambda each: each[channel])[channel]
            best = [guess for guess, each in seen.items() if each[channel] == highest]
            found[channel] += best == [digit]
    return found


# Timing.


def body_of(rng: random.Random, tokens: int) -> Json:
    """A streamed request, whose user message of about so many tokens nobody has sent before."""
    text = " ".join(str(rng.randrange(10**6)) for _ in range(tokens // 4))
    return with_head(text) | {"stream": True}


def pair(clients: Clients, rng: random.Random, tokens: int) -> tuple[float, float]:
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


def attacked(model: Path, share: str, secrets_: int, pairs: int, tokens: int, seed: int) -> Arm:
    """Attack a server with this `--share-prefix`."""
    rng = random.Random(seed)
    with serving(model, share) as clients:
        for name in (*OTHERS, VICTIM):  # so that the head of all that follows is shared, where heads are
            post(clients[name], with_head(f"I am {name}"))
        found: Counter[str] = Counter()
        for number in track(range(secrets_), f"{share}: secrets"):
            found.update(extracted(clients, rng, number))
        both = [pair(clients, rng, tokens) for _ in track(range(WARM_UP + pairs), f"{share}: pairs")][WARM_UP:]
        for name in (VICTIM, *OTHERS, VICTIM):
            post(clients[name], with_head(f"I am {name}", "garden"))
        first, again = (post(clients[ATTACKER], with_head("I am nobody", "garden")) for _ in range(2))
    known, new = zip(*both, strict=True)
    usage, read = first["usage"], "cache_read_input_tokens"
    prompt = sum(usage[field] for field in ("input_tokens", "cache_creation_input_tokens", read))
    channels = dict(sorted(found.items()))
    times = (auc(known, new), median(known), median(new))
    return Arm(4 * secrets_, channels, pairs, *times, prompt, usage[read], again["usage"][read])


def main(argv: Sequence[str] | None = None) -> None:
    """Attack with each `--share-prefix`, print and write what was found."""
    cli = argparse.ArgumentParser(prog="python -m experiments.bench.isolation", description=__doc__)
    cli.add_argument("--model", type=Path, help="a checkpoint (default: a tiny one)")
    cli.add_argument("--secrets", type=int, default=10, help="of four digits each, in each arm")
    cli.add_argument("--pairs", type=int, default=2000, help="where keys share nothing")
    cli.add_argument("--shared-pairs", type=int, default=500, help="where they share something")
    cli.add_argument("--tokens", type=int, default=1000, help="of a prompt that is timed, about")
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--output", type=Path, default=RESULTS)
    args = cli.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            write_demo_model(Path(folder, "model"), config=TINY)
        model = args.model or Path(folder, "model")
        pairs = {share: args.pairs if share == "none" else args.shared_pairs for share in SHARES}
        arms = {share: attacked(model, share, args.secrets, pairs[share], args.tokens, args.seed) for share in SHARES}
    table = Table("share", "digits found, by the best channel", "pairs", "AUC", "known, ms", "new, ms", "head read")
    for share, arm in arms.items():
        best = max(arm.found, key=lambda channel: arm.found[channel])
        digits = f"{arm.found[best]} of {arm.digits}" + (f" ({best})" if arm.found[best] else "")
        times = (f"{each:.3f}" for each in (arm.auc, arm.known_ms, arm.new_ms))
        table.add_row(share, digits, f"{arm.pairs:,}", *times, f"{arm.head_read} of {arm.head_tokens}")
    Console().print(table)
    found = {share: asdict(arm) for share, arm in arms.items()}
    write_json(args.output, {"tokens": args.tokens, "arms": found} | provenance())


if __name__ == "__main__":
    main()
