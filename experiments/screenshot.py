"""The dashboard's picture: agents of several kinds talk to a server on the demo model, and Chromium photographs it.

`python -m experiments.screenshot` writes results/dashboard.png. It needs the extra `clients` and a Chromium: the one
that `make test-clients` has fetched, or `--chromium PATH`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from rich.progress import track

from experiments.harness.client import measure
from experiments.harness.server import running_server
from experiments.workloads.demo_model import write_demo_model
from experiments.workloads.sessions import Session, http_headers, request, session_header, with_header
from experiments.workloads.synthetic import Json, prose

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = Path.home() / ".cache" / "tokenzero" / "clients" / "chromium" / "147.0.0" / "chromium"
PICTURE = Path(__file__).parent / "results" / "dashboard.png"
# One process and no GPU: what a headless Chromium needs in a container.
ARGUMENTS = ("--no-sandbox", "--no-zygote", "--headless=shell", "--disable-gpu")
# The pool holds two of the three sessions, so that host memory is read as well.
FLAGS = ("--kv-pool-bytes", "80MiB", "--host-cache-bytes", "1GB", "--max-num-seqs", "4", "--max-model-len", "30000")
TURNS = 10
HELPED = (6, 7)  # turns in which an agent has another work for it


@contextmanager
def chromium(program: Path) -> Iterator[Browser]:
    """A headless Chromium, ended when left."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(program), args=list(ARGUMENTS), timeout=60_000)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Agent:
    """A session that grows by the server's answers; each request starts with a fresh header."""

    session: Session
    headers: dict[str, str]
    body: Json
    sent: int = 0

    def ask(self, client: httpx.Client, url: str, change: Callable[[Json], Json]) -> None:
        """Send the next request, changed once by `change`, then append the answer and the next question."""
        self.sent += 1
        body = with_header(change(self.body), session_header(self.session, self.sent))
        answer = measure(client, url, body, self.headers)
        question = f"{self.sent}: {prose(self.session.rng('question', self.sent), 5_000)}"
        turns = [{"role": "assistant", "content": answer.text}, {"role": "user", "content": question}]
        self.body = self.body | {"messages": [*self.body["messages"], *turns]}


def agent(seed: int, name: str, **headers: str) -> Agent:
    """An agent at the start of its session; `name` is its folder's and its client's."""
    session = Session(seed, f"/home/dev/{name}", scale=0.3, thinking=False)
    body = request(session, header=False) | {"max_tokens": 64, "temperature": 0}
    return Agent(session, http_headers(session) | {"user-agent": f"{name}/1.0"} | headers, body)


def talk(client: httpx.Client, url: str) -> None:
    """Three agents take turns: one keeps its header, one shuffles its tools once and edits its history once.

    The first has another work for it for a while. In the end one waits for a tool, and one for a person.
    """
    steady, erring = agent(0, "compiler"), agent(1, "website")
    kept = agent(2, "driver", **{"x-tokenzero-normalize": "none"})
    helper = agent(0, "compiler", **{"x-claude-code-agent-id": "explore-the-tests"})
    for turn in track(range(TURNS), description="agents talk"):
        last = turn == TURNS - 1
        steady.ask(client, url, calling if last else same)
        if turn in HELPED:
            helper.ask(client, url, stopping if turn == HELPED[-1] else same)
        erring.ask(client, url, stopping if last else {3: shuffled, 5: shortened}.get(turn, same))
        kept.ask(client, url, same)


def same(body: Json) -> Json:
    """The request as it is."""
    return body


def calling(body: Json) -> Json:
    """The request with an answer that calls a tool."""
    choice = {"type": "tool", "name": body["tools"][0]["name"], "disable_parallel_tool_use": True}
    return body | {"tool_choice": choice, "max_tokens": 1000}


def stopping(body: Json) -> Json:
    """The request with an answer that ends soon."""
    return body | {"stop_sequences": list("aeiou "), "max_tokens": 1000}


def shuffled(body: Json) -> Json:
    """The request with its tools in another order."""
    return body | {"tools": [*body["tools"][5:], *body["tools"][:5]]}


def shortened(body: Json) -> Json:
    """The request with its second question cut short."""
    messages = list(body["messages"])
    at = [i for i, message in enumerate(messages) if message["role"] == "user"][2]
    messages[at] = {"role": "user", "content": messages[at]["content"][:500]}
    return body | {"messages": messages}


def look(page: Page, url: str, picture: Path) -> None:
    """Open the dashboard, point at a request whose header broke its prefix, and write a screenshot."""
    page.goto(url)
    rows = page.locator(".row", has_text="preamble")
    rows.first.wait_for()
    rows.nth(2).hover()
    page.locator(".agent").nth(3).wait_for()
    page.screenshot(path=str(picture), full_page=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.screenshot", description=__doc__)
    parser.add_argument("--chromium", type=Path, default=CHROMIUM, help="the program (default: %(default)s)")
    parser.add_argument("--model", type=Path, help="checkpoint folder (default: the demo model, written now)")
    parser.add_argument("--out", type=Path, default=PICTURE)
    parser.add_argument("--dark", action="store_true", help="in the dark colour scheme")
    args = parser.parse_args()
    if not args.chromium.is_file():
        parser.error(f"--chromium {args.chromium}: no such program; `make test-clients` fetches one, or name another")
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or Path(scratch, "model")
        write_demo_model(model)
        with running_server(model, *FLAGS, log=Path(scratch, "log")) as server, httpx.Client(timeout=300) as client:
            talk(client, server.url)
            with chromium(args.chromium) as browser:
                scheme = "dark" if args.dark else "light"
                page = browser.new_page(
                    viewport={"width": 1360, "height": 1340}, device_scale_factor=1.5, color_scheme=scheme
                )
                look(page, server.url, args.out)


if __name__ == "__main__":
    main()
