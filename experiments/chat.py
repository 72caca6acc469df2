"""`python -m experiments.chat`: talk to a model through the real server, and see what its cache did."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.text import Text

from experiments.harness.client import prompt_counts, timed_events
from experiments.harness.server import running_server
from experiments.workloads.trained_model import server_flags

HELP = (
    "/new starts over, /system TEXT sets the system text and starts over, Ctrl-C stops an answer, /quit or Ctrl-D ends"
)


@dataclass
class Chat:
    """A conversation, and how it is sampled."""

    max_tokens: int
    temperature: float
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """The request for the next answer."""
        settings = {"model": "any", "max_tokens": self.max_tokens, "temperature": self.temperature, "stream": True}
        return settings | ({"system": self.system} if self.system else {}) | {"messages": self.messages}


@dataclass
class Answer:
    """An answer as it comes."""

    text: str = ""
    shown: str = ""  # the same, and the reasoning before it
    first_ms: float | None = None  # until its first text, from the request's last byte
    last_ms: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)

    def take(self, at: float, event: dict[str, Any]) -> None:
        """Take in an event of the stream. Raises RuntimeError for an error."""
        self.last_ms = at
        if event["type"] == "message_start":
            self.usage = event["message"]["usage"]
        elif event["type"] == "content_block_delta":
            self.first_ms = at if self.first_ms is None else self.first_ms
            text = event["delta"].get("text", "")
            self.text += text
            self.shown += text or event["delta"].get("thinking", "")
        elif event["type"] == "message_delta":
            self.usage |= event["usage"]
        elif event["type"] == "error":
            raise RuntimeError(event["error"]["message"])

    def figures(self) -> str:
        """What the cache did, and how fast the answer came, in a line."""
        prompt, cached = prompt_counts(self.usage)
        written, first = self.usage.get("output_tokens", 0), self.first_ms or self.last_ms
        rate = (written - 1) / (self.last_ms - first) * 1e3 if written > 1 and self.last_ms > first else 0.0
        return (
            f"{cached:,} of {prompt:,} prompt tokens from the cache ({cached / max(1, prompt):.0%}), first token after "
            f"{first:,.0f} ms, {written:,} tokens at {rate:.1f} a second"
        )


def ask(client: httpx.Client, url: str, chat: Chat, console: Console) -> Answer:
    """Stream the next answer to the terminal. Raises RuntimeError if it is an error."""
    answer = Answer()
    for at, event in timed_events(client, f"{url}/v1/messages", chat.body()):
        shown = len(answer.shown)
        answer.take(at, event)
        console.print(answer.shown[shown:], end="", markup=False, highlight=False, soft_wrap=True)
    console.print()
    return answer


def turn(client: httpx.Client, url: str, chat: Chat, said: str, console: Console) -> None:
    """One question and its answer; a question that fails is taken back."""
    chat.messages.append({"role": "user", "content": said})
    try:
        answer = ask(client, url, chat, console)
    except (RuntimeError, httpx.HTTPError) as error:
        chat.messages.pop()
        console.print(Text(f"{type(error).__name__}: {error}", "red"))
        return
    except KeyboardInterrupt:
        chat.messages.pop()
        console.print(Text("stopped", "dim"))
        return
    chat.messages.append({"role": "assistant", "content": answer.text})
    console.print(Text(answer.figures(), "dim"))


def talk(url: str, chat: Chat, console: Console) -> None:
    """Read questions until the input ends."""
    console.print(Text(HELP, "dim"))
    with httpx.Client(timeout=600, trust_env=False) as client:
        while True:
            try:
                said = console.input("[bold]> [/bold]").strip()
            except (EOFError, KeyboardInterrupt):
                return
            command, _, rest = said.partition(" ")
            if command == "/quit":
                return
            if command in ("/new", "/system"):
                chat.messages.clear()
                chat.system = rest if command == "/system" else chat.system
            elif said:
                turn(client, url, chat, said, console)


@contextmanager
def server(url: str | None, model: str | None, console: Console) -> Iterator[str]:
    """The URL of the server to talk to: one that runs, or one that is started for this chat."""
    if url:
        yield url
        return
    flags = ("--model", model) if model else server_flags(console)
    with ExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory()), "server.log")
        with console.status("starting the server"):
            started = stack.enter_context(running_server(flags[1], *flags[2:], log=log, own_group=True))
        yield started.url


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    cli = argparse.ArgumentParser(prog="python -m experiments.chat", description=__doc__.split("\n")[0])
    cli.add_argument("--url", help="a server that runs (default: starts one)")
    cli.add_argument("--model", help="the checkpoint of the server that is started (default: SmolLM2-135M-Instruct)")
    cli.add_argument("--system", default="", metavar="TEXT", help="the system text")
    cli.add_argument("--max-tokens", type=int, default=512, help="of an answer (default: %(default)s)")
    cli.add_argument("--temperature", type=float, default=0.2, help="(default: %(default)s)")
    args = cli.parse_args(argv)
    console = Console()
    signal.signal(signal.SIGHUP, lambda *_: sys.exit())  # a closed terminal ends the server, too
    with server(args.url, args.model, console) as url:
        talk(url, Chat(args.max_tokens, args.temperature, args.system), console)


if __name__ == "__main__":
    main()
