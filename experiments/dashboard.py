"""The dashboard's picture: agents of several kinds talk to a server on the demo model, and Chromium takes a look.

`python -m experiments.dashboard` writes results/dashboard.png. It needs the extra `clients` and a Chromium: the one
that `make test-clients` has fetched, or `--chromium PATH`.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from rich.progress import track

from experiments.demo_model import write_demo_model
from experiments.server import measure, running_server
from experiments.sessions import Session, requests
from experiments.synthetic import Json

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = Path.home() / ".cache" / "tokenzero" / "clients" / "chromium" / "chromium"
PICTURE = Path(__file__).parent / "results" / "dashboard.png"
# One process and no GPU: what a headless Chromium needs in a container.
ARGUMENTS = ("--no-sandbox", "--no-zygote", "--headless=shell", "--disable-gpu")
# The pool holds two of the three sessions, so that host memory is read, too.
FLAGS = ("--kv-pool-bytes", "96MiB", "--host-bytes", "1GB", "--max-batch", "4", "--max-model-len", "40000")
KEEP = {"x-tokenzero-normalize": "none"}
TURNS = 8


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


def traffic() -> Iterator[tuple[Json, dict[str, str]]]:
    """Bodies and headers: sessions in turn, one whose header is kept, and now and then a client that errs."""
    steady, second, kept = (
        requests(Session(seed, f"/home/dev/{name}", scale=0.3, kin="", thinking=False))
        for seed, name in enumerate(("compiler", "website", "driver"))
    )
    for turn in range(TURNS):
        body = next(steady)
        yield body, {"user-agent": "steady/1.0"}
        yield next(second), {"user-agent": "second/1.0"}
        yield next(kept), {"user-agent": "kept/1.0"} | KEEP
        if turn == TURNS // 2:
            yield body | {"tools": body["tools"][::-1]}, {"user-agent": "shuffling/1.0"}
        if turn == TURNS - 3:
            yield edited(body), {"user-agent": "steady/1.0"}


def edited(body: Json) -> Json:
    """The request with its first answer shortened, as compaction does."""
    messages = list(body["messages"])
    at = next(i for i, message in enumerate(messages) if message["role"] == "user" and i > 2)
    messages[at] = {"role": "user", "content": "[older results were removed]"}
    return body | {"messages": [*messages[: at - 1], {"role": "assistant", "content": "Done."}, *messages[at:]]}


def look(page: Page, url: str, picture: Path) -> None:
    """Open the dashboard, point at a request that lost tokens, and write what is seen."""
    page.goto(url)
    row = page.locator(".row[data-verdict=lost]").first
    row.wait_for()
    row.hover()
    page.screenshot(path=str(picture), full_page=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.dashboard", description=__doc__)
    parser.add_argument("--chromium", type=Path, default=CHROMIUM, help="the program (default: %(default)s)")
    parser.add_argument("--model", type=Path, help="checkpoint folder (default: the demo model, made afresh)")
    parser.add_argument("--out", type=Path, default=PICTURE)
    parser.add_argument("--dark", action="store_true", help="as those see it who prefer dark pages")
    args = parser.parse_args()
    if not args.chromium.is_file():
        parser.error(f"{args.chromium}: no such program; run `make test-clients`, which fetches one, or name another")
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or Path(scratch, "model")
        write_demo_model(model)
        with running_server(model, *FLAGS, log=Path(scratch, "log")) as server, httpx.Client(timeout=300) as client:
            for body, headers in track(list(itertools.islice(traffic(), None)), description="asking"):
                limits: dict[str, Any] = {"max_tokens": 48, "temperature": 0, "thinking": {"type": "disabled"}}
                measure(client, server.url, body | limits, headers)
            with chromium(args.chromium) as browser:
                scheme = "dark" if args.dark else "light"
                page = browser.new_page(
                    viewport={"width": 1360, "height": 1000}, device_scale_factor=1.5, color_scheme=scheme
                )
                look(page, server.url, args.out)


if __name__ == "__main__":
    main()
